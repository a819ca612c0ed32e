"""Schedules with the whole backward pass as one action: GPipe, 1F1B, interleaved 1F1B, looped breadth-first.

Pure generators (ranks, micro-batches, ...) -> `Draft`. Sources: GPipe (Huang et al.), PipeDream-Flush / Megatron-LM
(Narayanan et al.) for 1F1B and its interleaving, Breadth-First Pipeline Parallelism (Lamy-Poirier).
"""

from collections.abc import Iterable, Sequence

from ..parallel.actions import Kind
from .pipeline_data import Draft, Op, loop

__all__ = ["gpipe", "interleaved", "interleaved_groups", "looped_bfs", "one_f_one_b", "sequences"]

F, B = Kind.F, Kind.B


def gpipe(num_ranks: int, num_micro_batches: int) -> Draft:
    """All forwards, then all backwards in the same order."""
    return loop(num_ranks), [
        [(kind, rank, j) for kind in (F, B) for j in range(num_micro_batches)] for rank in range(num_ranks)
    ]


def looped_bfs(num_ranks: int, num_micro_batches: int, num_chunks: int) -> Draft:
    """Chunk by chunk, each with all micro-batches; the backward pass takes the chunks in reverse.

    The micro-batches keep their order, so that gradients are summed in the same order as everywhere else.
    """
    p, m = num_ranks, num_micro_batches
    orders: list[list[Op]] = []
    for rank in range(p):
        local = range(rank, p * num_chunks, p)
        orders.append(
            [(F, s, j) for s in local for j in range(m)] + [(B, s, j) for s in reversed(local) for j in range(m)]
        )
    return loop(p, num_chunks), orders


def one_f_one_b(num_ranks: int, num_micro_batches: int) -> Draft:
    """p-1-d forwards, then one forward and one backward in turn, then the other backwards."""
    orders = []
    for rank in range(num_ranks):
        forwards = [(F, rank, j) for j in range(num_micro_batches)]
        backwards = [(B, rank, j) for j in range(num_micro_batches)]
        orders.append(one_in_turn(forwards, backwards, num_ranks - 1 - rank))
    return loop(num_ranks), orders


def one_in_turn(forwards: Sequence[Op], backwards: Sequence[Op], num_warmup: int) -> list[Op]:
    """`num_warmup` forwards, then a forward and a backward in turn, then what is left of the backwards."""
    warmup = min(num_warmup, len(forwards))
    order = list(forwards[:warmup])
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        order += (forward, backward)
    return order + list(backwards[len(forwards) - warmup :])


def sequences(groups: Iterable[int], rank: int, num_ranks: int, num_chunks: int) -> tuple[list[Op], list[Op]]:
    """Forwards and backwards of a rank: for each group of micro-batches, every chunk in turn (backward: reversed)."""
    forwards: list[Op] = []
    backwards: list[Op] = []
    first = 0
    for size in groups:
        members = range(first, first + size)
        forwards += [(F, c * num_ranks + rank, j) for c in range(num_chunks) for j in members]
        backwards += [(B, c * num_ranks + rank, j) for c in reversed(range(num_chunks)) for j in members]
        first += size
    return forwards, backwards


def interleaved_groups(num_ranks: int, num_micro_batches: int) -> list[list[int]]:
    """Ways to cut the micro-batches into groups, the usual one first: p to a group; where p does not divide m, nearly
    equal groups of at least p, or p to a group and the rest in the last one, or in the first."""
    p, m = num_ranks, num_micro_batches
    rounds, rest = divmod(m, p)
    if not rounds or not rest:
        return [[m] if m < p else [p] * rounds]
    size, larger = divmod(m, rounds)
    return [
        [size + 1] * larger + [size] * (rounds - larger),
        [size] * (rounds - larger) + [size + 1] * larger,
        [p] * rounds + [rest],
        [rest] + [p] * rounds,
    ]


def interleaved(num_ranks: int, groups: Sequence[int], num_chunks: int, group: int | None = None) -> Draft:
    """1F1B over chunks: 2(p-1-d) + (v-1)g forwards first, where g is `group` (the first group's size when None).

    With groups larger than p, no rank starts with more forwards than rank 0 would with groups of p if `group` is given:
    the other ranks have room for the difference, so the peak stays.
    """
    p, v = num_ranks, num_chunks
    most = 2 * (p - 1) + (v - 1) * (p if group is not None else groups[0])
    orders = []
    for rank in range(p):
        forwards, backwards = sequences(groups, rank, p, v)
        orders.append(one_in_turn(forwards, backwards, min(most, 2 * (p - 1 - rank) + (v - 1) * (group or groups[0]))))
    return loop(p, v), orders
