"""Finding a plan that fits into the host memory that there is.

Owns the order in which plans are tried, from the one that moves least to the leanest, and the refusal where none fits.
Does not own what a plan takes (`ledger.py`). It prefers, in this order: everything in memory; optimizer slots on disk;
parameters too; micro-batches taking turns unit by unit; recomputing as few units as it takes; less prefetch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ..memory.budget import format_bytes
from ..memory.errors import DoesNotFit
from .ledger import Ledger
from .plan import Activations, ChunkPlan, GatheredFor, Home, MicroBatchOrder, Plan, UpdateTime
from .program import Program

__all__ = ["Assessment", "Open", "choose", "offloaded"]


@dataclass(frozen=True, slots=True)
class Assessment:
    """A plan with what it takes."""

    plan: Plan
    program: Program
    ledger: Ledger


@dataclass(frozen=True, slots=True)
class Open:
    """What may be decided; the rest is fixed by the caller."""

    homes: bool
    activations: bool
    order: bool
    update: bool


def offloaded(chunk: ChunkPlan, parameters: Home, slots: Home) -> ChunkPlan:
    """A chunk's decision with other homes. Parameters that go to disk have no gathered copy that stays."""
    if parameters is Home.DISK and chunk.optimizer_sharded and chunk.gathered_for is GatheredFor.STEP:
        chunk = replace(chunk, gathered_for=GatheredFor.USE, gradients_sharded=True)
    return replace(chunk, parameter_home=parameters, optimizer_home=slots)


def choose(
    plan: Plan, open_: Open, num_units: int, budget_bytes: int, assess: Callable[[Plan], Assessment]
) -> Assessment:
    """The first plan that fits, with what is left of the budget spent on parameters that stay in memory.

    Args:
        plan: with everything that is fixed.
        open_: what is not.
        assess: compiles a plan and adds up its bytes.

    Raises:
        DoesNotFit: none fits; says what the leanest needs, and for what.
    """
    leanest: Assessment | None = None
    for candidate in _candidates(plan, open_, num_units):
        found = assess(candidate)
        if found.ledger.peak_bytes <= budget_bytes:
            found = _recompute_less(found, open_, budget_bytes, assess)
            return _cache_more(found, budget_bytes, assess)
        if leanest is None or found.ledger.peak_bytes < leanest.ledger.peak_bytes:
            leanest = found
    assert leanest is not None
    raise _refusal(leanest, open_, budget_bytes)


def _candidates(plan: Plan, open_: Open, num_units: int) -> Iterator[Plan]:
    homes = [(Home.HOST, Home.HOST), (Home.HOST, Home.DISK), (Home.DISK, Home.DISK)] if open_.homes else [None]
    activations = [plan.activations]
    if open_.activations:
        activations = [(), (Activations.RECOMPUTE,) * num_units]
    orders = [plan.order]
    if open_.order and plan.micro_batches > 1:
        orders = [MicroBatchOrder.SEQUENTIAL, MicroBatchOrder.BY_UNIT]
    seen: set[Plan] = set()
    for prefetch in sorted({plan.prefetch, min(plan.prefetch, 1), 0}, reverse=True):
        for activation in activations:
            for home in homes:
                for order in orders:
                    chunks = plan.chunks if home is None else tuple(offloaded(c, *home) for c in plan.chunks)
                    candidate = replace(plan, chunks=chunks, activations=activation, order=order, prefetch=prefetch)
                    if open_.update and not plan.clips_gradients and (candidate.uses_disk or candidate != plan):
                        candidate = replace(candidate, update=UpdateTime.BACKWARD)
                    if candidate not in seen:
                        seen.add(candidate)
                        yield candidate


def _recompute_less(
    found: Assessment, open_: Open, budget_bytes: int, assess: Callable[[Plan], Assessment]
) -> Assessment:
    """Recompute the first units only, as few as it takes: theirs are saved longest."""
    if not open_.activations or Activations.RECOMPUTE not in found.plan.activations:
        return found
    total = len(found.plan.activations)
    few, many = 0, total  # none do not fit, all do
    while many - few > 1:
        middle = (few + many) // 2
        words = (Activations.RECOMPUTE,) * middle + (Activations.KEEP,) * (total - middle)
        tried = assess(replace(found.plan, activations=words))
        if tried.ledger.peak_bytes <= budget_bytes:
            many, found = middle, tried
        else:
            few = middle
    return found


def _cache_more(found: Assessment, budget_bytes: int, assess: Callable[[Plan], Assessment]) -> Assessment:
    """Let parameters stay in memory with what is left of the budget."""
    if all(chunk.parameter_home is Home.HOST for chunk in found.plan.chunks):
        return found
    low = found.program.arena_bytes("host")
    high = low + budget_bytes - found.ledger.peak_bytes
    for _ in range(6):
        if high - low < 1 << 22:
            break
        tried = assess(replace(found.plan, cache_bytes=high))
        if tried.ledger.peak_bytes <= budget_bytes:
            return tried
        high = (low + high) // 2
    return found


def _refusal(leanest: Assessment, open_: Open, budget_bytes: int) -> DoesNotFit:
    ledger = leanest.ledger
    parts = ", ".join(
        f"{format_bytes(size)} {name}" for name, size in sorted(ledger.parts.items(), key=lambda part: -part[1]) if size
    )
    changes: list[str] = []
    if not open_.homes and not leanest.plan.uses_disk:
        changes.append("memory=Memory(disk='/a/folder') to let state go to disk")
    if leanest.plan.micro_batches == 1 or leanest.plan.order is MicroBatchOrder.BY_UNIT:
        changes.append("smaller micro-batches (a larger micro_batches=)")
    changes.append(f"a host budget of {format_bytes(ledger.peak_bytes)}")
    return DoesNotFit(
        f"no plan fits into the host budget of {format_bytes(budget_bytes)}: the leanest needs "
        f"{format_bytes(ledger.peak_bytes)}, {format_bytes(ledger.peak_bytes - budget_bytes)} more, at "
        f"{ledger.where}{_unit_words(leanest)} ({parts}). What helps: {'; or '.join(changes)}"
    )


def _unit_words(found: Assessment) -> str:
    return f" of a plan with {_describe(found.plan)}"


def _describe(plan: Plan) -> str:
    """A plan in a few words, for messages."""
    parts: Sequence[str] = [
        "parameters and optimizer on disk"
        if any(chunk.parameter_home is Home.DISK for chunk in plan.chunks)
        else "the optimizer on disk"
        if plan.uses_disk
        else "everything in memory",
        f"{sum(word is Activations.RECOMPUTE for word in plan.activations)} units recomputed",
        f"micro-batches {plan.order}",
    ]
    return ", ".join(parts)
