"""When each action of a pipeline schedule runs, and what it holds: an event simulation.

Owns `simulate` and `Timing`. Every rank does its list in order, each action as soon as its inputs are there:

    F(s,j) after F(s-1,j);   I or B(s,j) after F(s,j) and after I or B(s+1,j);   W(s,j) after I(s,j)

plus `comm_s` where the two stages lie on different ranks (transfers run beside computation). `SAVE` and `LOAD` share
one copy lane per rank, in list order; each starts no earlier than the end of the action listed before it. Activations
are held from the start of F to the end of W or B; a `SAVE` frees them at its end, a `LOAD` takes them at its start.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter

from ..parallel.actions import Action, Kind
from .pipeline_data import Draft, Op, Schedule, ScheduleError, StageCosts, per_rank

__all__ = ["Score", "Times", "Timing", "peak_of", "score_of", "simulate", "times_of"]

F, B, I, W, R, SAVE, LOAD = Kind.F, Kind.B, Kind.I, Kind.W, Kind.R, Kind.SAVE, Kind.LOAD  # noqa: E741
_NEVER = -1.0
_micro_batch = itemgetter(2)
#: Starts and ends (seconds) of one rank's operations, in list order.
Times = list[tuple[float, float]]
#: (span in seconds, makespan in seconds, peak activations): what searches make small, the first before the others.
Score = tuple[float, float, float]


@dataclass(frozen=True)
class Timing:
    """A schedule with its times.

    Attributes:
        schedule: what was timed.
        times_s: (start, end) of every action, as in `schedule.orders`.
        work_s: seconds of computation of each rank.
        peak_activations: of each rank, in the unit of the costs.
    """

    schedule: Schedule
    times_s: tuple[tuple[tuple[float, float], ...], ...]
    work_s: tuple[float, ...]
    peak_activations: tuple[float, ...]

    @cached_property
    def makespan_s(self) -> float:
        """From the first start to the last end of all ranks."""
        return max(end for rank in self.times_s for _, end in rank)

    @cached_property
    def span_s(self) -> float:
        """The longest time from a rank's own first start to its own last end: the period of steps that are not
        synchronised (the figure of the zero-bubble papers)."""
        spans = [_compute_ends(o, list(t)) for o, t in zip(self.schedule.ops(), self.times_s, strict=True) if o]
        return max(last - first for first, last in spans)

    @property
    def bubble_s(self) -> float:
        """The span beyond the work of the busiest rank."""
        return self.span_s - max(self.work_s)

    @property
    def bubble_share(self) -> float:
        """The part of the span in which the busiest rank would do nothing."""
        return self.bubble_s / self.span_s if self.span_s else 0.0


def simulate(schedule: Schedule, costs: StageCosts | None = None) -> Timing:
    """Times of every action.

    Args:
        schedule: any, offloading or not.
        costs: of each stage, or of a number of stages that divides it (they are cut); equal ones when None.

    Raises:
        ScheduleError: no progress is possible; names what each stuck rank waits for.
        ValueError: costs of another number of stages.
    """
    p = schedule.num_ranks
    costs = (costs or StageCosts.equal(p)).split(schedule.num_stages)
    ops = schedule.ops()
    times = times_of(ops, schedule.placement, costs)
    num_times = schedule.num_micro_batches
    work = per_rank((t * num_times for t in costs.total_s), schedule.placement, p)
    if any(op[0] is R or (op[0] is B and costs.backward_s is not None) for order in ops for op in order):
        work = [
            sum(end - start for op, (start, end) in zip(order, rank_times, strict=True) if op[0].is_compute)
            for order, rank_times in zip(ops, times, strict=True)
        ]
    peaks = tuple(_peak(order, rank_times, costs) for order, rank_times in zip(ops, times, strict=True))
    return Timing(schedule, tuple(map(tuple, times)), tuple(work), peaks)


def times_of(orders: Sequence[Sequence[Op]], placement: Sequence[int], costs: StageCosts) -> list[Times]:
    """The same for plain tuples: the inner loop of every search.

    Raises:
        ScheduleError: no progress is possible.
    """
    num_stages = len(placement)
    last = num_stages - 1
    width = 1 + max((max(map(_micro_batch, order)) for order in orders if order), default=0)
    forward_end = [_NEVER] * (num_stages * width)
    backward_end = [_NEVER] * (num_stages * width)
    local_end: dict[Op, float] = {}  # R, SAVE and LOAD, which no other rank waits for
    input_s, weight_s, whole_s = costs.input_s, costs.weight_s, costs.whole_s
    forward_s, comm_s, copying_s = costs.forward_s, costs.comm_s, costs.copying_s
    times: list[Times] = [[] for _ in orders]
    clock = [0.0] * len(orders)
    copy_free = [0.0] * len(orders)
    waiting: dict[tuple[bool, int], int] = {}  # (forward?, stage * width + micro-batch) -> the rank that waits
    runnable = list(range(len(orders)))
    while runnable:
        rank = runnable.pop()
        order, done, now = orders[rank], times[rank], clock[rank]
        for position in range(len(done), len(order)):
            op = order[position]
            kind, stage, j = op
            cell = stage * width + j
            if kind is F:
                start = now
                if stage:
                    arrival = forward_end[cell - width]
                    if arrival < 0:
                        waiting[True, cell - width] = rank
                        break
                    if placement[stage - 1] != rank:
                        arrival += comm_s
                    if arrival > start:
                        start = arrival
                end = forward_end[cell] = start + forward_s[stage]
                if (woken := waiting.pop((True, cell), None)) is not None:
                    runnable.append(woken)
            elif kind is I or kind is B:
                start = now
                arrival = forward_end[cell]
                if arrival < 0:
                    break
                if stage != last:
                    arrival = backward_end[cell + width]
                    if arrival < 0:
                        waiting[False, cell + width] = rank
                        break
                    if placement[stage + 1] != rank:
                        arrival += comm_s
                if arrival > start:
                    start = arrival
                if local_end:
                    start = max(start, local_end.get((LOAD, stage, j), start))
                end = backward_end[cell] = start + (input_s if kind is I else whole_s)[stage]
                if (woken := waiting.pop((False, cell), None)) is not None:
                    runnable.append(woken)
            elif kind is W or kind is R:
                if (backward_end if kind is W else forward_end)[cell] < 0:
                    break
                start = max(now, local_end.get((LOAD, stage, j), now)) if local_end else now
                end = start + (weight_s if kind is W else forward_s)[stage]
            else:
                needed = forward_end[cell] if kind is SAVE else local_end.get((SAVE, stage, j), _NEVER)
                if needed < 0:
                    break
                start = max(now, needed, copy_free[rank])
                end = copy_free[rank] = local_end[op] = start + copying_s[stage]
                done.append((start, end))
                continue
            done.append((start, end))
            now = end
        clock[rank] = now
    if any(len(done) < len(order) for done, order in zip(times, orders, strict=True)):
        raise ScheduleError(_stuck(orders, times, num_stages))
    return times


def score_of(draft: Draft, costs: StageCosts, times: Sequence[Times] | None = None) -> Score:
    """(span, makespan, peak) of a draft, whose times are worked out unless they are given.

    Raises:
        ScheduleError: it cannot run.
    """
    if times is None:
        times = times_of(draft[1], draft[0], costs)
    span_s = makespan_s = peak = 0.0
    for order, rank_times in zip(draft[1], times, strict=True):
        if order:
            first, last = _compute_ends(order, rank_times)
            span_s, makespan_s = max(span_s, last - first), max(makespan_s, last)
            peak = max(peak, _peak(order, rank_times, costs))
    return round(span_s, 9), round(makespan_s, 9), peak


def peak_of(draft: Draft, costs: StageCosts) -> float:
    """Most activations of any rank, in the unit of the costs."""
    return score_of(draft, costs)[2]


def _compute_ends(order: Sequence[Op], times: Times) -> tuple[float, float]:
    """First start and last end of computation; copies may follow the last or precede the first."""
    first = next((span[0] for op, span in zip(order, times, strict=True) if op[0] not in (SAVE, LOAD)), 0.0)
    pairs = zip(reversed(order), reversed(times), strict=True)
    last = next((span[1] for op, span in pairs if op[0] not in (SAVE, LOAD)), 0.0)
    return first, last


def _stuck(orders: Sequence[Sequence[Op]], times: list[Times], num_stages: int) -> str:
    lines = []
    for rank, (order, done) in enumerate(zip(orders, times, strict=True)):
        if len(done) < len(order):
            kind, stage, j = order[len(done)]
            needs = [Action(F, stage - 1, j)] if kind is F else [Action(F, stage, j)]
            if kind in (I, B) and stage + 1 < num_stages:
                needs = [Action(F, stage, j), Action(I, stage + 1, j)]
            if kind is W:
                needs = [Action(I, stage, j)]
            lines.append(
                f"rank {rank} is stuck before {Action(kind, stage, j)}, which needs {' and '.join(map(str, needs))}"
            )
    return "deadlock: " + "; ".join(lines) + ". Put each action after what it needs."


def _peak(order: Sequence[Op], times: Times, costs: StageCosts) -> float:
    """Most activations held at once, by time; what ends at a moment is freed before what starts then."""
    held = costs.activations
    level = peak = 0.0
    for kind, stage, _ in order:  # without copies, by order is by time, and faster
        if kind is F:
            level += held[stage]
            if level > peak:
                peak = level
        elif kind is W or kind is B:
            level -= held[stage]
        elif kind is SAVE:
            break
    else:
        return round(peak, 9)
    events: list[tuple[float, int, float]] = []
    for (kind, stage, _), (start, end) in zip(order, times, strict=True):
        if kind is F or kind is LOAD:
            events.append((round(start, 9), 1, held[stage]))
        elif kind in (W, B, SAVE):
            events.append((round(end, 9), 0, -held[stage]))
    events.sort()
    level = peak = 0.0
    for _, _, change in events:
        level += change
        peak = max(peak, level)
    return round(peak, 9)
