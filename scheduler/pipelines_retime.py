"""Named schedules on the times, counts and limits they were not drawn for.

The published patterns assume equal times, and most of them a number of micro-batches that the ranks divide. Owns what
becomes of them otherwise: cut patterns are refined within the memory of the pattern, and V-Min, whose bubble would grow
with every micro-batch on unequal times, gives way to the schedule of least memory that does not degrade.
"""

from collections.abc import Iterable
from math import ceil

from .pipeline_data import Draft, ScheduleError, StageCosts, vee
from .pipeline_timing import Score, peak_of, score_of
from .pipelines_basic import interleaved, interleaved_groups
from .pipelines_offload import gis, gis_half
from .pipelines_refine import refine, steady_state
from .pipelines_zero_bubble import cut_front, cut_to, v_half, v_min

__all__ = ["best_gis", "best_gis_half", "best_interleaved", "best_of", "best_v_half", "best_v_min", "refined"]

_TOLERANCE = 1e-6


def best_of(drafts: Iterable[Draft | None], costs: StageCosts, limit: float | None = None) -> Draft | None:
    """The shortest (span, then makespan, then peak) of the drafts that run within the limit; the first among equals."""
    best: Draft | None = None
    best_key: Score | None = None
    for draft in drafts:
        if draft is None:
            continue
        try:
            key = score_of(draft, costs)
        except ScheduleError:
            continue  # a combination of groups that deadlocks is no candidate
        if (limit is None or key[2] <= limit * (1 + _TOLERANCE)) and (best_key is None or key < best_key):
            best, best_key = draft, key
    return best


def _must(draft: Draft | None) -> Draft:
    assert draft is not None, "the plain pattern always runs"
    return draft


def refined(draft: Draft, costs: StageCosts) -> Draft:
    """The draft, shorter where gaps and weight gradients allow it, with the peak of its worst rank as the limit."""
    return refine(draft, costs, [peak_of(draft, costs)] * len(draft[1]))


def best_interleaved(num_ranks: int, num_micro_batches: int, num_chunks: int, costs: StageCosts) -> Draft:
    """The shortest of the ways to cut the micro-batches into groups."""
    p, m = num_ranks, num_micro_batches
    ways = interleaved_groups(p, m)
    drafts = [interleaved(p, ways[0], num_chunks)]
    if len(ways) > 1:
        drafts += [interleaved(p, groups, num_chunks, max(groups)) for groups in ways]
        drafts += [interleaved(p, groups, num_chunks) for groups in ways[1:]]
    return _must(best_of(drafts, costs))


def best_gis(num_ranks: int, num_micro_batches: int, num_chunks: int, costs: StageCosts) -> Draft:
    """Groups of p; where p does not divide m, the first or the last group is cut and the gaps are filled."""
    p, m = num_ranks, num_micro_batches
    if m % p == 0:
        return gis(p, [p] * (m // p), num_chunks)
    if m < p:
        return refined(gis(p, [m], num_chunks), costs)
    return _cut(gis(p, [p] * ceil(m / p), num_chunks), m, ceil(m / p) * p, costs)


def best_gis_half(num_ranks: int, num_micro_batches: int, num_chunks: int, costs: StageCosts) -> Draft:
    """Groups of half the ranks; where those do not divide m, cut and filled like the whole ones."""
    p, m = num_ranks, num_micro_batches
    group = ceil(p / 2)
    if m % group == 0:
        return gis_half(p, m, num_chunks)
    whole = ceil(m / group) * group
    return _cut(gis_half(p, whole, num_chunks), m, whole, costs)


def _cut(draft: Draft, m: int, num_whole: int, costs: StageCosts) -> Draft:
    """The draft of whole groups with its first or its last micro-batches left out, refined within its own peak."""
    placement, orders = draft
    limits = [peak_of(draft, costs)] * len(orders)
    cut = [(placement, cut_to(m, orders)), (placement, cut_front(num_whole - m, orders))]
    return _must(best_of([*cut, *(refine(one, costs, limits) for one in cut)], costs))


def best_v_half(num_ranks: int, num_micro_batches: int, costs: StageCosts) -> Draft:
    """The pattern with its warm-up and its end drawn together, within its own peak."""
    return refined(v_half(num_ranks, num_micro_batches), costs)


def best_v_min(num_ranks: int, num_micro_batches: int, costs: StageCosts, limit: float | None = None) -> Draft:
    """The pattern, refined; on unequal times the schedule of least memory that does not degrade.

    The pattern's bubble then grows with every micro-batch. Acceptable is a bubble no longer than the pattern would have
    if F, I and W took equal times of the same sum on every stage. Of what is acceptable (the pattern, building blocks
    packed for these times, V-Half) the one of least memory is taken, else the shortest.

    Args:
        num_ranks, num_micro_batches, costs: as everywhere.
        limit: most activations of a rank; with it, the shortest within it is taken.
    """
    p, m = num_ranks, num_micro_batches
    pattern = refined(v_min(p, m), costs)
    total_s = max(costs.total_s)
    third = [total_s / 3] * (2 * p)
    even = StageCosts.of_stages(third, third, third, costs.activations, costs.copy_s, costs.comm_s)
    busiest_s = m * 2 * total_s
    acceptable_s = score_of(refined(v_min(p, m), even), even)[0] - busiest_s + _TOLERANCE
    drafts = [pattern]
    work_s = m * max(a + b for a, b in zip(costs.total_s, reversed(costs.total_s), strict=True))
    if limit is not None or score_of(pattern, costs)[0] - work_s > acceptable_s:
        drafts += [refined(steady_state(vee(p), m, costs, stretch), costs) for stretch in (1.0, 1.05, 1.1)]
        drafts.append(best_v_half(p, m, costs))
    if limit is not None:
        return best_of(drafts, costs, limit) or pattern
    scores = [score_of(draft, costs) for draft in drafts]
    good = [number for number, score in enumerate(scores) if score[0] - work_s <= acceptable_s]
    if good:
        return drafts[min(good, key=lambda number: (scores[number][2], scores[number]))]
    return drafts[min(range(len(drafts)), key=scores.__getitem__)]
