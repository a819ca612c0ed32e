"""Offsets for buffers whose lifetimes are known beforehand: several buffers share bytes where they never meet.

Owns the placement, a pure function. Does not own the bytes (a tier's arena is one `AlignedBuffer`) nor the order that
keeps two buffers in the same bytes apart at run time (`scheduler/passes.py` makes dependencies of it).

The buffers are placed one after the other, each into the tightest gap between those already placed that it meets in
time: in decreasing size (ALGORITHMS 3.7), which mostly comes within a few percent of the most bytes that are ever alive
together. Where it does not, other orders are tried, and the one that needs the fewest bytes is taken: a buffer that is
in use several times has the same place every time, and one order's gaps are another's fits. Nothing fragments at run
time: nothing is allocated then.
"""

import random
from bisect import insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .direct_io import round_up

__all__ = ["Lifetime", "most_alive_bytes", "place_buffers"]

Lifetime = tuple[int, int]
"""First and last position in a program, both included."""

_NEAR = 1.02  # of the most bytes alive together: not worth another try
_NUM_SHUFFLED = 20


@dataclass(frozen=True, slots=True)
class _Placed:
    start: int
    stop: int
    taken: int


def place_buffers(sizes: Mapping[str, int], lifetimes: Mapping[str, Sequence[Lifetime]]) -> tuple[dict[str, int], int]:
    """An offset for every buffer, in bytes, a multiple of 4096; and the bytes that all of them need.

    Args:
        sizes: buffer -> bytes.
        lifetimes: buffer -> when it is in use; it has the same offset every time. Others' do not matter.
    """
    lifetimes = {name: lifetimes[name] for name in sizes}
    taken = {name: _taken(spans) for name, spans in lifetimes.items()}
    enough_bytes = _NEAR * most_alive_bytes(sizes, lifetimes)
    best: tuple[dict[str, int], int] | None = None
    for order in _orders(sizes, lifetimes):
        found = _placed(sorted(sizes, key=order), sizes, taken)
        if best is None or found[1] < best[1]:
            best = found
        if best[1] <= enough_bytes:
            break
    assert best is not None
    return best


def _orders(
    sizes: Mapping[str, int], lifetimes: Mapping[str, Sequence[Lifetime]]
) -> Iterator[Callable[[str], tuple[float | str, ...]]]:
    """Sort keys of the orders that are tried: the largest first, of equals by name, by their last or first use; what
    takes the most for long; the largest, but not quite. Seeded: every rank places alike."""
    yield lambda name: (-sizes[name], name)
    yield lambda name: (-sizes[name], -lifetimes[name][-1][1], name)
    yield lambda name: (-sizes[name], lifetimes[name][0][0], name)
    yield lambda name: (-sizes[name] * sum(last - first + 1 for first, last in lifetimes[name]), name)
    chance = random.Random(0)
    for _ in range(_NUM_SHUFFLED):
        weights = {name: sizes[name] * chance.uniform(0.3, 1.0) for name in sorted(sizes)}
        yield lambda name, weights=weights: (-weights[name], name)


def _placed(order: Sequence[str], sizes: Mapping[str, int], taken: Mapping[str, int]) -> tuple[dict[str, int], int]:
    starts: dict[str, int] = {}
    placed: list[_Placed] = []  # by start
    for name in order:
        num_bytes = round_up(sizes[name])
        start = _tightest_gap([other for other in placed if other.taken & taken[name]], num_bytes)
        insort(placed, _Placed(start, start + num_bytes, taken[name]), key=lambda each: each.start)
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
