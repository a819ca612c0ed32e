"""`auto`: the best schedule that can be found for measured costs under a memory limit.

Owns the search. Candidates are all named schedules, list schedules under several rules on every placement that the
costs describe, schedules that would need too much memory followed as far as the limit allows (or, where the time of a
copy was measured, with activations copied away), and building blocks packed for the measured times; the best few are
refined. Best is the shortest span, then makespan, then peak (makespan first where steps end at a barrier), so `auto` is
never longer than the best named schedule that fits. Deterministic: the effort is counted in actions, not in time.
"""

from collections.abc import Callable, Iterator
from itertools import product

from ..parallel.actions import Kind
from .pipeline_data import Draft, Op, ScheduleError, StageCosts, loop, vee
from .pipeline_timing import Score, peak_of, score_of, times_of
from .pipelines_list import Rules, list_schedule
from .pipelines_offload import pipeoffload
from .pipelines_refine import refine, steady_state

__all__ = ["auto"]

_NAMED = (
    "zb-v", "zb-h2", "dualpipe-v", "zb-h1", "gis", "v-half", "v-min", "gis-half", "interleaved", "1f1b",
    "pipeoffload-half", "pipeoffload-full", "looped-bfs", "gpipe",
)  # fmt: skip
#: What the greedy passes of one search may place, all together: about a second.
_MOST_ACTIONS = 40_000
_NUM_REFINED = 2
_NUM_OFFLOADED = 5
_TOLERANCE = 1e-6
_Named = Callable[[str, int, int, StageCosts, int, float | None], tuple[Draft, StageCosts]]


def auto(
    num_ranks: int,
    num_micro_batches: int,
    base: StageCosts,
    limit: float | None,
    num_chunks: int,
    named: _Named,
    barrier: bool = False,
) -> Draft:
    """The best draft found.

    Args:
        num_ranks, num_micro_batches: p and m.
        base: costs of the p parts of the model, or of more stages.
        limit: most activations of any rank, in the unit of `base`; none when None.
        num_chunks: of loops.
        named: makes a named draft and the costs of its stages.
        barrier: the shortest makespan is best, then span; else the other way round.

    Raises:
        ScheduleError: nothing fits the limit; says what the least is.
        ValueError: costs that describe no placement on these ranks.
    """
    p, m = num_ranks, num_micro_batches
    found: list[tuple[Score, int, Draft, StageCosts]] = []
    too_large: list[tuple[Score, Draft, StageCosts]] = []
    least = float("inf")

    def offer(draft: Draft | None, costs: StageCosts) -> None:
        nonlocal least
        if draft is None:
            return
        span_s, makespan_s, peak = score_of(draft, costs)
        key = (makespan_s, span_s, peak) if barrier else (span_s, makespan_s, peak)
        least = min(least, peak)
        if limit is None or peak <= limit * (1 + _TOLERANCE):
            found.append((key, len(found), draft, costs))
        else:
            too_large.append((key, draft, costs))

    for name in _NAMED:
        if p * (1 if name in ("1f1b", "gpipe", "zb-h1", "zb-h2") else 2) % base.num_stages == 0 or (
            p * num_chunks % base.num_stages == 0
        ):
            try:
                offer(*named(name, p, m, base, num_chunks, limit))
            except ValueError:
                continue  # the costs are of more stages than this one has
    placements = [
        (placement, base.split(len(placement)))
        for placement in dict.fromkeys((vee(p), loop(p), loop(p, num_chunks)))
        if len(placement) % base.num_stages == 0
    ]
    if not found and not too_large and not placements:
        raise ValueError(
            f"costs of {base.num_stages} stages describe no placement on {p} ranks with {num_chunks} chunks"
        )
    budget = _MOST_ACTIONS
    for placement, costs in placements:
        size = 3 * m * len(placement)
        caps = [limit] if limit is not None else _usual_peaks(found)
        share = budget // (len(placements) * len(caps))
        for cap in caps:
            for rules in _rules(max(2, share // size)):
                offer(list_schedule(placement, m, costs, [cap] * p, rules), costs)
        if placement == vee(p):
            offer(steady_state(placement, m, costs), costs)
    if limit is not None:
        # `sorted` makes a copy: what is offered below may be too large again.
        for _, draft, costs in sorted(too_large, key=lambda item: item[0])[:_NUM_OFFLOADED]:
            if costs.copy_s is not None and not any(op[0] is Kind.SAVE for order in draft[1] for op in order):
                for num_offloaded in range(1, len(draft[0]) // p + 1):
                    offer(pipeoffload(draft, num_offloaded, costs), costs)
        for _, draft, costs in sorted(too_large, key=lambda item: item[0])[:_NUM_REFINED]:
            if not any(op[0] in (Kind.SAVE, Kind.B) for order in draft[1] for op in order):
                offer(_followed(draft, m, costs, limit), costs)
    if not found:
        raise ScheduleError(
            f"no schedule of {m} micro-batches on {p} ranks fits {limit:g} activations per rank: the least found is "
            f"{least:g}. Give more memory, recompute activations, use smaller micro-batches or more ranks."
        )
    for _, _, draft, costs in sorted(found, key=lambda item: item[:2])[:_NUM_REFINED]:
        if not any(op[0] in (Kind.SAVE, Kind.B) for order in draft[1] for op in order):
            cap = limit if limit is not None else peak_of(draft, costs)
            offer(refine(draft, costs, [cap] * p), costs)
    return min(found, key=lambda item: item[:2])[2]


def _usual_peaks(found: list[tuple[Score, int, Draft, StageCosts]]) -> list[float]:
    """Without a limit: the peaks of the two shortest named schedules."""
    peaks = [key[-1] for key, *_ in sorted(found, key=lambda item: item[:2])]
    return list(dict.fromkeys(peaks))[:2]


def _rules(num_rules: int) -> Iterator[Rules]:
    """The first `num_rules` of all combinations, the most promising first."""
    combinations = product((0.0, 0.5, 1.0), (0.0, 0.5), (False, True), (False, True), (0, 2))
    usual = (r for r in combinations if r[0] or not r[-1])
    for _, (spacing, patience, forward_first, deep_first, burst) in zip(range(num_rules), usual, strict=False):
        yield Rules(forward_first, deep_first, spacing, burst, patience)


def _followed(draft: Draft, m: int, costs: StageCosts, limit: float) -> Draft | None:
    """A list schedule that follows the times of a draft as far as the limit allows."""
    times = times_of(draft[1], draft[0], costs)
    guide: dict[Op, float] = {
        op: start
        for order, spans in zip(draft[1], times, strict=True)
        for op, (start, _) in zip(order, spans, strict=True)
    }
    return list_schedule(draft[0], m, costs, [limit] * len(draft[1]), Rules(patience=0.5), guide)
