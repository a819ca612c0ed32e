"""What the stages of a pipeline take of their rank's memory: the limit under which a model is cut.

Owns the sum over state and activations, and how many micro-batches a schedule has open in a stage, pure. Does not own
the figures (a profile, layouts), nor the cut (`stages.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..parallel.actions import Action, Kind
from .pipeline_data import Schedule

__all__ = ["StageMemory", "StageNeeds", "open_micro_batches"]

Span = tuple[int, int]
"""First and end unit run of a stage."""


class StageNeeds(Protocol):
    """Bytes that stages take, in one schedule."""

    def alone(self, stage: int, span: Span) -> float:
        """Of a stage, without the others of its rank."""
        ...

    def ranks(self, spans: Sequence[Span]) -> Sequence[float]:
        """Of every rank with all of its stages."""
        ...


@dataclass(frozen=True)
class StageMemory:
    """Figures of one plan.

    Attributes:
        limit_bytes: for all the stages of a rank together.
        parameters: for each unit run, the names of those that it uses; what code between units uses too.
        state_bytes: name -> what a rank keeps of it: values, gradients, slots, as far as their home is memory.
        saved_bytes: of each unit run, between forward and backward of a micro-batch.
        waiting_bytes: likewise what is more between its input's gradient and its weights', of one that is recomputed.
        working_bytes: of each unit run, while it computes; buffers of what comes from disk too.
        copies: whether the schedule's copies of activations leave memory.
    """

    limit_bytes: int
    parameters: tuple[frozenset[str], ...]
    state_bytes: Mapping[str, float]
    saved_bytes: tuple[int, ...]
    waiting_bytes: tuple[int, ...]
    working_bytes: tuple[int, ...]
    copies: bool = False

    def needs(self, schedule: Schedule) -> StageNeeds:
        """What stages take at most.

        Args:
            schedule: any, with the placement that is cut for; how many micro-batches are open at a time in the stages
                of a rank follows from its order.
        """
        return _Needs(self, schedule)

    def room_bytes(self, placement: Sequence[int], spans: Sequence[tuple[int, int]]) -> tuple[int, ...]:
        """What is left for activations on each rank.

        Args:
            placement: rank of each stage.
            spans: first and end unit run of each stage.
        """
        left = [float(self.limit_bytes)] * len(set(placement))
        working = [0] * len(left)
        for rank, (first, end) in zip(placement, spans, strict=True):
            names = frozenset[str]().union(*self.parameters[first:end])
            left[rank] -= sum(self.state_bytes[name] for name in names)
            working[rank] = max(working[rank], *self.working_bytes[first:end])
        return tuple(max(int(rest) - taken, 0) for rest, taken in zip(left, working, strict=True))


class _Needs:
    def __init__(self, memory: StageMemory, schedule: Schedule) -> None:
        self._memory = memory
        self._placement = schedule.placement
        self._levels = [open_micro_batches(order, schedule.num_stages, memory.copies) for order in schedule.orders]
        self._known: dict[Span, tuple[float, int, int, int]] = {}

    def _of(self, span: Span) -> tuple[float, int, int, int]:
        """State, saved, waiting and working bytes."""
        found = self._known.get(span)
        if found is None:
            memory, (first, end) = self._memory, span
            names = frozenset[str]().union(*memory.parameters[first:end])
            found = self._known[span] = (
                sum(memory.state_bytes[name] for name in names),
                sum(memory.saved_bytes[first:end]),
                sum(memory.waiting_bytes[first:end]),
                max(memory.working_bytes[first:end]),
            )
        return found

    def alone(self, stage: int, span: Span) -> float:
        state, saved, waiting, working = self._of(span)
        levels = self._levels[self._placement[stage]]
        return state + working + max(num[stage] * saved + wait[stage] * waiting for num, wait in levels)

    def ranks(self, spans: Sequence[Span]) -> list[float]:
        found = [self._of(span) for span in spans]
        result = []
        for rank, levels in enumerate(self._levels):
            here = [stage for stage, owner in enumerate(self._placement) if owner == rank]
            most = max(
                sum(num[stage] * found[stage][1] + wait[stage] * found[stage][2] for stage in here)
                for num, wait in levels
            )
            result.append(most + sum(found[stage][0] for stage in here) + max(found[stage][3] for stage in here))
        return result


_Counts = tuple[int, ...]


def open_micro_batches(order: Sequence[Action], num_stages: int, copies: bool = False) -> list[tuple[_Counts, _Counts]]:
    """Along one rank's order, for each of all stages: the micro-batches between the begin of their forward and the end
    of their backward, and those of them between I and W; the fullest moments alone, which no other exceeds everywhere.

    Args:
        copies: micro-batches whose activations were copied away do not count until they are back.
    """
    held, waiting = [0] * num_stages, [0] * num_stages
    seen: dict[tuple[_Counts, _Counts], None] = {(tuple(held), tuple(waiting)): None}
    for action in order:
        stage = action.index
        assert stage is not None
        if action.kind is Kind.F or (copies and action.kind is Kind.LOAD):
            held[stage] += 1
        elif action.kind is Kind.I:
            waiting[stage] += 1
        elif action.kind in (Kind.B, Kind.W) or (copies and action.kind is Kind.SAVE):
            held[stage] -= 1
            waiting[stage] -= action.kind is Kind.W
        seen[tuple(held), tuple(waiting)] = None

    def exceeds(one: tuple[_Counts, _Counts], other: tuple[_Counts, _Counts]) -> bool:
        pairs = zip((*one[0], *one[1]), (*other[0], *other[1]), strict=True)
        return one != other and all(a >= b for a, b in pairs)

    return [level for level in seen if not any(exceeds(other, level) for other in seen)]
