"""Tensors that autograd saves, when they are views of a chunk that will be dropped.

Owns the packing of such views as (chunk, offset, shape, stride): autograd then does not hold on to a dropped copy, and
finds the weights in backward wherever the chunk lies then (`linear` saves a transposed view of its weight, so pointing
`parameter.data` elsewhere is not enough).
"""

from dataclasses import dataclass
from typing import Any

import torch

from .model_state import ModelState

__all__ = ["saved_by_place"]


@dataclass(frozen=True, slots=True)
class _Place:
    chunk: int
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]


def saved_by_place(state: ModelState) -> Any:
    """A context in which views of gathered chunks are saved by their place."""

    def pack(tensor: torch.Tensor) -> torch.Tensor | _Place:
        address = tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0
        for chunk in state.chunks:
            full = chunk.store.full
            if full is not None and tensor.dtype is full.dtype and address == full.untyped_storage().data_ptr() != 0:
                offset = int(tensor.storage_offset()) - int(full.storage_offset())
                return _Place(chunk.layout.index, offset, tensor.shape, tensor.stride())
        return tensor

    def unpack(packed: torch.Tensor | _Place) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        full = state.chunks[packed.chunk].store.full
        assert full is not None, f"chunk c{packed.chunk} is needed in backward, but it was not gathered"
        return full.as_strided(packed.shape, packed.stride, full.storage_offset() + packed.offset)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
