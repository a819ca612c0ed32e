"""What happens before what, in every legal run of a program; and accesses to the same thing that nothing orders.

Owns the partial order that lanes and dependencies make, and the search for unordered accesses. Does not own what an
action touches (`verify.py`).

A lane runs its instructions one after the other, so `a` happens before `b` exactly if `b`'s clock has seen so many
instructions of `a`'s lane (vector clocks, one entry a lane: Mattern, "Virtual time and global states", 1989).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from .program import Lane, Program

__all__ = ["Accesses", "Order", "Unordered"]


class Order:
    """The partial order of one program."""

    def __init__(self, program: Program) -> None:
        lanes = {lane: number for number, lane in enumerate(Lane)}
        self._lane: list[int] = []
        self._place: list[int] = []  # of an instruction on its lane, counted from 1
        self._seen: list[list[int]] = []  # instructions of each lane that are done when it begins
        last: dict[int, int] = {}
        for instruction in program.instructions:
            lane = lanes[instruction.lane]
            seen = [0] * len(lanes)
            for before in (*instruction.after, *([last[lane]] if lane in last else [])):
                for other, count in enumerate(self._seen[before]):
                    seen[other] = max(seen[other], count)
                seen[self._lane[before]] = max(seen[self._lane[before]], self._place[before])
            last[lane] = len(self._lane)
            self._lane.append(lane)
            self._place.append(seen[lane] + 1)
            self._seen.append(seen)

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
