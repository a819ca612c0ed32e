"""A micro-batch's gradients of one chunk, as autograd left them.

Owns checking them, taking them away from the parameters, and what a single rank does with them: adding them to the
sums, their norm, clipping. Does not own summing over ranks (`parallel/collectives.py`).
"""

from collections.abc import Iterable, Sequence

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from .chunk_state import ChunkState

__all__ = ["Stash", "add_gradients", "norm_of", "pack_gradients", "refuse_sparse", "take_gradients"]


class Stash:
    """Gradients that micro-batches made of the same parameters, while another one has its turn.

    Gradients of parameters used between units are made at places that no action stands for, and reduced at the end of
    their micro-batch: until then those of several micro-batches must not run into each other.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int | None, int], torch.Tensor | None] = {}

    def put(self, chunks: Iterable[ChunkState], micro_batch: int) -> None:
        """A micro-batch's turn ends: its gradients are put by."""
        for parameter in (parameter for chunk in chunks for parameter in chunk.parameters):
            self._kept[micro_batch, id(parameter)], parameter.grad = parameter.grad, None

    def restore(self, chunks: Iterable[ChunkState], micro_batch: int) -> None:
        """It has its turn again."""
        for parameter in (parameter for chunk in chunks for parameter in chunk.parameters):
            parameter.grad = self.take(parameter, micro_batch)

    def take(self, parameter: torch.Tensor, micro_batch: int | None) -> torch.Tensor | None:
        """What was put by in a turn that was not known to be the micro-batch's last."""
        return self._kept.pop((micro_batch, id(parameter)), None)


def norm_of(gradients: Sequence[torch.Tensor], most: float | None) -> float:
    """The norm of all gradients together; they are scaled down, in place, where it is more than `most` (ALGORITHMS
    1.8)."""
    total = get_total_norm(gradients) if gradients else torch.zeros(())
    if most is not None and gradients:
        holders = [_Holder(gradient) for gradient in gradients]
        clip_grads_with_norm_(holders, most, total)  # pyright: ignore[reportArgumentType]
    return total.item()


class _Holder:
    """Something with a `.grad`, for torch's clipping."""

    def __init__(self, grad: torch.Tensor) -> None:
        self.grad = grad


def refuse_sparse(chunk: ChunkState) -> None:
    """Raise ValueError for gradients that have no place in a chunk."""
    if any(parameter.grad is not None and parameter.grad.layout is not torch.strided for parameter in chunk.parameters):
        raise ValueError(
            f"a parameter of unit {chunk.layout.unit} got a sparse gradient, which cannot be sharded; "
            "build the layer with sparse=False"
        )


def take_gradients(chunk: ChunkState, micro_batch: int | None, stash: Stash) -> list[torch.Tensor | None]:
    """A micro-batch's gradient of every parameter, or None; the parameters have none afterwards.

    Args:
        stash: gradients that were put by come out of it.

    Raises:
        ValueError: a sparse gradient.
    """
    refuse_sparse(chunk)
    gradients: list[torch.Tensor | None] = []
    for parameter in chunk.parameters:
        stashed = stash.take(parameter, micro_batch)
        gradients.append(parameter.grad if stashed is None else stashed)
        parameter.grad = None
    return gradients


def pack_gradients(chunk: ChunkState, flat: torch.Tensor, flags: torch.Tensor) -> None:
    """Write this rank's gradients of a chunk into one flat buffer, and let go of them."""
    assert chunk.gradients is not None
    end = 0
    for index, item in enumerate(chunk.layout.fields):
        gradient, chunk.gradients[index] = chunk.gradients[index], None
        flat[end : item.start].zero_()  # the gap that alignment left
        flags[index] = gradient is not None
        if gradient is None:
            flat[item.start : item.stop].zero_()
        else:
            chunk.layout.view(flat, item).copy_(gradient)
        end = item.stop
    flat[end:].zero_()


def add_gradients(chunk: ChunkState) -> torch.Tensor:
    """On a single rank: add a micro-batch's gradients to the chunk's sums, and let go of them; which there were."""
    assert chunk.sums is not None
    assert chunk.gradients is not None
    used = torch.zeros(len(chunk.parameters), dtype=torch.uint8)
    for index, item in enumerate(chunk.layout.fields):
        gradient, chunk.gradients[index] = chunk.gradients[index], None
        if gradient is None:
            continue
        used[index] = 1
        target = chunk.layout.view(chunk.sums, item)
        seen = chunk.used is not None and bool(chunk.used[index])
        target.add_(gradient) if seen else target.copy_(gradient)
    return used
