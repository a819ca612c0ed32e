"""What happens before what, in every legal run of a program; and accesses to the same thing that nothing orders.

Owns the partial order that lanes and dependencies make, and the search for unordered accesses. Does not own what an
action touches (`verify.py`).

A lane ends its instructions one after the other, so `a` is done when `b` begins exactly if `b`'s clock has seen so many
instructions of `a`'s lane (vector clocks, one entry a lane: Mattern, "Virtual time and global states", 1989). A lane
that moves bytes may have begun an instruction while the one before it has not ended: `NUM_BEGUN` at once.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from .program import Lane, Program

__all__ = ["NUM_BEGUN", "Accesses", "Order", "Unordered"]

NUM_BEGUN = dict.fromkeys((Lane.READ, Lane.WRITE, Lane.H2D, Lane.D2H), 2) | dict.fromkeys((Lane.COMPUTE, Lane.NET), 1)
"""Lane -> its instructions that may have begun and not ended."""


class Order:
    """The partial order of one program."""

    def __init__(self, program: Program) -> None:
        lanes = {lane: number for number, lane in enumerate(Lane)}
        self._lane: list[int] = []
        self._place: list[int] = []  # of an instruction on its lane, counted from 1
        self._seen: list[list[int]] = []  # instructions of each lane that are done when it begins
        self._seen_at_end: list[list[int]] = []  # and when it ends, itself included
        on_lane: dict[int, list[int]] = {}
        for instruction in program.instructions:
            lane = lanes[instruction.lane]
            earlier = on_lane.setdefault(lane, [])
            begun = NUM_BEGUN[instruction.lane]
            ended = earlier[-begun:][:1] if len(earlier) >= begun else []
            seen = [0] * len(lanes)
            for before in (*instruction.after, *ended):
                seen = list(map(max, seen, self._seen_at_end[before]))
            at_end = list(map(max, seen, self._seen_at_end[earlier[-1]])) if earlier else list(seen)
            earlier.append(len(self._lane))
            at_end[lane] = len(earlier)
            self._lane.append(lane)
            self._place.append(len(earlier))
            self._seen.append(seen)
            self._seen_at_end.append(at_end)

    def is_before(self, first: int, second: int) -> bool:
        """Whether the instruction at `first` is done in every run when the one at `second` begins."""
        return self._seen[second][self._lane[first]] >= self._place[first]


@dataclass(frozen=True, slots=True)
class Unordered:
    """Two instructions that may run at the same time or the other way round, though both touch `what` and one of them
    changes it."""

    what: str
    first: int
    second: int


@dataclass
class Accesses:
    """Who read and changed what, in the order of the program."""

    order: Order
    _changed: dict[str, int] = field(default_factory=dict)
    _read_since: dict[str, list[int]] = field(default_factory=dict)

    def add(self, position: int, reads: Iterable[str], changes: Iterable[str]) -> Unordered | None:
        """Take note of an instruction; the first access that it is not ordered behind, or None."""
        changes = list(changes)
        for what in (*reads, *changes):
            before = self._changed.get(what)
            if before is not None and not self.order.is_before(before, position):
                return Unordered(what, before, position)
        for what in changes:
            for before in self._read_since.get(what, ()):
                if before != position and not self.order.is_before(before, position):
                    return Unordered(what, before, position)
        for what in reads:
            self._read_since.setdefault(what, []).append(position)
        for what in changes:
            self._changed[what], self._read_since[what] = position, []
        return None
