"""Choosing a plan: candidates over everything that is open, those that do not fit left out, the rest simulated.

Owns the space, the order in which it is looked through, and what became of every candidate. Does not own what a plan
takes (`ledger.py`), nor its seconds (`cost.py`, `simulate.py`): the caller's `assess` and `predict` say that.

    residency      everything in memory (on a device with memory of its own, or on its host); optimizer slots on disk;
                   parameters too
    activations    kept; recomputed; where neither is best, the exact choice for several shares of the budget
    order          micro-batches one by one, or unit by unit
    update         after the backward pass, or inside it
    prefetch       0, 1, 2, 4 units ahead
    cache          what is left of the budget keeps parameters in memory

The space is bounded by count and not by a clock, so that the same figures always give the same plan.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ..memory.budget import format_bytes
from ..memory.errors import DoesNotFit
from .fit import Assessment, Open, offloaded
from .plan import Activations, Home, MicroBatchOrder, Plan, UpdateTime

__all__ = ["Candidate", "Found", "describe", "search"]

_PREFETCH = (0, 1, 2, 4)
_MOST_SIMULATED = 48
_SHARES = (1.0, 0.75, 0.5)  # of the room for activations, for the exact choice


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan and its fate.

    Attributes:
        peak_bytes: at its fullest moment, on the host.
        seconds: of a step, as predicted; None where it was not simulated.
        fate: "chosen", "slower by 12%", or why it was refused.
    """

    plan: Plan
    peak_bytes: int
    seconds: float | None
    fate: str


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        best: the plan, its program and bytes.
        candidates: all of them, the fastest first, then those that were refused.
    """

    best: Assessment
    candidates: tuple[Candidate, ...]

    @property
    def seconds(self) -> float:
        """Of a step of the best plan, as predicted."""
        seconds = self.candidates[0].seconds
        assert seconds is not None
        return seconds


def search(
    plan: Plan,
    open_: Open,
    num_units: int,
    budget_bytes: int,
    assess: Callable[[Plan], Assessment],
    predict: Callable[[Assessment], float],
    activations: Callable[[Plan, int], Sequence[Activations] | None] = lambda plan, room_bytes: None,
    device_bytes: int | None = None,
) -> Found:
    """The fastest plan that fits.

    Args:
        plan: with everything that is fixed.
        open_: what is not.
        assess: compiles a plan and adds up its bytes.
        predict: seconds of a step.
        activations: f(plan, bytes that activations may take) -> a policy for each unit, the fastest within these bytes.
        device_bytes: of a device with memory of its own.

    Raises:
        DoesNotFit: none fits; says what the leanest needs, and for what.
    """
    fitting: list[Assessment] = []
    refused: list[Candidate] = []
    leanest: tuple[tuple[int, int], Assessment] | None = None  # bytes that it lacks, and holds
    seen: set[Plan] = set()

    def consider(candidate: Plan) -> Assessment | None:
        nonlocal leanest
        if candidate in seen:
            return None
        seen.add(candidate)
        found = assess(candidate)
        peak = found.ledger.peak_bytes
        on_device = 0 if found.device is None else found.device.peak_bytes - (device_bytes or 0)
        lack = max(peak - budget_bytes, 0) + max(on_device, 0)
        if leanest is None or (lack, peak) < leanest[0]:
            leanest = (lack, peak), found
        if peak > budget_bytes:
            missing = format_bytes(peak - budget_bytes)
            refused.append(Candidate(candidate, peak, None, f"refused: {missing} too much at {found.ledger.where}"))
        elif found.device is not None and on_device > 0:
            fate = f"refused: {format_bytes(on_device)} too much on the device at {found.device.where}"
            refused.append(Candidate(candidate, peak, None, fate))
        else:
            fitting.append(found)
        return found

    for kept in _candidates(plan, open_, num_units):
        found = consider(kept)
        if found is None or not open_.activations:
            continue
        everywhere = consider(replace(kept, activations=(Activations.RECOMPUTE,) * num_units))
        if found.ledger.peak_bytes <= budget_bytes or everywhere is None:
            continue
        if everywhere.ledger.peak_bytes <= budget_bytes:
            for policy in _between(kept, found, everywhere, num_units, budget_bytes, assess, activations):
                consider(replace(kept, activations=policy))
    if not fitting:
        assert leanest is not None
        raise _refusal(leanest[1], open_, budget_bytes, device_bytes)
    return _simulated(_with_cache(fitting, budget_bytes, assess), refused, predict)


def _candidates(plan: Plan, open_: Open, num_units: int) -> Iterator[Plan]:
    """Everything that is open, with activations kept where these are open too."""
    orders = list(MicroBatchOrder) if open_.order and plan.micro_batches > 1 else [plan.order]
    updates = [plan.update]
    if open_.update and not plan.clips_gradients:
        updates = list(UpdateTime)
    homes = [None]
    if open_.homes:
        homes = [] if plan.unified else [(Home.DEVICE, Home.DEVICE)]
        homes += [(Home.HOST, Home.HOST)]
        homes += [(Home.HOST, Home.DISK), (Home.DISK, Home.DISK)] if open_.disk else []
    for home in homes:
        chunks = plan.chunks if home is None else tuple(offloaded(chunk, *home) for chunk in plan.chunks)
        base = replace(plan, chunks=chunks, activations=() if open_.activations else plan.activations)
        moves = base.uses_disk or base.world_size > 1 or not base.unified
        ahead = _PREFETCH if moves else (plan.prefetch,)
        for order in orders:
            for update in updates:
                for prefetch in ahead:
                    yield replace(base, order=order, update=update, prefetch=prefetch)


def _between(
    plan: Plan,
    kept: Assessment,
    recomputed: Assessment,
    num_units: int,
    budget_bytes: int,
    assess: Callable[[Plan], Assessment],
    activations: Callable[[Plan, int], Sequence[Activations] | None],
) -> Iterator[tuple[Activations, ...]]:
    """Policies that recompute some units only: the exact choice for the room that there is, and the first few units as
    far as it takes, since theirs are saved longest."""
    others = recomputed.ledger.peak_bytes - recomputed.ledger.parts.get("activations", 0)
    room = max(budget_bytes - others, 0) // (plan.micro_batches if plan.order is MicroBatchOrder.BY_UNIT else 1)
    for share in _SHARES:
        policy = activations(plan, int(room * share))
        if policy is not None:
            yield tuple(policy)
    few, many = 0, num_units  # none do not fit, all do
    while many - few > 1:
        middle = (few + many) // 2
        words = (Activations.RECOMPUTE,) * middle + (Activations.KEEP,) * (num_units - middle)
        if assess(replace(plan, activations=words)).ledger.peak_bytes <= budget_bytes:
            many = middle
        else:
            few = middle
    yield (Activations.RECOMPUTE,) * many + (Activations.KEEP,) * (num_units - many)


def _with_cache(
    fitting: Sequence[Assessment], budget_bytes: int, assess: Callable[[Plan], Assessment]
) -> list[Assessment]:
    """Where parameters are on disk, also the plan that keeps as many in memory as fit."""
    result = list(fitting)
    for found in fitting:
        if all(chunk.parameter_home is not Home.DISK for chunk in found.plan.chunks):
            continue
        low = found.program.arena_bytes("host")
        high = low + budget_bytes - found.ledger.peak_bytes
        for _ in range(4):
            if high - low < 1 << 22:
                break
            tried = assess(replace(found.plan, cache_bytes=high))
            if tried.ledger.peak_bytes <= budget_bytes:
                result.append(tried)
                break
            high = (low + high) // 2
    return result


def _simulated(
    fitting: Sequence[Assessment], refused: Sequence[Candidate], predict: Callable[[Assessment], float]
) -> Found:
    """The fastest; of equals, the one with the smallest peak, then the one that came first."""
    tried = fitting[:_MOST_SIMULATED]
    order = sorted(
        ((predict(found), found.ledger.peak_bytes, number) for number, found in enumerate(tried)),
        key=lambda each: (round(each[0], 6), *each[1:]),
    )
    best_s = order[0][0]
    candidates = [
        Candidate(
            tried[number].plan,
            peak,
            seconds,
            "chosen" if not place else f"slower by {100 * (seconds / best_s - 1):.0f}%",
        )
        for place, (seconds, peak, number) in enumerate(order)
    ]
    rest = [
        Candidate(found.plan, found.ledger.peak_bytes, None, f"not tried: {_MOST_SIMULATED} others came before it")
        for found in fitting[_MOST_SIMULATED:]
    ]
    return Found(tried[order[0][2]], (*candidates, *rest, *refused))


def _refusal(leanest: Assessment, open_: Open, host_bytes: int, device_bytes: int | None) -> DoesNotFit:
    tier, ledger, budget_bytes = "host", leanest.ledger, host_bytes
    if leanest.device is not None and leanest.ledger.peak_bytes <= host_bytes:
        tier, ledger, budget_bytes = "device", leanest.device, device_bytes or 0
    parts = ", ".join(
        f"{format_bytes(size)} {name}" for name, size in sorted(ledger.parts.items(), key=lambda part: -part[1]) if size
    )
    changes: list[str] = []
    if not open_.homes and not leanest.plan.uses_disk:
        changes.append("memory=Memory(disk='/a/folder') to let state go to disk")
    if leanest.plan.micro_batches == 1 or leanest.plan.order is MicroBatchOrder.BY_UNIT:
        changes.append("smaller micro-batches (a larger micro_batches=)")
    changes.append(f"a {tier} budget of {format_bytes(ledger.peak_bytes)}")
    return DoesNotFit(
        f"no plan fits into the {tier} budget of {format_bytes(budget_bytes)}: the leanest needs "
        f"{format_bytes(ledger.peak_bytes)}, {format_bytes(ledger.peak_bytes - budget_bytes)} more, at "
        f"{ledger.where} of a plan with {describe(leanest.plan)} ({parts}). What helps: {'; or '.join(changes)}"
    )


def describe(plan: Plan) -> str:
    """A plan in a few words, for tables and messages."""
    in_memory = "everything in memory"
    if not plan.unified:
        num_host = sum(chunk.parameter_home is not Home.DEVICE for chunk in plan.chunks)
        in_memory = f"{num_host} of {len(plan.chunks)} chunks on the host" if num_host else "everything on the device"
    num_recomputed = sum(word is Activations.RECOMPUTE for word in plan.activations)
    num_moved = sum(word.is_offloaded for word in plan.activations)
    parts = [
        "parameters and optimizer on disk"
        if any(chunk.parameter_home is Home.DISK for chunk in plan.chunks)
        else "the optimizer on disk"
        if any(chunk.optimizer_home is Home.DISK for chunk in plan.chunks)
        else in_memory,
        f"{num_recomputed} units recomputed" + (f", {num_moved} offloaded" if num_moved else ""),
    ]
    if plan.micro_batches > 1:
        parts.append(f"micro-batches {plan.order}")
    parts.append("updates in the backward pass" if plan.update is UpdateTime.BACKWARD else "updates after it")
    if plan.uses_disk or plan.world_size > 1:
        parts.append(f"prefetch {plan.prefetch}")
    if plan.cache_bytes:
        parts.append(f"{format_bytes(plan.cache_bytes)} of parameters stay")
    return ", ".join(parts)
