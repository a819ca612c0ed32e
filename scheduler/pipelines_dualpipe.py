"""DualPipeV: the vee of DeepSeek's DualPipe, one copy of the model instead of two.

A pure generator. A forward and a backward that DualPipe overlaps (one computes while the other communicates) stand next
to each other in the order; the executor's net lanes overlap them. Source: deepseek-ai/DualPipe.
"""

from ..parallel.actions import Kind
from .pipeline_data import Draft, Op, vee
from .pipelines_zero_bubble import cut_to

__all__ = ["dualpipe_v"]

F, B, I, W = Kind.F, Kind.B, Kind.I, Kind.W  # noqa: E741


def dualpipe_v(num_ranks: int, num_micro_batches: int) -> Draft:
    """Eight phases; fewer than 2p micro-batches are cut out of that many."""
    m = max(num_micro_batches, 2 * num_ranks)
    return vee(num_ranks), cut_to(num_micro_batches, [_order(rank, num_ranks, m) for rank in range(num_ranks)])


def _order(rank: int, p: int, m: int) -> list[Op]:
    stages = (rank, 2 * p - 1 - rank)
    order: list[Op] = []
    pending: list[Op] = []  # weight gradients, oldest first
    num_forward, num_backward = [0, 0], [0, 0]

    def forward(chunk: int) -> None:
        order.append((F, stages[chunk], num_forward[chunk]))
        num_forward[chunk] += 1

    def backward(chunk: int, split: bool = False) -> None:
        order.append((I if split else B, stages[chunk], num_backward[chunk]))
        if split:
            pending.append((W, stages[chunk], num_backward[chunk]))
        num_backward[chunk] += 1

    def weight() -> None:
        if pending:
            order.append(pending.pop(0))

    for _ in range(2 * (p - 1 - rank)):
        forward(0)
    for _ in range(rank + 1):
        forward(0)
        forward(1)
    for _ in range(p - 1 - rank):
        backward(1, split=True)
        weight()
        forward(1)
    for _ in range(m - 2 * p + rank + 1):
        forward(0)
        backward(1)
        forward(1)
        backward(0)
    for _ in range(p - 1 - rank):
        backward(1)
        forward(1)
        backward(0)
    split = False
    for i in range(rank + 1):  # the second half of these has its weight gradients put off
        split = split or (i == (rank + 1) // 2 and rank % 2 == 1)
        backward(1, split)
        split = split or (i == (rank + 1) // 2 and rank % 2 == 0)
        backward(0, split)
    for _ in range(p - 1 - rank):
        weight()
        backward(0, split)
    for _ in range(rank + 1):
        weight()
    return order
