"""After a failed step: whether the state is still that of a whole step, and what has to be done before the next one.

Owns the decision, and the refusal to go on from a state that belongs to no step. Does not own the state
(`runtime/model_state.py`) nor what fails.

    whole --step--> whole
          --fails before any chunk was updated--> failed --recover--> whole: as if the step had not been
          --fails afterwards--> lost: some weights are of this step, some of the one before, some perhaps nowhere
"""

import os
from collections.abc import Callable, Sequence

from ..memory.errors import OutgrowError, StateLost
from ..parallel.actions import Action
from .disk_tier import DiskTier
from .executor import Executor, Handler

__all__ = ["Recovery"]


class Recovery:
    """Watches one engine's steps.

    Args:
        num_ranks: with several, a step that fails once it has begun cannot be taken back: the ranks would no longer be
            at the same collective.

    Attributes:
        is_together: whether that is so. Ranks that only send each other messages of one step begin the next one anew.
    """

    def __init__(self, rank: int, num_ranks: int) -> None:
        self._rank = rank
        self._num_ranks = num_ranks
        self.is_together = num_ranks > 1
        self._pid = os.getpid()
        self._has_begun = False
        self._has_updated = False
        self._has_failed = False
        self._lost = ""

    @property
    def is_lost(self) -> bool:
        """Whether the state belongs to no step."""
        return bool(self._lost)

    @property
    def has_begun(self) -> bool:
        """Whether a program has begun, and neither ended nor been recovered from."""
        return self._has_begun

    def watched(self, update: Handler) -> Handler:
        """The handler of STEP: from its first call on, a step cannot be taken back."""

        def handle(action: Action) -> None:
            self._has_updated = True
            update(action)

        return handle

    def begin(self) -> None:
        """A program begins."""
        self._has_begun = True

    def end(self) -> None:
        """The program ran to its end."""
        self._has_begun = self._has_updated = False

    def fail(self, step: int, error: BaseException) -> None:
        """The step, or what was left of the last one, failed."""
        self._has_failed = True
        if self._has_updated:
            why = "after some of the model's chunks had been updated and others not"
        elif self._has_begun and self.is_together:
            why = f"while {self._num_ranks} ranks were exchanging data, and they are no longer at the same place"
        else:
            return
        said = str(error).split("\n", 1)[0]
        self._lost = f"step {step} failed {why} ({type(error).__name__}: {said})"

    def check(self) -> None:
        """Raise where nothing may go on.

        Raises:
            StateLost: the state belongs to no step.
            OutgrowError: this is a fork of the process that the engine belongs to; its lanes are not here.
        """
        if os.getpid() != self._pid:
            raise OutgrowError(
                f"rank {self._rank}: this engine belongs to process {self._pid}, and this is its fork {os.getpid()}, "
                "which has neither its lanes nor its files. Train in the process that made the engine, or make "
                "another engine here"
            )
        if self._lost:
            raise StateLost(
                f"rank {self._rank}: there are no weights of a whole step any more: {self._lost}. Make a new engine, "
                "and start from the last checkpoint or from the beginning"
            )

    def recover(
        self,
        executor: Executor,
        tier: DiskTier | None,
        carried: Sequence[Action],
        write: Handler,
        forget: Callable[[], None],
    ) -> bool:
        """Before anything else is done with the engine: make good what a failed step left, if it left anything.

        Args:
            carried: the writes of the last whole step that were to run into the failed one, first in its program;
                their buffers still hold what they are to write.
            write: the handler of WRITE.
            forget: lets go of what the failed step had in memory.

        Returns: whether `carried` are on disk now.

        Raises: as `check`; LaneTimeout where a lane or a transfer of the failed step never comes back; what a write
            fails with (the next call tries again).
        """
        self.check()
        if not self._has_failed:
            return False
        executor.await_lanes()
        if tier is not None:
            tier.settle()  # a transfer that comes late must not meet another use of its buffer
        had_begun = self._has_begun
        if had_begun:
            for position, action in enumerate(carried):
                if not executor.is_done(position):
                    end = write(action)
                    if end is not None:
                        end()
        forget()
        self._has_failed = self._has_begun = False
        return had_begun
