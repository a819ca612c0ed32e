"""Where to cut a chain of units into pipeline stages: exact min-max over measured costs.

Owns the choice and its checks, pure. Does not own measuring (`runtime/unit_costs.py`) nor whether the model's dataflow
allows a cut there (`dataflow.py`).
"""

from collections.abc import Callable, Sequence
from itertools import combinations
from math import comb, inf

from .pipeline_data import ScheduleError
from .stage_memory import StageNeeds

__all__ = ["balance", "check_starts"]

_MAX_ENUMERATED = 200_000  # ways to cut that are all looked at, a few tenths of a second


def balance(
    costs_s: Sequence[float],
    placement: Sequence[int],
    allowed: Sequence[bool] | None = None,
    needs: StageNeeds | None = None,
    limit_bytes: float = inf,
) -> tuple[int, ...]:
    """The first run of each stage, so that the busiest rank, and then the largest stage, has least to do.

    One stage a rank: exact dynamic programming, D[k][j] = min over i of max(D[k-1][i], cost of i..j) (ALGORITHMS 4.8).
    Several: all ways to cut are compared where they are few, else the best of those is improved border by border.

    Args:
        costs_s: seconds of each unit run, F and B together.
        placement: rank of each stage.
        allowed: whether a stage may begin at that run; all may when None.
        needs, limit_bytes: no rank is given stages that need more bytes, together, than the limit.

    Raises:
        ScheduleError: more stages than units, or none of the cuts is allowed and fits.
    """
    num_stages, num_runs = len(placement), len(costs_s)
    if num_stages > num_runs:
        raise ScheduleError(
            f"{num_stages} stages need at least so many units, and the model runs {num_runs}: take fewer pipeline "
            "ranks or chunks, or give smaller units (units=[...])"
        )
    may = list(allowed) if allowed is not None else [True] * num_runs
    found = _min_max(costs_s, num_stages, may, needs, limit_bytes)
    if found is None:
        raise ScheduleError(
            _does_not_fit(num_runs, num_stages, limit_bytes)
            if needs is not None
            else f"the model's dataflow allows no cut into {num_stages} stages"
        )
    if len(set(placement)) == num_stages:
        return found
    prefix = [0.0]
    for cost in costs_s:
        prefix.append(prefix[-1] + cost)

    def score(starts: Sequence[int]) -> tuple[float, float, float]:
        ends = [*starts[1:], num_runs]
        sizes = [prefix[end] - prefix[start] for start, end in zip(starts, ends, strict=True)]
        ranks: dict[int, float] = {}
        for rank, size in zip(placement, sizes, strict=True):
            ranks[rank] = ranks.get(rank, 0.0) + size
        lack = 0.0
        if needs is not None:
            lack = max(max(needs.ranks(list(zip(starts, ends, strict=True)))) - limit_bytes, 0.0)
        return lack, max(ranks.values()), max(sizes)

    places = [run for run in range(1, num_runs) if may[run]]
    if comb(len(places), num_stages - 1) <= _MAX_ENUMERATED:
        best = min(((0, *cut) for cut in combinations(places, num_stages - 1)), key=score)
    else:
        best = _improved(found, places, score)
    if score(best)[0]:
        raise ScheduleError(_does_not_fit(num_runs, num_stages, limit_bytes))
    return best


def _does_not_fit(num_runs: int, num_stages: int, limit_bytes: float) -> str:
    return f"no way to cut {num_runs} unit runs into {num_stages} stages fits into {limit_bytes:,.0f} bytes a rank"


def _min_max(
    costs_s: Sequence[float], num_stages: int, may: Sequence[bool], needs: StageNeeds | None, limit_bytes: float
) -> tuple[int, ...] | None:
    num_runs = len(costs_s)
    prefix = [0.0]
    for cost in costs_s:
        prefix.append(prefix[-1] + cost)
    best = [[inf] * (num_runs + 1) for _ in range(num_stages + 1)]
    start_of = [[-1] * (num_runs + 1) for _ in range(num_stages + 1)]
    best[0][0] = 0.0
    for stage in range(1, num_stages + 1):
        for end in range(stage, num_runs + 1):
            for start in range(stage - 1, end):
                if best[stage - 1][start] == inf or (start and not may[start]):
                    continue
                worst = max(best[stage - 1][start], prefix[end] - prefix[start])
                if worst < best[stage][end] and _fits(needs, stage - 1, (start, end), limit_bytes):
                    best[stage][end], start_of[stage][end] = worst, start
    if best[num_stages][num_runs] == inf:
        return None
    starts, end = [], num_runs
    for stage in range(num_stages, 0, -1):
        end = start_of[stage][end]
        starts.append(end)
    return tuple(reversed(starts))


def _fits(needs: StageNeeds | None, stage: int, span: tuple[int, int], limit_bytes: float) -> bool:
    return needs is None or needs.alone(stage, span) <= limit_bytes


def _improved(
    starts: tuple[int, ...], places: Sequence[int], score: Callable[[Sequence[int]], tuple[float, ...]]
) -> tuple[int, ...]:
    """Move one or two borders at a time, as long as that helps."""
    present, allowed = score(starts), set(places)
    while True:
        moves = [
            tuple(sorted({*starts[:a], starts[a] + da, *starts[a + 1 : b], starts[b] + db, *starts[b + 1 :]}))
            for a in range(1, len(starts))
            for b in range(a + 1, len(starts))
            for da in range(-3, 4)
            for db in range(-3, 4)
        ]
        moves = [move for move in moves if len(move) == len(starts) and allowed.issuperset(move[1:])]
        best = min(moves, key=score, default=starts)
        if score(best) >= present:
            return starts
        starts, present = best, score(best)


def check_starts(starts: Sequence[int], num_stages: int, num_runs: int) -> None:
    """Raise ScheduleError where these are not the first runs of so many stages."""
    if len(starts) != num_stages:
        raise ScheduleError(f"{len(starts)} stages are given, and the schedule has {num_stages}")
    if not starts or starts[0] != 0 or any(a >= b for a, b in zip(starts, [*starts[1:], num_runs], strict=True)):
        raise ScheduleError(
            f"stages begin at unit runs {list(starts)} of {num_runs}: they start with 0, and each has at least one"
        )
