"""The member of the case `memory`: one rank that trains a step while the kernel is asked what it holds."""

import gc

from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..memory.allocator import return_freed_blocks
from ..runtime.engine import Engine
from .case_memory import Holdings
from .members import proportional_bytes
from .models import CONFIGS, build_gpt, random_batches, token_loss
from .peers import adamw
from .rank import Rank

__all__ = ["MemoryMember", "build"]


class MemoryMember:
    """Builds model and engine, and reports what they hold.

    The proportional set size is read before every update of a chunk: all gradients of the chunk are summed then, the
    optimizer's state of earlier steps is there, and activations are gone. The greatest reading of a step counts.
    """

    def __init__(self, rank: Rank, config: str, zero: int) -> None:
        self._rank = rank
        self._batches = random_batches(CONFIGS[config])
        _touch_libraries(rank, zero)
        rank.barrier()
        return_freed_blocks()
        self._before_bytes = proportional_bytes()
        rank.barrier()
        model = build_gpt(CONFIGS[config])
        self._num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self._engine = Engine(model, optimizer=adamw, loss=token_loss, zero=zero)
        self._update_bytes = 0
        self._hook = register_optimizer_step_pre_hook(self._before_update)

    def _before_update(self, *_: object) -> None:
        return_freed_blocks()  # activations of the step, kept for the next one, are no state
        self._update_bytes = max(self._update_bytes, proportional_bytes())

    def step(self, index: int) -> Holdings:
        """One training step."""
        inputs, targets = (tensor.chunk(self._rank.count)[self._rank.index] for tensor in self._batches(index))
        self._update_bytes = 0
        self._rank.barrier()
        self._engine.step((inputs, targets))
        statistics = self._engine.statistics()
        return Holdings(
            peak_bytes_by_slot={str(slot): int(size) for slot, size in statistics.peak_bytes_by_slot.items()},
            pss_bytes=self._update_bytes - self._before_bytes,
            num_parameters=self._num_parameters,
            transport=self._engine.transport_name,
        )

    def close(self) -> None:
        self._hook.remove()
        self._engine.close()


def _touch_libraries(rank: Rank, zero: int) -> None:
    """Train a tiny model, so that code, thread pools and the interpreter's heap are resident before the start."""
    config = CONFIGS["tiny"]
    engine = Engine(build_gpt(config), optimizer=adamw, loss=token_loss, zero=zero)
    for index in range(2):
        engine.step(tuple(tensor.chunk(rank.count)[rank.index] for tensor in random_batches(config)(index)))
    engine.close()
    del engine
    gc.collect()


def build(rank: Rank, config: str, zero: int) -> MemoryMember:
    """See `MemoryMember`."""
    return MemoryMember(rank, config, zero)
