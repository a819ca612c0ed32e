"""Passes that improve a pipeline schedule on given times and under a memory limit: draft in, draft out.

    fill_weights   keeps the order of F and I, puts every W where the rank would wait, or where memory asks for it
    compact        moves actions into earlier gaps of their rank
    refine         the two in turn, and the best of what they give
    steady_state   a building block for measured times: each rank's actions of one micro-batch packed into one period

All are deterministic, and keep the micro-batches of each stage and kind in order.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heappop, heappush

from ..parallel.actions import Kind
from .pipeline_data import Draft, Op, StageCosts, per_rank
from .pipeline_timing import Times, score_of, times_of

__all__ = ["compact", "fill_weights", "refine", "steady_state"]

F, I, W = Kind.F, Kind.I, Kind.W  # noqa: E741
_UNKNOWN = float("inf")
_EPSILON = 1e-9
#: Passes of `refine`: one for schedules with many actions, where a pass takes tenths of a second.
_ROUNDS, _MANY_ACTIONS = 4, 3000


def fill_weights(draft: Draft, costs: StageCosts, limits: Sequence[float], patience: float = 1.0) -> Draft | None:
    """The draft with its W placed anew, in the order of their I.

    A W starts when the rank's next F or I would otherwise come later than `patience` times its seconds from now, or has
    no room. None if an order cannot run within the limits.
    """
    filled = _filled(draft, costs, limits, patience)
    return filled and filled[0]


def _filled(
    draft: Draft, costs: StageCosts, limits: Sequence[float], patience: float
) -> tuple[Draft, list[Times]] | None:
    """The draft of `fill_weights` and its times."""
    placement, orders = draft
    scripts = [[op for op in order if op[0] is not W] for order in orders]
    num_stages, num_ranks = len(placement), len(orders)
    held, comm_s = costs.activations, costs.comm_s
    caps = [limit * (1 + _EPSILON) + _EPSILON for limit in limits]
    m = 1 + max((op[2] for order in scripts for op in order), default=0)
    # When the inputs of F and I are there.
    forward_at = [[0.0 if stage == 0 else _UNKNOWN] * m for stage in range(num_stages)]
    backward_at = [[_UNKNOWN] * m for _ in range(num_stages)]
    position, used, free_at = [0] * num_ranks, [0.0] * num_ranks, [0.0] * num_ranks
    pending: list[list[Op]] = [[] for _ in range(num_ranks)]
    result: list[list[Op]] = [[] for _ in range(num_ranks)]
    times: list[Times] = [[] for _ in range(num_ranks)]
    events = [(0.0, rank) for rank in range(num_ranks)]
    while events:
        now, rank = heappop(events)
        if free_at[rank] > now + _EPSILON:
            continue
        script = scripts[rank]
        op = script[position[rank]] if position[rank] < len(script) else None
        arrival = _UNKNOWN
        if op is not None:
            if op[0] is I:
                arrival = backward_at[op[1]][op[2]]
            elif used[rank] + held[op[1]] <= caps[rank]:
                arrival = forward_at[op[1]][op[2]]
        if arrival > now + _EPSILON:
            queue = pending[rank]
            if queue and arrival - now >= patience * costs.weight_s[queue[0][1]] - _EPSILON:
                op = queue.pop(0)
            elif arrival < _UNKNOWN:
                heappush(events, (arrival, rank))
                continue
            else:
                continue
        else:
            position[rank] += 1
        assert op is not None
        kind, stage, j = op
        result[rank].append(op)
        target, following = forward_at, num_stages  # whose input this makes: a stage, or none
        if kind is W:
            end = now + costs.weight_s[stage]
            used[rank] -= held[stage]
        elif kind is F:
            end = now + costs.forward_s[stage]
            used[rank] += held[stage]
            target, following = (forward_at, stage + 1) if stage + 1 < num_stages else (backward_at, stage)
        else:
            end = now + costs.input_s[stage]
            pending[rank].append((W, stage, j))
            target, following = backward_at, stage - 1
        if 0 <= following < num_stages:
            other = placement[following]
            at = target[following][j] = end + (comm_s if other != rank else 0.0)
            if other != rank:
                heappush(events, (at, other))
        times[rank].append((now, end))
        free_at[rank] = end
        heappush(events, (end, rank))
    if any(len(done) < len(order) for done, order in zip(result, orders, strict=True)):
        return None
    return (placement, result), times


def compact(draft: Draft, costs: StageCosts, limits: Sequence[float], times: list[Times] | None = None) -> Draft:
    """One pass in order of time: each action goes into the earliest gap of its rank that it fits, after its inputs;
    a forward only where the rank still has room from then on. `times` are worked out unless they are given."""
    placement, orders = draft
    if times is None:
        times = times_of(orders, placement, costs)
    num_stages, comm_s, held = len(placement), costs.comm_s, costs.activations
    line = sorted(
        (start, end, rank, position) for rank, spans in enumerate(times) for position, (start, end) in enumerate(spans)
    )
    m = 1 + max((op[2] for order in orders for op in order), default=0)
    forward_end, input_end, weight_end = ([[0.0] * m for _ in placement] for _ in range(3))
    gaps: list[list[tuple[float, float]]] = [[] for _ in orders]
    rank_end = [0.0] * len(orders)
    levels = [0.0] * len(orders)
    changes: list[list[tuple[float, float]]] = [[] for _ in orders]  # (time, activations), frees first by sign
    placed: list[list[tuple[float, Op]]] = [[] for _ in orders]
    for old_start, old_end, rank, position in line:
        op = orders[rank][position]
        kind, stage, j = op
        seconds = old_end - old_start
        ends = forward_end if kind is F else input_end if kind is I else weight_end
        ready = ends[stage][j - 1] if j else 0.0
        if kind is F:
            if stage:
                ready = max(ready, forward_end[stage - 1][j] + (comm_s if placement[stage - 1] != rank else 0.0))
        elif kind is W:
            ready = max(ready, input_end[stage][j])
        else:
            ready = max(ready, forward_end[stage][j])
            if stage + 1 < num_stages:
                ready = max(ready, input_end[stage + 1][j] + (comm_s if placement[stage + 1] != rank else 0.0))
        start = max(ready, rank_end[rank])
        rank_gaps = gaps[rank]
        for number in range(max(0, bisect_left(rank_gaps, (ready,)) - 1), len(rank_gaps)):
            left, right = rank_gaps[number]
            begin = left if left > ready else ready
            if begin + seconds <= right + _EPSILON and (
                kind is not F or _room_from(begin, changes[rank], levels[rank], held[stage], limits[rank])
            ):
                start = begin
                pieces = [(a, b) for a, b in ((left, begin), (begin + seconds, right)) if b - a > _EPSILON]
                rank_gaps[number : number + 1] = pieces
                break
        else:
            if start - rank_end[rank] > _EPSILON:
                rank_gaps.append((rank_end[rank], start))
            rank_end[rank] = start + seconds
        ends[stage][j] = start + seconds
        placed[rank].append((start, op))
        if kind is F:
            insort(changes[rank], (start, held[stage]))
            levels[rank] += held[stage]
        elif kind is not I:
            insort(changes[rank], (start + seconds - _EPSILON, -held[stage]))
            levels[rank] -= held[stage]
    return placement, [[op for _, op in sorted(rank, key=lambda item: item[0])] for rank in placed]


def _room_from(begin: float, changes: list[tuple[float, float]], level: float, amount: float, limit: float) -> bool:
    """Whether `amount` more fits from `begin` on; `level` is what is held after all changes."""
    most = limit * (1 + _EPSILON) + _EPSILON - amount
    for at, change in reversed(changes):
        if level > most:
            return False
        if at <= begin + _EPSILON:
            return True
        level -= change
    return level <= most


def refine(draft: Draft, costs: StageCosts, limits: Sequence[float]) -> Draft:
    """`compact` and `fill_weights` in turn while that helps; the best draft seen, the given one included."""
    times: list[Times] | None = times_of(draft[1], draft[0], costs)
    best, best_score = draft, score_of(draft, costs, times)
    rounds = _ROUNDS if sum(map(len, draft[1])) < _MANY_ACTIONS else 1
    for _ in range(rounds):
        before = best_score
        draft = compact(draft, costs, limits, times)
        filled = [_filled(draft, costs, limits, patience) for patience in (1.0, 0.5, 0.0)]
        tried = [(draft, times_of(draft[1], draft[0], costs)), *(one for one in filled if one is not None)]
        for candidate, candidate_times in tried:
            if (score := score_of(candidate, costs, candidate_times)) < best_score:
                best, best_score = candidate, score
        if filled[0] is None or not best_score < before:
            break
        draft, times = filled[0]
    return best


def steady_state(placement: Sequence[int], num_micro_batches: int, costs: StageCosts, stretch: float = 1.0) -> Draft:
    """A building block for these times, repeated for every micro-batch.

    The period is `stretch` times the work of the busiest rank for one micro-batch. Along F of every stage and back
    along I, each action takes the earliest place after the one before it that leaves, on its rank's circle of one
    period, gaps into which the rank's other actions still fit: short lives, hence few activations.
    """
    num_ranks = max(placement) + 1
    period = stretch * max(per_rank(costs.total_s, placement, num_ranks))
    left = [
        [seconds for s, r in enumerate(placement) if r == rank for seconds in _three(costs, s)]
        for rank in range(num_ranks)
    ]
    circles: list[list[tuple[float, float]]] = [[] for _ in range(num_ranks)]  # (position, seconds), sorted
    starts: dict[tuple[Kind, int], float] = {}
    at = 0.0
    chain = [(F, s) for s in range(len(placement))] + [(I, s) for s in reversed(range(len(placement)))]
    before = placement[0]
    for kind, stage in chain:
        rank = placement[stage]
        at += costs.comm_s if rank != before else 0.0
        seconds = (costs.forward_s if kind is F else costs.input_s)[stage]
        left[rank].remove(seconds)
        at = _earliest(at, seconds, circles[rank], left[rank], period)
        insort(circles[rank], (at % period, seconds))
        starts[kind, stage] = at
        at += seconds
        before = rank
    for stage in reversed(range(len(placement))):
        rank, seconds = placement[stage], costs.weight_s[stage]
        left[rank].remove(seconds)
        at = _earliest(starts[I, stage] + costs.input_s[stage], seconds, circles[rank], left[rank], period)
        insort(circles[rank], (at % period, seconds))
        starts[W, stage] = at
    orders: list[list[Op]] = []
    for rank in range(num_ranks):
        timed = [
            (start + j * period, j, (kind, stage, j))
            for (kind, stage), start in starts.items()
            if placement[stage] == rank
            for j in range(num_micro_batches)
        ]
        orders.append([op for _, _, op in sorted(timed, key=lambda item: item[:2])])
    return tuple(placement), orders


def _three(costs: StageCosts, stage: int) -> tuple[float, float, float]:
    return costs.forward_s[stage], costs.input_s[stage], costs.weight_s[stage]


def _earliest(
    ready: float, seconds: float, circle: list[tuple[float, float]], left: list[float], period: float
) -> float:
    """The earliest start from `ready` on at which `seconds` fit on the circle and what is left still fits."""
    if not circle:
        return ready
    sums = sorted({round(total, 9) for total in _subset_sums(left)})
    tolerance = 1e-7 * period
    candidates = [ready]
    for position, taken in circle:
        after = position + taken
        for total in sums:
            candidates += (after + total, position - seconds - total)
    shifted = sorted({round((c - ready) % period, 9) for c in candidates})
    for shift in shifted:
        gaps = _gaps([*circle, ((ready + shift) % period, seconds)], period, tolerance)
        if gaps is not None and _fits(sorted(left, reverse=True), gaps, tolerance):
            return ready + shift
    return ready


def _gaps(items: list[tuple[float, float]], period: float, tolerance: float) -> list[float] | None:
    """Lengths of the gaps between the items on the circle; None if two of them overlap."""
    items = sorted(items)
    gaps = []
    for number, (position, seconds) in enumerate(items):
        following = items[number + 1][0] if number + 1 < len(items) else items[0][0] + period
        gap = following - position - seconds
        if gap < -tolerance:
            return None
        if gap > tolerance:
            gaps.append(gap)
    return gaps


def _subset_sums(values: list[float]) -> set[float]:
    sums = {0.0}
    for value in values:
        sums |= {round(total + value, 9) for total in sums}
    return sums


def _fits(items: list[float], gaps: list[float], tolerance: float) -> bool:
    """Whether the items (longest first) can be laid into the gaps."""
    if not items:
        return True
    tried: set[float] = set()
    for number, gap in enumerate(gaps):
        if gap + tolerance >= items[0] and round(gap, 9) not in tried:
            tried.add(round(gap, 9))
            if _fits(items[1:], [*gaps[:number], gap - items[0], *gaps[number + 1 :]], tolerance):
                return True
    return False
