"""The fewest bytes that steps of one order can read: what a program's reads are held against.

Owns the offline optimum where slots may be kept in part, which takes a walk instead of a search. Does not own the moves
of a program (`moves.py`), nor the optimum over whole slots (there, exponential).

A byte is kept from one use to the next or read again. Of the bytes that are not in use, those whose next use is
farthest away go first (Belady): with bytes as pages all of one size that is optimal, so no program in as much memory
can read less, whatever it prefetches and whether it can cut slots or not. What an update changed is written, and may
stay.
"""

from collections.abc import Sequence

from ..parallel.actions import Action
from .moves import Item, Needs, item_bytes, items_of
from .plan import Plan
from .program import StepShape

__all__ = ["least_read_bytes"]

_NUM_STEPS = 3  # from the second on a step finds what the one before it left


def least_read_bytes(
    actions: Sequence[Action], shape: StepShape, plan: Plan, capacity_bytes: int, needs_of: Needs = items_of
) -> int:
    """Of a step among many equal ones.

    Args:
        actions: of the step; moves among them are passed over.
        capacity_bytes: of memory for slots whose home is farther away.

    Raises:
        ValueError: one action alone needs more than that.
    """
    uses = [items for action in actions if (items := needs_of(action, shape, plan))]
    sizes = {item: item_bytes(item, shape) for items in uses for item in items}
    largest = max((sum(sizes[item] for item in items) for items in uses), default=0)
    if largest > capacity_bytes:
        raise ValueError(f"an action needs {largest:,} bytes of slots, and there is room for {capacity_bytes:,}")
    return _reads(uses * _NUM_STEPS, sizes, capacity_bytes) - _reads(uses * (_NUM_STEPS - 1), sizes, capacity_bytes)


def _reads(uses: Sequence[Sequence[Item]], sizes: dict[Item, int], capacity_bytes: int) -> int:
    next_use = _next_uses(uses)
    held: dict[Item, int] = {}  # item -> bytes of it
    follows: dict[Item, int] = {}  # item -> its next use
    num_bytes = 0
    for number, items in enumerate(uses):
        num_bytes += sum(sizes[item] - held.get(item, 0) for item in items)
        held.update({item: sizes[item] for item in items})
        follows.update({item: next_use[number, item] for item in items})
        excess = sum(held.values()) - capacity_bytes
        for item in sorted(held.keys() - set(items), key=lambda item: (-follows[item], item)):
            if excess <= 0:
                break
            gone = min(excess, held[item])
            held[item] -= gone
            excess -= gone
    return num_bytes


def _next_uses(uses: Sequence[Sequence[Item]]) -> dict[tuple[int, Item], int]:
    """(number of a use, item in it) -> number of the use in which it comes again; beyond all where it does not."""
    found: dict[tuple[int, Item], int] = {}
    last: dict[Item, int] = {}
    for number in reversed(range(len(uses))):
        for item in uses[number]:
            found[number, item] = last.get(item, len(uses))
        last.update(dict.fromkeys(uses[number], number))
    return found
