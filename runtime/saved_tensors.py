"""Tensors that autograd saves: views of a chunk that will be dropped, and, in a pipeline, a look at all the others.

Owns the packing of such views as (chunk, offset, shape, stride): autograd then does not hold on to a dropped copy, and
finds the weights in backward wherever the chunk lies then (`linear` saves a transposed view of its weight, so pointing
`parameter.data` elsewhere is not enough). Does not own moving saved tensors away (`memory/activations.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..memory.live_bytes import LiveBytes
from .model_state import ModelState

__all__ = ["places", "saved_by_place", "watched"]


@dataclass(frozen=True, slots=True)
class _Place:
    chunk: int
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]


def saved_by_place(state: ModelState) -> Any:
    """A context in which views of gathered chunks are saved by their place."""
    place_of = places(state)

    def pack(tensor: torch.Tensor) -> torch.Tensor | Callable[[], torch.Tensor]:
        found = place_of(tensor)
        return tensor if found is None else found

    def unpack(packed: torch.Tensor | Callable[[], torch.Tensor]) -> torch.Tensor:
        return packed if isinstance(packed, torch.Tensor) else packed()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class _Held:
    """A saved tensor that stays where it is."""

    def __init__(self, tensor: torch.Tensor) -> None:
        # Not the tensor itself: that may be the output of the node that saves it, and the two would keep each other.
        self.tensor = tensor if tensor.grad_fn is None else tensor.detach()
        self.version = tensor._version


def watched(state: ModelState, live: LiveBytes) -> Any:
    """A context in which `live` sees what is saved, and views of chunks that are dropped are saved by their place."""
    place_of = places(state) if state.drops_copies else None

    def pack(tensor: torch.Tensor) -> _Held | Callable[[], torch.Tensor]:
        found = None if place_of is None else place_of(tensor)
        if found is not None:
            return found
        live.show(tensor)
        return _Held(tensor)

    def unpack(packed: _Held | Callable[[], torch.Tensor]) -> torch.Tensor:
        if not isinstance(packed, _Held):
            return packed()
        if packed.tensor._version != packed.version:  # as autograd checks what it saves without hooks
            raise RuntimeError(
                f"a tensor of {list(packed.tensor.shape)} that was saved for the backward pass has been modified by an "
                f"inplace operation since: it is at version {packed.tensor._version}, expected version {packed.version}"
            )
        return packed.tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def places(state: ModelState) -> Callable[[torch.Tensor], Callable[[], torch.Tensor] | None]:
    """f(saved tensor) -> how to find it again wherever its chunk lies then; None for what is no view of a chunk."""

    def place_of(tensor: torch.Tensor) -> Callable[[], torch.Tensor] | None:
        address = tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0
        chunk = state.places.chunk_at(address)
        full = None if chunk is None else chunk.store.full
        if chunk is None or full is None or tensor.dtype is not full.dtype:
            return None
        offset = int(tensor.storage_offset()) - int(full.storage_offset())
        return partial(find, _Place(chunk.layout.index, offset, tensor.shape, tensor.stride()))

    def find(place: _Place) -> torch.Tensor:
        full = state.chunks[place.chunk].store.full
        assert full is not None, f"chunk c{place.chunk} is needed in backward, but it was not gathered"
        return full.as_strided(place.shape, place.stride, full.storage_offset() + place.offset)

    return place_of
