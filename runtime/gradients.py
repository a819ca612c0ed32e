"""A micro-batch's gradients of one chunk, as autograd left them.

Owns checking them and writing them into one flat buffer. Does not own summing them (`parallel/collectives.py`).
"""

import torch

from .chunk_state import ChunkState

__all__ = ["add_to_sums", "pack_gradients", "refuse_sparse"]


def refuse_sparse(chunk: ChunkState) -> None:
    """Raise ValueError for gradients that have no place in a chunk."""
    if any(parameter.grad is not None and parameter.grad.layout is not torch.strided for parameter in chunk.parameters):
        raise ValueError(
            f"a parameter of unit {chunk.layout.unit} got a sparse gradient, which cannot be sharded; "
            "build the layer with sparse=False"
        )


def pack_gradients(chunk: ChunkState, flat: torch.Tensor, flags: torch.Tensor) -> None:
    """Write this rank's gradients of a chunk into one flat buffer, and let go of them."""
    end = 0
    for index, (item, parameter) in enumerate(zip(chunk.layout.fields, chunk.parameters, strict=True)):
        flat[end : item.start].zero_()  # the gap that alignment left
        flags[index] = parameter.grad is not None
        if parameter.grad is None:
            flat[item.start : item.stop].zero_()
        else:
            chunk.layout.view(flat, item).copy_(parameter.grad)
            parameter.grad = None
        end = item.stop
    flat[end:].zero_()


def add_to_sums(chunk: ChunkState, accumulate: bool) -> torch.Tensor:
    """On a single rank: add a micro-batch's gradients to the chunk's sums, or begin them, and let the gradients go.

    Returns: [fields] uint8, 1 where there was a gradient.
    """
    assert chunk.sums is not None
    used = torch.zeros(len(chunk.parameters), dtype=torch.uint8)
    for index, (item, parameter) in enumerate(zip(chunk.layout.fields, chunk.parameters, strict=True)):
        if parameter.grad is None:
            continue
        used[index] = 1
        target = chunk.layout.view(chunk.sums, item)
        seen = accumulate and chunk.used is not None and bool(chunk.used[index])
        target.add_(parameter.grad) if seen else target.copy_(parameter.grad)
        parameter.grad = None
    return used
