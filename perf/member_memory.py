"""The member of the case `memory`: one rank that trains a step while its memory is sampled."""

import gc
import threading

import torch

from ..parallel.kernels import sum_ranks
from ..runtime.engine import Engine
from .case_memory import Holdings
from .members import proportional_bytes
from .models import CONFIGS, build_gpt, random_batches, token_loss
from .peers import adamw
from .rank import Rank

__all__ = ["MemoryMember", "build"]

_SAMPLE_EVERY_S = 0.002


class _Sampler:
    """Reads the proportional set size from a thread of its own until it is told to stop; keeps the greatest."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="outgrow-perf-pss", daemon=True)

    def __enter__(self) -> "_Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, proportional_bytes())
            if self._stop.wait(_SAMPLE_EVERY_S):
                return


class MemoryMember:
    """Builds model and engine, and reports what they hold."""

    def __init__(self, rank: Rank, config: str, zero: int) -> None:
        self._rank = rank
        self._batches = random_batches(CONFIGS[config])
        _touch_libraries()
        with _Sampler() as sampler:  # its own thread and buffers belong to the start, not to the growth
            gc.collect()
        rank.barrier()
        self._before_bytes = min(sampler.peak_bytes, proportional_bytes())
        rank.barrier()
        model = build_gpt(CONFIGS[config])
        self._num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self._engine = Engine(model, optimizer=adamw, loss=token_loss, zero=zero)

    def step(self, index: int) -> Holdings:
        """One training step, sampled."""
        inputs, targets = (tensor.chunk(self._rank.count)[self._rank.index] for tensor in self._batches(index))
        self._rank.barrier()
        with _Sampler() as sampler:
            self._engine.step((inputs, targets))
        statistics = self._engine.statistics()
        return Holdings(
            peak_bytes_by_slot={str(slot): int(size) for slot, size in statistics.peak_bytes_by_slot.items()},
            pss_bytes=sampler.peak_bytes - self._before_bytes,
            num_parameters=self._num_parameters,
            transport=self._engine.transport_name,
        )

    def close(self) -> None:
        self._engine.close()


def _touch_libraries() -> None:
    """Run every kind of kernel once on a tiny model, so that code and thread pools are resident before the start."""
    model = build_gpt(CONFIGS["tiny"])
    optimizer = adamw(model.parameters())
    inputs, targets = random_batches(CONFIGS["tiny"])(0)
    token_loss(model(inputs), targets).backward()
    optimizer.step()
    del model, optimizer
    sum_ranks(torch.ones(2, 1024), torch.ones(1024), True)  # loads the compiler's code
    gc.collect()


def build(rank: Rank, config: str, zero: int) -> MemoryMember:
    """See `MemoryMember`."""
    return MemoryMember(rank, config, zero)
