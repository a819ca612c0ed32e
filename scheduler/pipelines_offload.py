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

F, I, W, SAVE, LOAD = Kind.F, Kind.I, Kind.W, Kind.SAVE, Kind.LOAD  # noqa: E741


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
        _with_copies(order, rank_times, frozenset(stages[:num_offloaded]), costs)
        for order, rank_times, stages in zip(orders, times, local, strict=True)
    ]
    return placement, result


def _with_copies(
    order: list[Op], times: list[tuple[float, float]], stages: frozenset[int], costs: StageCosts
) -> list[Op]:
    """One rank's order with SAVE and LOAD: LOADs back to front and as late as possible, SAVEs front to back between."""
    forward_at = {op[1:]: position for position, op in enumerate(order) if op[0] is F}
    backward_at = {op[1:]: position for position, op in enumerate(order) if op[0] in (I, Kind.B)}
    items = [
        item
        for item, position in sorted(backward_at.items(), key=lambda pair: pair[1])
        if item[0] in stages and times[position][0] - times[forward_at[item]][1] >= 2 * costs.copy_s[item[0]]
    ]
    loads: list[tuple[float, tuple[int, int]]] = []
    lane_start = float("inf")
    for item in reversed(items):
        end = min(lane_start, times[backward_at[item]][0])
        lane_start = end - costs.copy_s[item[0]]
        loads.append((lane_start, item))
    loads.reverse()
    saves = sorted((times[forward_at[item]][1], item) for item in items)
    copies: list[tuple[float, Op]] = []
    lane_free = 0.0
    pending = list(saves)
    for start, item in loads:
        # Copies away fill the lane up to the moment at which this copy back must start.
        while pending and (
            max(lane_free, pending[0][0]) + costs.copy_s[pending[0][1][0]] <= start + 1e-9 or pending[0][1] == item
        ):
            ready, saved = pending.pop(0)
            copies.append((max(lane_free, ready), (SAVE, *saved)))
            lane_free = max(lane_free, ready) + costs.copy_s[saved[0]]
        if any(saved == item for _, saved in pending):  # its own copy away comes first, late or not
            while pending:
                ready, saved = pending.pop(0)
                copies.append((max(lane_free, ready), (SAVE, *saved)))
                lane_free = max(lane_free, ready) + costs.copy_s[saved[0]]
                if saved == item:
                    break
        copies.append((max(lane_free, start), (LOAD, *item)))
        lane_free = max(lane_free, start) + costs.copy_s[item[0]]
    result: list[Op] = []
    queue = list(copies)
    done: set[tuple[int, int]] = set()
    for position, op in enumerate(order):
        while queue and (
            queue[0][0] <= times[position][0] + 1e-9
            or (op[0] in (I, Kind.B) and (LOAD, *op[1:]) in [c for _, c in queue])
        ):
            start, copy = queue[0]
            if copy[0] is SAVE and copy[1:] not in done:
                break
            result.append(copy)
            queue.pop(0)
        result.append(op)
        if op[0] is F:
            done.add(op[1:])
    return result + [copy for _, copy in queue]
