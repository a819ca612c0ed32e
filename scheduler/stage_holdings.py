"""What one rank of a pipeline holds while its program goes on: `Holdings` for the stages that it has.

Owns what is different from a rank that computes all units: which unit runs there are, and that what a stage is given
comes from a transfer or from a stage of the same rank. Does not own whether other ranks send it (`rank_check.py`), nor
which chunks other ranks have a part in.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from ..parallel.actions import Action, Kind
from .holdings import Holdings, Refused, needs

__all__ = ["TIED", "TRANSFERS", "StageHoldings"]

TIED = "tied"
"""The slot of a REDUCE that sums over the stages that share a parameter."""

TRANSFERS = (Kind.SEND_F, Kind.RECV_F, Kind.SEND_B, Kind.RECV_B)


@dataclass
class StageHoldings(Holdings):
    """See `Holdings`.

    Args:
        runs: the unit runs that this rank computes.
        transfers: (kind, stage) of all that it sends and receives.
    """

    one_by_one: ClassVar[bool] = False
    runs: frozenset[int] = frozenset()
    transfers: frozenset[tuple[Kind, int]] = frozenset()
    arrived: dict[tuple[Kind, int], int] = field(default_factory=dict)  # (kind, stage) -> micro-batches
    tied: set[int] = field(default_factory=set)  # chunks whose sums over stages were made

    def apply(self, action: Action) -> None:
        """Do one action. Raises `Refused`."""
        if action.kind in TRANSFERS:
            self._transfer(action)
        elif action.kind is Kind.REDUCE and action.slot == TIED:
            self._reduce_tied(action)
        elif action.kind is Kind.B:  # a schedule may divide the passes of some micro-batches only
            super().apply(Action(Kind.I, action.index, action.micro_batch))
            super().apply(Action(Kind.W, action.index, action.micro_batch))
        else:
            super().apply(action)

    # ---- where a stage begins and ends

    def _stage_runs(self, stage: int) -> range:
        return range(self.shape.starts[stage], self.shape.last_run(stage) + 1)

    def _backward_runs(self, stage: int) -> list[int]:
        return [run for run in self._stage_runs(stage) if self.shape.units[run].has_backward]

    def _is_here(self, stage: int) -> bool:
        return 0 <= stage < len(self.shape.starts) and self.shape.starts[stage] in self.runs

    def _transfer(self, action: Action) -> None:
        kind, stage, m = action.kind, action.index, action.micro_batch
        assert stage is not None
        assert m is not None
        if not self._is_here(stage):
            raise Refused(f"stage {stage} is on another rank")
        had = self.arrived.get((kind, stage), 0)
        if had != m:
            raise Refused(f"{had} micro-batches went this way, in the order 0, 1, 2, ... it is number {m}")
        if kind is Kind.SEND_F and self.done.get((Kind.F, self.shape.last_run(stage)), 0) <= m:
            raise Refused(f"stage {stage} has not computed it yet")
        if kind is Kind.SEND_B and any(self.done.get((Kind.I, r), 0) <= m for r in self._backward_runs(stage)):
            raise Refused(f"the backward pass of stage {stage} is not over")
        self.arrived[kind, stage] = had + 1

    # ---- compute

    def _forward(self, action: Action) -> None:
        u, m = action.index, action.micro_batch
        assert u is not None
        assert m is not None
        stage = self.shape.stage_of(u)
        if u not in self.runs:
            raise Refused(f"unit run {u} is computed by another rank")
        is_first = u == self.shape.starts[stage]
        if is_first and stage and not self._is_here(stage - 1):
            if self.arrived.get((Kind.RECV_F, stage), 0) <= m:
                raise Refused(f"it needs {Action(Kind.RECV_F, stage, m)}, which comes later")
            self._count(action)
        else:
            self._count(action, *([(Kind.F, u - 1)] if u else []))

    def _before_backward(self, u: int, m: int) -> list[tuple[Kind, int]]:
        stage = self.shape.stage_of(u)
        before = [(Kind.F, self.shape.last_run(stage))]
        later = [run for run in self._backward_runs(stage) if run > u][:1]
        if not later and self._is_here(stage + 1):
            later = self._backward_runs(stage + 1)[:1]
        elif not later and (Kind.RECV_B, stage) in self.transfers and self.arrived.get((Kind.RECV_B, stage), 0) <= m:
            raise Refused(f"it needs {Action(Kind.RECV_B, stage, m)}, which comes later")
        return before + [(Kind.I, v) for v in later]

    def _runs(self) -> Sequence[int]:
        return sorted(self.runs)

    def _all_computed(self) -> None:
        super()._all_computed()
        for transfer, stage in self.transfers:
            had = self.arrived.get((transfer, stage), 0)
            if had < self.plan.micro_batches:
                raise Refused(f"{Action(transfer, stage, had)} is missing")

    # ---- gradients

    def _begin_gradients(self, u: int, m: int) -> None:
        """A stage puts by what it has made of a micro-batch whose turn is interrupted; chunks that several stages of
        this rank use add up, and are complete with the last of them."""
        shared = {c for c in needs(u, self.shape) if len({self.shape.stage_of(v) for v in self._users(c)}) > 1}
        if not shared:
            super()._begin_gradients(u, m)

    def _users(self, chunk: int) -> list[int]:
        return [run for run in self.runs if chunk in self.shape.units[run].chunks]

    def _reduce_tied(self, action: Action) -> None:
        c = action.index
        assert c is not None
        if c in self.tied:
            raise Refused("the stages' sums were added already")
        if self.updated[c]:
            raise Refused("the chunk is updated already")
        self._complete(c)
        self.tied.add(c)
