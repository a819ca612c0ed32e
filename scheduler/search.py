"""Choosing a plan: candidates over everything that is open, those that do not fit left out, the rest simulated.

Owns the space, the order in which it is looked through, and what became of every candidate. Does not own what a plan
takes (`ledger.py`), nor its seconds (`cost.py`, `simulate.py`): the caller's `assess` and `predict` say that.

First everything that decides whether a plan fits, in all combinations:

    residency      everything in memory (on a device with memory of its own, or on its host); optimizer slots on disk;
                   parameters too
    order          micro-batches one by one, or unit by unit
    activations    kept; recomputed; where neither is best, the exact choice for several shares of the budget, and the
                   first few units as far as it takes

Then, for the fastest few residencies and orders, what decides how well they run:

    zero           on several ranks: what of the state they share, and whether gathered copies live from forward to
                   backward
    prefetch       0, 1, 2, 4 uses ahead, with activations as each of them leaves room for; and as far as the budget
                   allows, with what there is no room for read later
    update         after the backward pass, or inside it
    spare memory   chunks at home nearer, parameters that stay from use to use

The space is bounded by count and not by a clock, so that the same figures always give the same plan.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ..memory.budget import format_bytes
from .assessment import Assessment, Budgets, Open, against, refusal
from .fit import homes_of
from .plan import Activations, GatheredFor, Home, MicroBatchOrder, Plan, UpdateTime, with_zero
from .program import Lane
from .spare import cache_more, keep_more_nearer, read_farther

__all__ = ["Candidate", "Found", "search"]

_PREFETCH = (0, 1, 2, 4)
_NUM_REFINED = 2
_ALIKE, _ALIKE_S = 0.02, 1e-3  # predictions that differ by less say nothing
_SHARES = (1.0, 0.75, 0.5)  # of the room for activations, for the exact choice

Policies = Callable[[Plan, int], Sequence[Activations] | None]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan and its fate.

    Attributes:
        peak_bytes: at its fullest moment, on the host.
        seconds: of a step, as predicted; None where it was not simulated.
        fate: "chosen", "slower by 12%", "faster by 0.4%, moves 1.20 GiB more", or why it was refused.
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
        candidates: the best, then the others from the fastest on, then those that were refused.
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
    activations: Policies = lambda plan, room_bytes: None,
    device_bytes: int | None = None,
) -> Found:
    """The fastest plan that fits; of those that are alike within 2%, the one that moves the fewest bytes, and of these
    the one whose ranks share most.

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
    budgets = Budgets(budget_bytes, device_bytes)
    looked = _Looked(budgets, assess, predict)
    for base in _bases(plan, open_):
        _settle_somehow(base, open_, num_units, looked, activations)
    if not looked.seconds:
        raise refusal(looked.leanest(), open_, budgets)
    for base in looked.fastest_bases():
        for shared in _shared(base, open_):
            _settle(shared, open_, num_units, looked)
    for base in looked.fastest_bases():
        if base.uses_disk or any(chunk.parameters_sharded for chunk in base.chunks) or not base.unified:
            for ahead in sorted({*_PREFETCH, plan.prefetch} - {base.prefetch}):
                _settle(replace(base, prefetch=ahead), open_, num_units, looked)
    for base in looked.fastest_bases():
        for ahead in _PREFETCH[1:] if base.uses_disk else ():
            read_farther(looked.at(base), ahead, budgets, looked.at)
    for base in looked.fastest_bases():
        _refine(base, open_, looked)
    return looked.found()


class _Looked:
    """Every plan that was looked at: each is assessed once, and simulated once where it fits."""

    def __init__(
        self, budgets: Budgets, assess: Callable[[Plan], Assessment], predict: Callable[[Assessment], float]
    ) -> None:
        self.budgets, self._assess, self._predict = budgets, assess, predict
        self.all: dict[Plan, Assessment] = {}
        self.seconds: dict[Plan, float] = {}

    def at(self, plan: Plan) -> Assessment:
        if plan not in self.all:
            found = self.all[plan] = self._assess(plan)
            if self.budgets.fit(found):
                self.seconds[plan] = self._predict(found)
        return self.all[plan]

    def fits(self, plan: Plan) -> bool:
        return self.budgets.fit(self.at(plan))

    def leaves_room(self, plan: Plan) -> bool:
        """Whether what does not depend on activations and updates (process, state) fits alone."""
        parts = self.at(plan).ledger.parts
        return parts.get("process", 0) + parts.get("state", 0) <= self.budgets.host

    def ranked(self) -> list[Plan]:
        """Those that fit, the fastest first; of equals, the smaller peak, then the one looked at first."""
        return sorted(self.seconds, key=lambda plan: (round(self.seconds[plan], 6), self.all[plan].ledger.peak_bytes))

    def best(self) -> Plan:
        """Of those that no prediction can tell from the fastest, the one that moves the fewest bytes between tiers:
        what is not moved cannot be late. Of equal ones, the one that leaves most memory to spare: whose ranks share
        most."""
        ranked = self.ranked()
        fastest_s = self.seconds[ranked[0]]
        near = [plan for plan in ranked if self.seconds[plan] <= fastest_s + max(_ALIKE * fastest_s, _ALIKE_S)]
        return min(near, key=lambda plan: (self._moved_bytes(plan), -plan.zero))

    def _moved_bytes(self, plan: Plan) -> int:
        lanes = (Lane.READ, Lane.WRITE, Lane.H2D, Lane.D2H)
        return sum(each.num_bytes for each in self.all[plan].program.instructions if each.lane in lanes)

    def fastest_bases(self) -> list[Plan]:
        """The fastest plan of each of the fastest few residencies and orders."""
        best: dict[object, Plan] = {}
        for plan in self.ranked():
            best.setdefault((plan.chunks, plan.order), plan)
        return list(best.values())[:_NUM_REFINED]

    def alike(self, plan: Plan) -> list[Plan]:
        """Those that fit of the same residency and order."""
        return [each for each in self.seconds if (each.chunks, each.order) == (plan.chunks, plan.order)]

    def held_bytes(self, plan: Plan) -> int:
        """At the fullest moments of both tiers."""
        found = self.all[plan]
        return found.ledger.peak_bytes + (0 if found.device is None else found.device.peak_bytes)

    def leanest(self) -> Assessment:
        return min(self.all.values(), key=lambda each: (self.budgets.lack_bytes(each), each.ledger.peak_bytes))

    def found(self) -> Found:
        best = self.best()
        candidates = [Candidate(best, self.all[best].ledger.peak_bytes, self.seconds[best], "chosen")]
        for plan in self.ranked():
            if plan != best:
                found = self.all[plan]
                candidates.append(Candidate(plan, found.ledger.peak_bytes, self.seconds[plan], self._fate(plan, best)))
        for plan, each in self.all.items():
            if plan not in self.seconds:
                candidates.append(Candidate(plan, each.ledger.peak_bytes, None, self.budgets.fate(each)))
        return Found(self.all[best], tuple(candidates))

    def _fate(self, plan: Plan, best: Plan) -> str:
        ratio, more = self.seconds[plan] / self.seconds[best], self._moved_bytes(plan) - self._moved_bytes(best)
        if ratio < 1 and more:
            return f"faster by {100 * (1 - ratio):.1f}%, moves {format_bytes(more)} more"
        return against(self.seconds[plan], self.seconds[best])


def _bases(plan: Plan, open_: Open) -> Iterator[Plan]:
    """Every residency in every order, with activations kept where these are open too."""
    orders = list(MicroBatchOrder) if open_.order and plan.micro_batches > 1 else [plan.order]
    for chunks in homes_of(plan, open_):
        for order in orders:
            activations = () if open_.activations else plan.activations
            base = replace(plan, chunks=chunks, order=order, activations=activations)
            if open_.update and not plan.clips_gradients:
                base = replace(base, update=UpdateTime.BACKWARD if base.uses_disk else UpdateTime.AFTER)
            yield base


def _shared(base: Plan, open_: Open) -> Iterator[Plan]:
    """Other ways for ranks to share the state of a plan. Parameters on disk have no copy that could stay."""
    if not open_.zero or base.world_size == 1 or any(chunk.parameter_home is Home.DISK for chunk in base.chunks):
        return
    for zero in range(4):
        for gathered_for in (GatheredFor.USE, GatheredFor.PASS)[: 1 + (zero == 3)]:
            other = with_zero(base, zero, gathered_for)
            if other != base:
                yield other


def _settle_somehow(base: Plan, open_: Open, num_units: int, looked: _Looked, activations: Policies) -> None:
    """Look at the activation policies of one residency and order; where none fits, with updates inside the backward
    pass, which need no gradients of more than one unit, and without prefetch."""
    tries = [base]
    if open_.update and not base.clips_gradients and base.update is UpdateTime.AFTER:
        tries.append(replace(base, update=UpdateTime.BACKWARD))
    if base.uses_disk or base.world_size > 1 or not base.unified:
        tries += [replace(each, prefetch=0) for each in tries if each.prefetch]
    for each in tries:
        if _settle(each, open_, num_units, looked, activations) or not looked.leaves_room(each):
            return


def _settle(
    base: Plan, open_: Open, num_units: int, looked: _Looked, activations: Policies = lambda plan, room_bytes: None
) -> bool:
    """Look at the activation policies of a plan; says whether any fits.

    Where keeping all does not fit and recomputing all does, some units are recomputed only: by the exact choice for the
    room that there is, and the first few as far as it takes, since what they save is held longest.
    """
    kept = replace(base, activations=()) if open_.activations else base
    if looked.fits(kept):
        return True
    everywhere = replace(kept, activations=(Activations.RECOMPUTE,) * num_units)
    if not open_.activations or not looked.leaves_room(kept) or not looked.fits(everywhere):
        return False
    ledger = looked.at(everywhere).ledger
    others = ledger.peak_bytes - ledger.parts.get("activations", 0)
    num_alive = kept.micro_batches if kept.order is MicroBatchOrder.BY_UNIT else 1
    for share in _SHARES:
        policy = activations(kept, int(max(looked.budgets.host - others, 0) // num_alive * share))
        if policy is not None:
            looked.at(replace(kept, activations=tuple(policy)))
    few, many = 0, num_units  # none do not fit, all do
    while many - few > 1:
        middle = (few + many) // 2
        words = (Activations.RECOMPUTE,) * middle + (Activations.KEEP,) * (num_units - middle)
        if looked.fits(replace(kept, activations=words)):
            many = middle
        else:
            few = middle
    return True


def _refine(plan: Plan, open_: Open, looked: _Looked) -> None:
    """Look at the neighbours of a plan that fits: the other time of updates, and spare memory spent."""

    def better(best: Plan, tried: Plan) -> Plan:
        return tried if looked.fits(tried) and looked.seconds[tried] < looked.seconds[best] else best

    best = plan
    if open_.update and not plan.clips_gradients:
        best = better(best, replace(best, update=next(each for each in UpdateTime if each is not best.update)))
    if open_.homes:
        leanest = min(looked.alike(best), key=looked.held_bytes)
        for start in (best, leanest):
            best = better(best, keep_more_nearer(looked.at(start), looked.budgets, looked.at).plan)
    cache_more(looked.at(best), looked.budgets, looked.at)
