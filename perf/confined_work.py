"""What a confined process does: train a GPT with the engine, or with a peer.

Owns the loop, and the engine in it. It does not own the process and its cgroup (`confined.py`) nor the peers
(`confined_peers.py`). Engine and plain PyTorch are initialised by the same function, the engine unit by unit under
seeds of its own: engines agree with each other to the bit, whatever their budget, and with plain PyTorch in
distribution only.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Protocol

import psutil
import torch.distributed as dist
from torch import Tensor, nn

from ..memory.allocator import return_blocks_at_once
from ..memory.budget import Memory
from ..memory.errors import DoesNotFit
from ..runtime.building import build_model
from ..runtime.engine import Engine
from ..runtime.filling import InitFiller
from .bound import Moved, moved_in
from .confined import Job, Outcome
from .confined_peers import DeepSpeed, Plain
from .members import peak_rss_bytes
from .models import GPT, GPTConfig, random_batches, token_loss
from .peers import adamw

__all__ = ["init", "work"]

_EXCHANGE_TIMEOUT = timedelta(minutes=5)


def init(module: nn.Module) -> None:
    """As `build_gpt`: matrices from a normal distribution of 0.02; biases 0, LayerNorms 1."""
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() == 2:
            nn.init.normal_(parameter, 0.0, 0.02)
        else:
            nn.init.constant_(parameter, float(isinstance(module, nn.LayerNorm) and name == "weight"))


class _Training(Protocol):
    """One side: a step, and what there is to say of it."""

    predicted_bytes: int | None
    plan: str

    def step(self, batch: tuple[Tensor, Tensor]) -> tuple[float, float, Moved]: ...

    def close(self) -> None: ...


def work(job: Job) -> Iterator[Outcome]:
    """Train; an outcome after the start and after every step, each with all that is known so far."""
    config = GPTConfig(**job.model)
    if job.folder is not None:
        return_blocks_at_once()  # before anything is built: a heap that has grown does not shrink
    whole = random_batches(config)

    def batches(index: int) -> tuple[Tensor, Tensor]:
        """This rank's part."""
        inputs, targets = (tensor.chunk(job.num_ranks)[job.rank] for tensor in whole(index))
        return inputs, targets

    if job.num_ranks > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{job.meeting_file}",
            rank=job.rank,
            world_size=job.num_ranks,
            timeout=_EXCHANGE_TIMEOUT,
        )
    yield from _train(job, config, batches)
    if job.num_ranks > 1:
        dist.destroy_process_group()


def _train(job: Job, config: GPTConfig, batches: Callable[[int], tuple[Tensor, Tensor]]) -> Iterator[Outcome]:
    try:
        training = _training(job, config, batches(0))
    except DoesNotFit as error:
        yield Outcome(end="refused", message=str(error))
        return
    outcome = Outcome(
        startup_s=time.time() - psutil.Process().create_time(),
        resident_peak_bytes=peak_rss_bytes(),
        predicted_bytes=training.predicted_bytes,
        plan=training.plan,
    )
    yield outcome
    for index in range(job.num_steps):
        loss, seconds, moved = training.step(batches(index))
        outcome = replace(
            outcome,
            step_s=(*outcome.step_s, seconds),
            losses=(*outcome.losses, loss),
            read_bytes=(*outcome.read_bytes, moved.read_bytes),
            write_bytes=(*outcome.write_bytes, moved.write_bytes),
            busy_s=tuple(moved.busy_s.items()),
            resident_peak_bytes=max(outcome.resident_peak_bytes, peak_rss_bytes()),
        )
        yield outcome
    training.close()
    yield replace(outcome, end="trained", resident_peak_bytes=max(outcome.resident_peak_bytes, peak_rss_bytes()))


def _training(job: Job, config: GPTConfig, example: tuple[Tensor, Tensor]) -> _Training:
    checkpoint_blocks = job.activations == "recompute"
    if job.who == "plain":
        return Plain(config, job.micro_batches, init, checkpoint_blocks)
    if job.who == "deepspeed":
        assert job.folder is not None
        return DeepSpeed(config, job.folder, checkpoint_blocks)
    return _Engine(job, config, example)


class _Engine:
    def __init__(self, job: Job, config: GPTConfig, example: tuple[Tensor, Tensor]) -> None:
        built = build_model(lambda: GPT(config), 0, lambda num_bytes: False)
        self._engine = Engine(
            built.model,
            optimizer=adamw,
            loss=token_loss,
            memory=Memory(host=job.budget_bytes, disk=job.folder),
            micro_batches=job.micro_batches,
            filler=InitFiller(init, 0, built.model),
            example=example,
            offload=job.offload,
            activations=job.activations,
            run_name="perf",
        )
        predicted = self._engine.predicted
        self.predicted_bytes = None if predicted is None else predicted.peak_bytes
        plan = self._engine.plan
        homes = Counter(f"{chunk.parameter_home}/{chunk.optimizer_home}" for chunk in plan.chunks)
        words = Counter(map(str, plan.activations))
        self.plan = "; ".join(
            [
                "parameters/optimizer on " + ", ".join(f"{home} of {count}" for home, count in homes.items()),
                ", ".join(f"{word} {count}" for word, count in words.items()) or "keep all",
                str(plan.order),
                *(["freed blocks kept"] if plan.keeps_freed else []),
            ]
        )

    def step(self, batch: tuple[Tensor, Tensor]) -> tuple[float, float, Moved]:
        result = self._engine.step(batch)
        return result.loss, result.step_s, moved_in(result.timeline)

    def close(self) -> None:
        self._engine.close()
