"""Offsets for buffers whose lifetimes are known beforehand: several buffers share bytes where they never meet.

Owns the placement, a pure function. Does not own the bytes (a tier's arena is one `AlignedBuffer`) nor the order that
keeps two buffers in the same bytes apart at run time (`scheduler/passes.py` makes dependencies of it).

The buffers are placed in decreasing size, each into the tightest gap between those already placed that it meets in time
(ALGORITHMS 3.7): within a few percent of the most bytes that are ever alive together. Nothing fragments at run time:
nothing is allocated then.
"""

from bisect import insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .direct_io import round_up

__all__ = ["Lifetime", "most_alive_bytes", "place_buffers"]

Lifetime = tuple[int, int]
"""First and last position in a program, both included."""


@dataclass(frozen=True, slots=True)
class _Placed:
    start: int
    stop: int
    taken: int


def place_buffers(sizes: Mapping[str, int], lifetimes: Mapping[str, Sequence[Lifetime]]) -> tuple[dict[str, int], int]:
    """An offset for every buffer, in bytes, a multiple of 4096; and the bytes that all of them need.

    Args:
        sizes: buffer -> bytes.
        lifetimes: buffer -> when it is in use; it has the same offset every time.
    """
    starts: dict[str, int] = {}
    placed: list[_Placed] = []  # by start
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        num_bytes, taken = round_up(sizes[name]), _taken(lifetimes[name])
        start = _tightest_gap([other for other in placed if other.taken & taken], num_bytes)
        insort(placed, _Placed(start, start + num_bytes, taken), key=lambda each: each.start)
        starts[name] = start
    return starts, max((each.stop for each in placed), default=0)


def _taken(lifetimes: Sequence[Lifetime]) -> int:
    """A bit for each position at which a buffer is in use."""
    bits = 0
    for first, last in lifetimes:
        bits |= ((1 << (last - first + 1)) - 1) << first
    return bits


def most_alive_bytes(sizes: Mapping[str, int], lifetimes: Mapping[str, Sequence[Lifetime]]) -> int:
    """The most bytes that are alive at any position: no placement can need less."""
    changes: dict[int, int] = {}
    for name, spans in lifetimes.items():
        for first, last in spans:
            changes[first] = changes.get(first, 0) + round_up(sizes[name])
            changes[last + 1] = changes.get(last + 1, 0) - round_up(sizes[name])
    alive = most = 0
    for position in sorted(changes):
        alive += changes[position]
        most = max(most, alive)
    return most


def _tightest_gap(others: Sequence[_Placed], num_bytes: int) -> int:
    """Start of the smallest gap of at least `num_bytes` between `others` (sorted by start), or after the last."""
    best: tuple[int, int] | None = None
    end = 0
    for other in others:
        gap = other.start - end
        if gap >= num_bytes and (best is None or gap < best[0]):
            best = gap, end
        end = max(end, other.stop)
    return end if best is None else best[1]
