"""Activations that move between forward and backward: what SAVE and LOAD do on one rank.

Owns which unit runs' activations move, and their way between autograd and the disk tier's buffers. Does not own what
autograd is given meanwhile (`memory/activations.py`), buffers and files (`runtime/disk_tier.py`), nor when (programs).
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from ..memory.activations import ActivationStore
from ..memory.budget import format_bytes
from ..memory.disk_lanes import Ticket
from ..parallel.actions import Action
from .disk_tier import DiskTier
from .model_state import ModelState
from .saved_tensors import places

__all__ = ["MovingActivations"]

_log = logging.getLogger(__name__)


class MovingActivations:
    """See the module's words.

    Args:
        tier: with an extent `a<run>.<micro-batch>` for each of `moves`.
        moves: the (unit run, micro-batch) pairs that the program has SAVE and LOAD for.
    """

    def __init__(self, state: ModelState, tier: DiskTier, moves: Mapping[tuple[int, int], str]) -> None:
        self._tier = tier
        self._moves = dict(moves)
        self._store = ActivationStore(elsewhere=places(state))
        self._away: set[tuple[int, int]] = set()
        self._too_large: set[int] = set()  # unit runs that were warned of

    def saving(self, run: int, micro_batch: int) -> AbstractContextManager[None] | None:
        if (run, micro_batch) not in self._moves:
            return None
        return self._store.hooks(run, micro_batch)

    def save(self, action: Action) -> Callable[[], None] | None:
        """SAVE: what a unit saved is on disk when the result was called, and nowhere else."""
        run, micro_batch = _place(action)
        if not self._store.holds(run, micro_batch):  # there was no sample for this micro-batch
            return None
        name = self._moves[run, micro_batch]
        buffer = self._tier.buffer(name)
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
        self._store.save(run, micro_batch, buffer)
        ticket = self._tier.write(name)
        self._away.add((run, micro_batch))
        return lambda: _ended(ticket)

    def load(self, action: Action) -> Callable[[], None] | None:
        """LOAD: it is in its buffer again when the result was called."""
        run, micro_batch = _place(action)
        if (run, micro_batch) not in self._away:
            return None
        self._away.discard((run, micro_batch))
        name = self._moves[run, micro_batch]
        ticket = self._tier.read(name)

        def end() -> None:
            ticket.wait()
            self._store.load(run, micro_batch, self._tier.buffer(name))

        return end

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
