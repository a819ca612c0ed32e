"""What is left of the budgets, spent: chunks at home on a nearer tier, reads that come earlier, parameters that stay.

Owns growing a plan that fits until it would not, or at once where all of it fits. Does not own what a plan takes, nor
which plan is grown.
"""

from collections.abc import Callable
from dataclasses import replace

from ..memory.direct_io import round_up
from .assessment import Assessment, Budgets, Open, offloaded
from .plan import Home, Plan
from .program import StepShape

__all__ = ["FAR", "cache_more", "keep_more_nearer", "read_farther", "without_bounds"]

FAR = 2  # uses to read ahead: an update, and the unit behind it
_SPENT = 0.97  # of the host's budget: a plan that is run again meets a process of a slightly other size
_GRAIN_BYTES = 1 << 22  # less than that is not worth a try
_NUM_TRIES = 6


def keep_more_nearer(found: Assessment, budgets: Budgets, assess: Callable[..., Assessment]) -> Assessment:
    """Let the first chunks be at home nearer, as many as fit there: on a device with memory of its own, or in memory
    where they are on disk."""
    budgets = _to_spend(budgets)
    plan = found.plan
    nearer = _nearer(plan)
    if nearer is None:
        return found
    here = tuple(offloaded(chunk, *nearer) for chunk in plan.chunks)
    few, many = 0, len(plan.chunks)  # none is what was found, all do not fit
    while many - few > 1:
        middle = (few + many) // 2
        tried = assess(replace(plan, chunks=here[:middle] + plan.chunks[middle:]))
        if budgets.fit(tried):
            few, found = middle, tried
        else:
            many = middle
    return found


def _nearer(plan: Plan) -> tuple[Home, Home] | None:
    """Homes of parameters and slots that are one step nearer than those that chunks have; None: they are all there."""
    if not plan.unified:
        is_there = all(chunk.parameter_home is Home.DEVICE for chunk in plan.chunks)
        return None if is_there else (Home.DEVICE, Home.DEVICE)
    if all(chunk.optimizer_home is Home.HOST for chunk in plan.chunks):
        return None
    return Home.HOST, Home.HOST


def cache_more(found: Assessment, budgets: Budgets, assess: Callable[..., Assessment]) -> Assessment:
    """Let parameters stay in memory from use to use with what is left of the budget."""
    budgets = _to_spend(budgets)
    if found.device is not None and any(found.plan.brings_up(chunk) for chunk in range(len(found.plan.chunks))):
        spare = (budgets.device or 0) - found.device.peak_bytes
        found = _grown(found, "device_cache_bytes", found.program.arena_bytes("device"), spare, budgets, assess)
    if any(chunk.parameter_home is Home.DISK for chunk in found.plan.chunks):
        spare = budgets.host - found.ledger.peak_bytes
        found = _grown(found, "cache_bytes", found.program.arena_bytes("host"), spare, budgets, assess)
    return found


def read_farther(
    found: Assessment, distance: int, budgets: Budgets, assess: Callable[..., Assessment]
) -> Assessment | None:
    """The plan with reads `distance` uses ahead, as far as the host's budget allows; None where that is nowhere.

    Where the fullest moment would not fit, the bytes for what moves are bounded: there, and only there, it comes later.
    """
    budgets = _to_spend(budgets)
    spare_bytes = budgets.host - found.ledger.peak_bytes
    bound = found.program.arena_bytes("host") + spare_bytes
    for _ in range(_NUM_TRIES):
        tried = assess(replace(found.plan, prefetch=distance, cache_bytes=max(bound, 1)))
        if budgets.fit(tried):
            return tried
        excess_bytes = tried.ledger.peak_bytes - budgets.host
        if excess_bytes <= 0 or bound <= 0:  # it is not the host that it does not fit into, or no bound helps
            return None
        bound -= max(excess_bytes, _GRAIN_BYTES, bound // 16)
    return None


def without_bounds(plan: Plan, open_: Open, shape: StepShape) -> Plan:
    """The plan in memory that takes all that it could ever hold: reads come `FAR` uses ahead, and what was brought
    stays until its last use in a step. A plan that was given whole stays as it is."""
    if not plan.uses_disk or not open_.may_adapt:
        return plan
    state_bytes = sum(round_up(chunk.param_bytes) + round_up(chunk.optim_bytes) for chunk in shape.chunks)
    saved_bytes = plan.micro_batches * sum(round_up(unit.saved_bytes) for unit in shape.units)
    return replace(plan, prefetch=max(plan.prefetch, FAR), cache_bytes=state_bytes + saved_bytes)


def _to_spend(budgets: Budgets) -> Budgets:
    return replace(budgets, host=int(budgets.host * _SPENT))


def _grown(
    found: Assessment, name: str, low: int, spare: int, budgets: Budgets, assess: Callable[..., Assessment]
) -> Assessment:
    """With the largest cache that fits, of those between what the arena takes anyway and all that is spare."""
    high = low + spare
    for _ in range(_NUM_TRIES):
        if high - low < _GRAIN_BYTES:
            break
        tried = assess(replace(found.plan, **{name: high}))  # pyright: ignore[reportArgumentType]
        if budgets.fit(tried):
            return tried
        high = (low + high) // 2
    return found
