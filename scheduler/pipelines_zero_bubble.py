"""Schedules that split the backward pass, so that weight gradients fill the bubble.

ZB-H1, ZB-H2 (one chunk), ZB-V, V-Half and V-Min (two chunks in a vee). Pure generators for equal times; what happens to
them on unequal measured times is `pipelines_auto.py`'s. Sources: *Zero Bubble Pipeline Parallelism* (Qi et al.),
*Pipeline Parallelism with Controllable Memory* (Qi et al.).
"""

from ..parallel.actions import Kind
from .pipeline_data import Draft, Op, loop, vee

__all__ = ["cut_front", "cut_to", "v_half", "v_min", "zb_h1", "zb_h2", "zb_v"]

F, I, W = Kind.F, Kind.I, Kind.W  # noqa: E741
#: One rank on a grid of equal slots: slot -> operation.
_Slots = dict[int, Op]


def cut_to(num_micro_batches: int, orders: list[list[Op]]) -> list[list[Op]]:
    """The orders without the micro-batches beyond `num_micro_batches`."""
    return [[op for op in order if op[2] < num_micro_batches] for order in orders]


def cut_front(num_left_out: int, orders: list[list[Op]]) -> list[list[Op]]:
    """The orders without the first `num_left_out` micro-batches, the others counted from 0."""
    return [[(kind, s, j - num_left_out) for kind, s, j in order if j >= num_left_out] for order in orders]


def zb_h1(num_ranks: int, num_micro_batches: int) -> Draft:
    """1F1B whose weight gradients on rank d lag d input gradients behind."""
    p, m = num_ranks, num_micro_batches
    orders: list[list[Op]] = []
    for rank in range(p):
        warmup = min(m, p - 1 - rank)
        order: list[Op] = [(F, rank, j) for j in range(warmup)]
        for j in range(m):
            if warmup + j < m:
                order.append((F, rank, warmup + j))
            order.append((I, rank, j))
            if j >= rank:
                order.append((W, rank, j - rank))
        order += [(W, rank, j) for j in range(max(0, m - rank), m)]
        orders.append(order)
    return loop(p), orders


def zb_h2(num_ranks: int, num_micro_batches: int) -> Draft:
    """2(p-d)-1 forwards first; the weight gradients lag 2d input gradients behind."""
    p, m = num_ranks, num_micro_batches
    orders: list[list[Op]] = []
    for rank in range(p):
        warmup = min(m, 2 * (p - rank) - 1)
        order: list[Op] = [(F, rank, j) for j in range(warmup)]
        for j in range(m):
            order.append((I, rank, j))
            if j >= 2 * rank:
                order.append((W, rank, j - 2 * rank))
            if warmup + j < m:
                order.append((F, rank, warmup + j))
        order += [(W, rank, j) for j in range(max(0, m - 2 * rank), m)]
        orders.append(order)
    return loop(p), orders


def zb_v(num_ranks: int, num_micro_batches: int) -> Draft:
    """The vee without bubble for equal times; fewer than 2p-1 micro-batches are cut out of that many."""
    p, m = num_ranks, max(num_micro_batches, 2 * num_ranks - 1)
    orders: list[list[Op]] = []
    for rank in range(p):
        stages = (rank, 2 * p - 1 - rank)
        order: list[Op] = []
        count: dict[tuple[Kind, int], int] = {}

        def add(*ops: tuple[Kind, int], order=order, count=count, stages=stages) -> None:
            for kind, chunk in ops:
                j = count.get((kind, chunk), 0)
                count[kind, chunk] = j + 1
                order.append((kind, stages[chunk], j))

        def has(kind: Kind, chunk: int, count=count) -> int:
            return count.get((kind, chunk), 0)

        for _ in range(2 * (p - rank) - 1):
            add((F, 0))
        for _ in range(rank):
            add((F, 1), (F, 0))
        for _ in range(p - rank):
            add((F, 1), (I, 1), (W, 1))
        while has(F, 1) < has(F, 0) or has(F, 0) < m:
            if has(F, 0) < m:
                add((F, 0))
            add((I, 0), (W, 0), (F, 1), (I, 1), (W, 1))
        for _ in range(rank):
            add((I, 0), (I, 1))
        for _ in range(p - rank):
            add((I, 0), (W, 0))
        for chunk in (1, 0):
            while has(W, chunk) < has(I, chunk):
                add((W, chunk))
        orders.append(order)
    return vee(p), cut_to(num_micro_batches, orders)


def v_min(num_ranks: int, num_micro_batches: int) -> Draft:
    """The vee with about a third of 1F1B's activations."""
    p = num_ranks
    e = 2 if p % 3 == 0 else 0
    return _repeat(p, num_micro_batches, [(d, 2 * p - 1 - d, 2 * p + e + d, 4 * p + e - 1 - d) for d in range(p)])


def v_half(num_ranks: int, num_micro_batches: int) -> Draft:
    """The vee with about half of 1F1B's activations."""
    p = num_ranks
    e = 3 if p % 2 == 0 else 0
    pattern = [(2 * d, 3 * p - 2 - d, 3 * p + e + 2 * d - 1, 6 * p + e - 2 - d) for d in range(p)]
    return _repeat(p, num_micro_batches, pattern)


def _repeat(num_ranks: int, num_micro_batches: int, pattern: list[tuple[int, int, int, int]]) -> Draft:
    """A building block repeated every six slots; `pattern` has the slots of F0, F1, I1, I0 of each rank."""
    orders: list[list[Op]] = []
    for rank, starts in enumerate(pattern):
        first, second = rank, 2 * num_ranks - 1 - rank
        kinds = ((F, first), (F, second), (I, second), (I, first))
        slots = {
            start + 6 * j: (kind, stage, j)
            for start, (kind, stage) in zip(starts, kinds, strict=True)
            for j in range(num_micro_batches)
        }
        orders.append(fill_free_slots(slots))
    return vee(num_ranks), orders


def fill_free_slots(slots: _Slots) -> list[Op]:
    """The operations in the order of their slots, with every W in the first slot that is free after its I."""
    order: list[Op] = []
    pending: list[Op] = []
    for slot in range(min(slots), max(slots) + 1):
        op = slots.get(slot)
        if op is None:
            if pending:
                order.append(pending.pop(0))
            continue
        order.append(op)
        if op[0] is I:
            pending.append((W, op[1], op[2]))
    return order + pending
