"""Activations that move between forward and backward: what SAVE and LOAD do on one rank.

Owns which unit runs' activations move, and their way between autograd and the tiers' buffers: to the host, to the disk,
or over the one to the other. Does not own what autograd is given meanwhile (`memory/activations.py`), arenas
(`memory/tiers.py`), files (`runtime/disk_tier.py`), nor when (programs).
"""

import logging
from collections.abc import Callable, Mapping, Set
from contextlib import AbstractContextManager, nullcontext

import torch

from ..memory.activations import ActivationStore
from ..memory.budget import format_bytes
from ..memory.disk_lanes import Ticket
from ..memory.tiers import Tiers
from ..parallel.actions import Action
from ..scheduler.moves import DEVICE_COPY
from .disk_tier import DiskTier
from .model_state import ModelState
from .saved_tensors import places

__all__ = ["MovingActivations"]

_log = logging.getLogger(__name__)


class MovingActivations:
    """See the module's words.

    Args:
        moves: the (unit run, micro-batch) pairs that the program has SAVE and LOAD for, with the names of their buffers
            on the host, `a<run>.<micro-batch>`.
        tier: with an extent for each of those that go to disk; None where none does.
        on_disk: unit runs whose activations go to disk.
        tiers: host and device, where they are not the same memory.
        shown: is given every tensor that is saved and has no home of its own.
    """

    def __init__(
        self,
        state: ModelState,
        moves: Mapping[tuple[int, int], str],
        tier: DiskTier | None,
        on_disk: Set[int],
        tiers: Tiers | None = None,
        shown: Callable[[torch.Tensor], object] | None = None,
    ) -> None:
        self._tier = tier
        self._tiers = tiers
        self._on_disk = on_disk
        self._moves = dict(moves)
        device = "cpu" if tiers is None else tiers.device.device
        place_of = places(state)

        def elsewhere(tensor: torch.Tensor) -> Callable[[], torch.Tensor] | None:
            found = place_of(tensor)
            if found is None and shown is not None:
                shown(tensor)
            return found

        self._store = ActivationStore(device, elsewhere=elsewhere)
        self._away: set[tuple[int, int]] = set()
        self._too_large: set[int] = set()  # unit runs that were warned of

    def saving(self, run: int, micro_batch: int) -> AbstractContextManager[None] | None:
        if (run, micro_batch) not in self._moves:
            return None
        return self._store.hooks(run, micro_batch)

    def save(self, action: Action) -> Callable[[], None] | None:
        """SAVE: what a unit saved is on the host, or on disk when the result was called, and nowhere else."""
        run, micro_batch = _place(action)
        if not self._store.holds(run, micro_batch):  # there was no sample for this micro-batch
            return None
        name = self._moves[run, micro_batch]
        buffer = self._buffer(name)
        needed = self._store.bytes_needed(run, micro_batch)
        if needed > buffer.numel():
            if run not in self._too_large:
                self._too_large.add(run)
                _log.warning(
                    "the activations of unit run %d have %s, more than the %s that were planned for them: they stay in "
                    "memory. Larger samples than in the first step do this: begin with the largest",
                    run, format_bytes(needed), format_bytes(buffer.numel()),
                )  # fmt: skip
            return None
        with self._copying():
            self._store.save(run, micro_batch, buffer)
        ticket = self._tier.write(name) if run in self._on_disk and self._tier is not None else None
        self._away.add((run, micro_batch))
        return None if ticket is None else lambda: _ended(ticket)

    def load(self, action: Action) -> Callable[[], None] | None:
        """LOAD: it is in a buffer where the unit computes, if it comes from disk when the result was called."""
        run, micro_batch = _place(action)
        if (run, micro_batch) not in self._away:
            return None
        self._away.discard((run, micro_batch))
        if run not in self._on_disk:
            self._bring(run, micro_batch)
            return None
        assert self._tier is not None
        ticket = self._tier.read(self._moves[run, micro_batch])

        def end() -> None:
            ticket.wait()
            self._bring(run, micro_batch)

        return end

    def _bring(self, run: int, micro_batch: int) -> None:
        """From the buffer on the host to where the unit computes."""
        name = self._moves[run, micro_batch]
        buffer = self._buffer(name)
        if self._tiers is not None:
            num_bytes = self._store.bytes_needed(run, micro_batch)
            target = self._tiers.device.buffer(f"{name}:{DEVICE_COPY}")
            with self._copying():
                target[:num_bytes].copy_(buffer[:num_bytes], non_blocking=True)
            buffer = target
        self._store.load(run, micro_batch, buffer)

    def _buffer(self, name: str) -> torch.Tensor:
        """On the host."""
        if self._tiers is not None:
            return self._tiers.host.buffer(name)
        assert self._tier is not None
        return self._tier.buffer(name)

    def _copying(self) -> AbstractContextManager[None]:
        return nullcontext() if self._tiers is None else self._tiers.device.copying()

    def loaded_bytes(self) -> int:
        """That lie in buffers for backward passes."""
        return self._store.statistics().here_bytes

    def release(self, run: int, micro_batch: int) -> None:
        if self._store.holds(run, micro_batch):
            self._store.release(run, micro_batch)

    def release_micro_batch(self, micro_batch: int) -> None:
        """A micro-batch is over: also what no gradient reached is forgotten."""
        for run, number in self._moves:
            if number == micro_batch:
                self.release(run, number)

    def clear(self) -> None:
        """After a failed step."""
        self._store.clear()
        self._away.clear()


def _ended(ticket: Ticket) -> None:
    ticket.wait()


def _place(action: Action) -> tuple[int, int]:
    assert action.index is not None
    assert action.micro_batch is not None
    return action.index, action.micro_batch
