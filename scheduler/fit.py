"""Finding a plan that fits into the memory that there is.

Owns the order in which plans are tried, from the one that moves least to the leanest, and the refusal where none fits.
Does not own what a plan takes (`ledger.py`, `device_ledger.py`). It prefers, in this order: everything in memory (on a
device with memory of its own: on the device; then on the host, but for as many chunks as it takes); optimizer slots on
disk; parameters too; micro-batches taking turns unit by unit; activations on the host of such a device; recomputing as
few units as it takes; less prefetch.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from .assessment import Assessment, Budgets, Open, offloaded, refusal
from .plan import Activations, ChunkPlan, Home, MicroBatchOrder, Plan, UpdateTime
from .spare import FAR, cache_more, keep_more_nearer, read_farther

__all__ = ["choose", "homes_of"]


def choose(
    plan: Plan,
    open_: Open,
    num_units: int,
    budget_bytes: int,
    assess: Callable[[Plan], Assessment],
    device_bytes: int | None = None,
) -> Assessment:
    """The first plan that fits, with what is left of the budget spent on parameters that stay in memory.

    Args:
        plan: with everything that is fixed.
        open_: what is not.
        budget_bytes: of the host.
        assess: compiles a plan and adds up its bytes.
        device_bytes: of a device with memory of its own.

    Raises:
        DoesNotFit: none fits; says what the leanest needs, and for what.
    """
    budgets = Budgets(budget_bytes, device_bytes)
    leanest: Assessment | None = None
    for candidate in _candidates(plan, open_, num_units):
        found = assess(candidate)
        if budgets.fit(found):
            found = _recompute_less(found, open_, budgets, assess)
            if open_.homes:
                found = keep_more_nearer(found, budgets, assess)
            if found.plan.uses_disk and found.plan.prefetch < FAR:
                found = read_farther(found, FAR, budgets, assess) or found
            return cache_more(found, budgets, assess)
        if leanest is None or _leanness(found, budgets) < _leanness(leanest, budgets):
            leanest = found
    assert leanest is not None
    raise refusal(leanest, open_, budgets)


def _leanness(found: Assessment, budgets: Budgets) -> tuple[int, int]:
    return budgets.lack_bytes(found), found.ledger.peak_bytes


def homes_of(plan: Plan, open_: Open) -> list[tuple[ChunkPlan, ...]]:
    """Decisions for all chunks alike that differ in where they are at home, from the nearest tier to the farthest."""
    if not open_.homes:
        return [plan.chunks]
    homes = [] if plan.unified else [(Home.DEVICE, Home.DEVICE)]
    homes += [(Home.HOST, Home.HOST)]
    homes += [(Home.HOST, Home.DISK), (Home.DISK, Home.DISK)] if open_.disk else []
    return [tuple(offloaded(chunk, *home) for chunk in plan.chunks) for home in homes]


def _candidates(plan: Plan, open_: Open, num_units: int) -> Iterator[Plan]:
    activations = [plan.activations]
    if open_.activations:
        words = [] if plan.unified else [Activations.OFFLOAD_HOST]
        activations = [(), *((word,) * num_units for word in (*words, Activations.RECOMPUTE))]
    orders = [plan.order]
    if open_.order and plan.micro_batches > 1:
        orders = [MicroBatchOrder.SEQUENTIAL, MicroBatchOrder.BY_UNIT]
    seen: set[Plan] = set()
    for prefetch in sorted({plan.prefetch, min(plan.prefetch, 1), 0}, reverse=True):
        for activation in activations:
            for chunks in homes_of(plan, open_):
                for order in orders:
                    candidate = replace(plan, chunks=chunks, activations=activation, order=order, prefetch=prefetch)
                    if open_.update and not plan.clips_gradients and (candidate.uses_disk or candidate != plan):
                        candidate = replace(candidate, update=UpdateTime.BACKWARD)
                    if candidate not in seen:
                        seen.add(candidate)
                        yield candidate


def _recompute_less(
    found: Assessment, open_: Open, budgets: Budgets, assess: Callable[[Plan], Assessment]
) -> Assessment:
    """Recompute (or move the activations of) the first units only, as few as it takes: theirs are saved longest."""
    if not open_.activations or not found.plan.activations:
        return found
    word = found.plan.activations[0]
    total = len(found.plan.activations)
    few, many = 0, total  # none do not fit, all do
    while many - few > 1:
        middle = (few + many) // 2
        words = (word,) * middle + (Activations.KEEP,) * (total - middle)
        tried = assess(replace(found.plan, activations=words))
        if budgets.fit(tried):
            many, found = middle, tried
        else:
            few = middle
    return found
