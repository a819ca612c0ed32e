"""Finding a plan that fits into the memory that there is.

Owns the order in which plans are tried, from the one that moves least to the leanest, and the refusal where none fits.
Does not own what a plan takes (`ledger.py`, `device_ledger.py`). It prefers, in this order: everything in memory (on a
device with memory of its own: on the device; then on the host, but for as many chunks as it takes); optimizer slots on
disk; parameters too; micro-batches taking turns unit by unit; activations on the host of such a device; recomputing as
few units as it takes; less prefetch.
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
    """A plan with what it takes: of the host, and of a device with memory of its own."""

    plan: Plan
    program: Program
    ledger: Ledger
    device: Ledger | None = None


@dataclass(frozen=True, slots=True)
class Open:
    """What may be decided; the rest is fixed by the caller. `disk`: whether homes on disk are among the choices."""

    homes: bool
    activations: bool
    order: bool
    update: bool
    disk: bool = True


@dataclass(frozen=True, slots=True)
class _Budgets:
    host: int
    device: int | None

    def lack_bytes(self, found: Assessment) -> int:
        """What is missing on both tiers together; 0 where the plan fits."""
        device = 0 if found.device is None else found.device.peak_bytes - (self.device or 0)
        return max(found.ledger.peak_bytes - self.host, 0) + max(device, 0)

    def fit(self, found: Assessment) -> bool:
        return self.lack_bytes(found) == 0


def offloaded(chunk: ChunkPlan, parameters: Home, slots: Home) -> ChunkPlan:
    """A chunk's decision with other homes. Parameters that go to disk have no gathered copy that stays."""
    if parameters is Home.DISK and chunk.optimizer_sharded and chunk.gathered_for is GatheredFor.STEP:
        chunk = replace(chunk, gathered_for=GatheredFor.USE, gradients_sharded=True)
    return replace(chunk, parameter_home=parameters, optimizer_home=slots)


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
    budgets = _Budgets(budget_bytes, device_bytes)
    leanest: Assessment | None = None
    for candidate in _candidates(plan, open_, num_units):
        found = assess(candidate)
        if budgets.fit(found):
            found = _recompute_less(found, open_, budgets, assess)
            found = _keep_more_on_device(found, open_, budgets, assess)
            return _cache_more(found, budgets, assess)
        if leanest is None or _leanness(found, budgets) < _leanness(leanest, budgets):
            leanest = found
    assert leanest is not None
    raise _refusal(leanest, open_, budgets)


def _leanness(found: Assessment, budgets: _Budgets) -> tuple[int, int]:
    return budgets.lack_bytes(found), found.ledger.peak_bytes


def _candidates(plan: Plan, open_: Open, num_units: int) -> Iterator[Plan]:
    homes = [None]
    if open_.homes:
        homes = [] if plan.unified else [(Home.DEVICE, Home.DEVICE)]
        homes += [(Home.HOST, Home.HOST)]
        homes += [(Home.HOST, Home.DISK), (Home.DISK, Home.DISK)] if open_.disk else []
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
    found: Assessment, open_: Open, budgets: _Budgets, assess: Callable[[Plan], Assessment]
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


def _keep_more_on_device(
    found: Assessment, open_: Open, budgets: _Budgets, assess: Callable[[Plan], Assessment]
) -> Assessment:
    """Let the first chunks be at home on the device, as many as fit there."""
    plan = found.plan
    if plan.unified or not open_.homes or all(chunk.parameter_home is Home.DEVICE for chunk in plan.chunks):
        return found
    here = tuple(offloaded(chunk, Home.DEVICE, Home.DEVICE) for chunk in plan.chunks)
    few, many = 0, len(plan.chunks)  # none is what was found, all do not fit
    while many - few > 1:
        middle = (few + many) // 2
        tried = assess(replace(plan, chunks=here[:middle] + plan.chunks[middle:]))
        if budgets.fit(tried):
            few, found = middle, tried
        else:
            many = middle
    return found


def _cache_more(found: Assessment, budgets: _Budgets, assess: Callable[[Plan], Assessment]) -> Assessment:
    """Let parameters stay in memory from use to use with what is left of the budget."""
    if found.device is not None and any(found.plan.brings_up(chunk) for chunk in range(len(found.plan.chunks))):
        spare = (budgets.device or 0) - found.device.peak_bytes
        found = _grown(found, "device_cache_bytes", found.program.arena_bytes("device"), spare, budgets, assess)
    if any(chunk.parameter_home is Home.DISK for chunk in found.plan.chunks):
        spare = budgets.host - found.ledger.peak_bytes
        found = _grown(found, "cache_bytes", found.program.arena_bytes("host"), spare, budgets, assess)
    return found


def _grown(
    found: Assessment,
    name: str,
    low: int,
    spare: int,
    budgets: _Budgets,
    assess: Callable[[Plan], Assessment],
) -> Assessment:
    """With the largest cache that fits, of those between what the arena takes anyway and all that is spare."""
    high = low + spare
    for _ in range(6):
        if high - low < 1 << 22:
            break
        tried = assess(replace(found.plan, **{name: high}))  # pyright: ignore[reportArgumentType]
        if budgets.fit(tried):
            return tried
        high = (low + high) // 2
    return found


def _refusal(leanest: Assessment, open_: Open, budgets: _Budgets) -> DoesNotFit:
    tier, ledger, budget_bytes = "host", leanest.ledger, budgets.host
    if leanest.device is not None and ledger.peak_bytes <= budgets.host:
        tier, ledger, budget_bytes = "device", leanest.device, budgets.device or 0
    parts = ", ".join(
        f"{format_bytes(size)} {name}" for name, size in sorted(ledger.parts.items(), key=lambda part: -part[1]) if size
    )
    changes: list[str] = []
    if tier == "host" and not leanest.plan.uses_disk and not (open_.homes and open_.disk):
        changes.append("memory=Memory(disk='/a/folder') to let state go to disk")
    if leanest.plan.micro_batches == 1 or leanest.plan.order is MicroBatchOrder.BY_UNIT:
        changes.append("smaller micro-batches (a larger micro_batches=)")
    changes.append(f"a {tier} budget of {format_bytes(ledger.peak_bytes)}")
    return DoesNotFit(
        f"no plan fits into the {tier} budget of {format_bytes(budget_bytes)}: the leanest needs "
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
        if any(chunk.optimizer_home is Home.DISK for chunk in plan.chunks)
        else "everything on the host"
        if any(plan.brings_up(chunk) for chunk in range(len(plan.chunks)))
        else "everything in memory",
        f"{sum(word is Activations.RECOMPUTE for word in plan.activations)} units recomputed",
        f"micro-batches {plan.order}",
    ]
    return ", ".join(parts)
