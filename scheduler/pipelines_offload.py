"""PipeOffload's schedules: few activations by order, fewer by copying them away inside the schedule.

`gis` and `gis-half` cut the warm-up of interleaved 1F1B; the `pipeoffload` ones repeat one building block for each
micro-batch and copy the first half of the chunks, or all of them, to a farther tier between forward and backward.
Pure generators on a loop of v chunks. Source: *PipeOffload: Improving Scalability of Pipeline Parallelism with Memory
Optimization* (Wan et al.).
"""

from math import ceil, gcd

from ..parallel.actions import Kind
from .pipeline_data import Draft, Op, StageCosts, loop
from .pipeline_timing import times_of
from .pipelines_basic import sequences

__all__ = ["building_block", "gis", "gis_half", "pipeoffload"]

F, B, I, W, SAVE, LOAD = Kind.F, Kind.B, Kind.I, Kind.W, Kind.SAVE, Kind.LOAD  # noqa: E741
_EPSILON = 1e-9
#: (stage, micro-batch)
_Item = tuple[int, int]


def gis(num_ranks: int, groups: list[int], num_chunks: int) -> Draft:
    """Interleaved with I and W adjacent, and p(v-1) + p-d forwards before the first backward: v chunks less."""
    orders = []
    for rank in range(num_ranks):
        forwards, backwards = sequences(groups, rank, num_ranks, num_chunks)
        warmup = min(len(forwards), groups[0] * (num_chunks - 1) + num_ranks - rank)
        order = forwards[:warmup]
        for position, (_, stage, j) in enumerate(backwards):
            order += ((I, stage, j), (W, stage, j))
            order += forwards[warmup + position : warmup + position + 1]
        orders.append(order)
    return loop(num_ranks, num_chunks), orders


def gis_half(num_ranks: int, num_micro_batches: int, num_chunks: int) -> Draft:
    """Groups of half the ranks: about (v+1)/2v of the activations of 1F1B."""
    return building_block(num_ranks, num_micro_batches, num_chunks, ceil(num_ranks / 2))


def building_block(num_ranks: int, num_micro_batches: int, num_chunks: int, group: int) -> Draft:
    """A block of `group` micro-batches repeated every 3*group*v slots, each slot one pass of one chunk.

    With kk groups to half the ranks, chunk c follows chunk c-1 after 3*kk*group slots, so that its input has arrived.
    """
    p, m, v = num_ranks, num_micro_batches, num_chunks
    kk = ceil(ceil(p / 2) / group)
    period = 3 * group * v

    def offset(chunk: int, item: int) -> int:
        return 3 * kk * group * chunk + 3 * item + 3 * group * (chunk // (v // gcd(v, kk)))

    orders = []
    for rank in range(p):
        slots: list[tuple[int, Op]] = []
        first_backward = offset(v - 1, 0) + rank + 3 * (p - 1 - rank) + 1
        for j in range(m):
            base = j // group * period
            for c in range(v):
                slots.append((base + offset(c, j % group) + rank, (F, c * p + rank, j)))
                start = base + first_backward + offset(v - 1 - c, j % group)
                slots += ((start, (I, c * p + rank, j)), (start + 1, (W, c * p + rank, j)))
        orders.append([op for _, op in sorted(slots, key=lambda item: item[0])])
    return loop(p, v), orders


def pipeoffload(draft: Draft, num_offloaded: int, costs: StageCosts) -> Draft:
    """The draft with the activations of the first `num_offloaded` chunks of each rank copied away in between.

    A copy away stands right after its forward. A copy back is placed as late as the one copy lane allows, so that it
    still ends before its backward; an item whose time between forward and backward is below the two copies stays.

    Args:
        draft: any schedule.
        num_offloaded: chunks of each rank, the first ones in the order of the model (they live longest).
        costs: seconds of each stage, from which the places follow.
    """
    placement, orders = draft
    times = times_of(orders, placement, costs)
    local = [[s for s, r in enumerate(placement) if r == rank] for rank in range(len(orders))]
    result = [
        _with_copies(order, rank_times, frozenset(stages[:num_offloaded]), costs.copying_s)
        for order, rank_times, stages in zip(orders, times, local, strict=True)
    ]
    return placement, result


def _with_copies(
    order: list[Op], times: list[tuple[float, float]], stages: frozenset[int], copy_s: tuple[float, ...]
) -> list[Op]:
    """One rank's order with its copies, in the order of the lane."""
    forward_end = {op[1:]: end for op, (_, end) in zip(order, times, strict=True) if op[0] is F}
    backward_start = {op[1:]: start for op, (start, _) in zip(order, times, strict=True) if op[0] in (I, B)}
    items = sorted(
        (
            item
            for item, start in backward_start.items()
            if item[0] in stages and start - forward_end[item] >= 2 * copy_s[item[0]] - _EPSILON
        ),
        key=lambda item: (backward_start[item], item),
    )
    # Copies back: from the last to the first, each as late as its backward and the copy after it allow.
    loads: list[tuple[float, _Item]] = []
    latest_end = float("inf")
    for item in reversed(items):
        latest_end = min(latest_end, backward_start[item]) - copy_s[item[0]]
        loads.append((latest_end, item))
    saves = sorted(((forward_end[item], item) for item in items), reverse=True)  # the first one last, to pop
    lane: list[tuple[float, Op]] = []
    free_s = 0.0

    def save() -> None:
        nonlocal free_s
        ready, item = saves.pop()
        lane.append((max(free_s, ready), (SAVE, *item)))
        free_s = max(free_s, ready) + copy_s[item[0]]

    for start, item in reversed(loads):
        # Copies away, as long as they end before this copy back must start; its own one in any case.
        while saves and max(free_s, saves[-1][0]) + copy_s[saves[-1][1][0]] <= start + _EPSILON:
            save()
        while any(item == waiting for _, waiting in saves):
            save()
        lane.append((max(free_s, start), (LOAD, *item)))
        free_s = max(free_s, start) + copy_s[item[0]]
    return _merge(order, times, lane)


def _merge(order: list[Op], times: list[tuple[float, float]], lane: list[tuple[float, Op]]) -> list[Op]:
    """The copies between the computations: away after its forward, back before the computation that would still run
    when it has to start, and before its backward in any case."""
    result: list[Op] = []
    forwarded: set[_Item] = set()
    for op, (_, end) in zip(order, times, strict=True):
        while lane and (lane[0][1][1:] in forwarded if lane[0][1][0] is SAVE else lane[0][0] < end - _EPSILON):
            result.append(lane.pop(0)[1])
        if op[0] in (I, B):
            late = next((n for n, (_, copy) in enumerate(lane) if copy == (LOAD, op[1], op[2])), -1)
            pulled = [entry for entry in lane[: late + 1] if entry[1][0] is LOAD or entry[1][1:] in forwarded]
            result += [copy for _, copy in pulled]
            lane = [entry for entry in lane[: late + 1] if entry not in pulled] + lane[late + 1 :]
        result.append(op)
        if op[0] is F:
            forwarded.add(op[1:])
    return result + [copy for _, copy in lane]
