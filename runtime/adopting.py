"""Moving a model's parameters into chunks, at the start: into the storage that the plan gives each chunk.

Owns the first values' way from the model (or from a filler) to where they are at home, unit by unit, so that no more
than one unit's parameters exist twice; and the cutting of chunks into the pieces that the optimizer updates. Does not
own what happens to chunks later (`runtime/model_state.py`).
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..memory.chunk import ChunkLayout
from ..parallel.placement import LocalParameters, OffloadedParameters, ParameterStore, UploadedParameters
from ..parallel.sharding import owned_pieces
from ..scheduler.plan import Home, Plan
from .chunk_state import ChunkState, OptimLayout, OwnedPiece

if TYPE_CHECKING:
    from ..parallel.collectives import Transport
    from .device_state import DeviceState
    from .offload import OffloadedState

__all__ = ["TILE_ELEMS", "Adoption", "Fill"]

Fill = Callable[[str, Mapping[str, torch.Tensor]], None]
"""f(unit, tensors): give the parameters of a unit their first values, in place, by name."""

TILE_ELEMS = 2 << 20  # of pieces whose slots are made one by one before they go to disk


class Adoption:
    """Makes chunks of parameters.

    Args:
        parameters: by name.
        offloaded: the way to the disk tier, where the plan uses it.
        optims: per chunk, where its optimizer slots lie on disk, or None; empty where nothing is on disk.
        point: makes a chunk's parameters point at its gathered copy, or at nothing.
        device: the way to a device with memory of its own, where there is one.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        plan: Plan,
        transport: "Transport | None",
        offloaded: "OffloadedState | None",
        optims: Sequence[OptimLayout | None],
        point: Callable[[ChunkState], None],
        device: "DeviceState | None" = None,
    ) -> None:
        self._device = device
        self._by_name = parameters
        self._plan = plan
        self._transport = transport
        self._offloaded = offloaded
        self._optims = optims
        self._point = point

    def chunks(self, layouts: Sequence[ChunkLayout], fill: Fill | None) -> Iterator[ChunkState]:
        """The chunks, one unit after the other. The model's own parameters are let go of on the way.

        Args:
            fill: gives the values, unit by unit; None: the model has them.
        """
        for unit, group in itertools.groupby(layouts, key=lambda layout: layout.unit):
            yield from self._adopt_unit(unit, list(group), fill)

    def _adopt_unit(self, unit: str, layouts: Sequence[ChunkLayout], fill: Fill | None) -> list[ChunkState]:
        """Move the parameters of a unit's chunks into storage of their own, or fill it where they have no values."""
        originals: dict[int, torch.Tensor] = {}
        tensors: dict[str, torch.Tensor] = {}
        for layout in layouts:
            first = self._by_name[layout.fields[0].name]
            original = originals[layout.index] = torch.zeros(layout.num_elems, dtype=first.dtype)
            for item in layout.fields:
                tensors[item.name] = layout.view(original, item)
                if fill is None:
                    tensors[item.name].copy_(self._by_name[item.name].data)
        if fill is not None:
            fill(unit, tensors)
        del tensors
        return [self._adopt(layout, originals.pop(layout.index)) for layout in layouts]

    def _adopt(self, layout: ChunkLayout, original: torch.Tensor) -> ChunkState:
        """Put a chunk's first values where the plan has their home.

        Args:
            original: [num_elems] in the model's own dtype; may become the chunk's storage.
        """
        parameters = [self._by_name[item.name] for item in layout.fields]
        store = self._store(layout, original)
        chunk = ChunkState(layout, store, parameters, optim=self._optims[layout.index] if self._optims else None)
        if original.dtype is not layout.dtype:  # also of frozen parameters: their weights are not to be rounded
            chunk.has_master = True
            if chunk.optim is None:
                chunk.master = original[store.start : store.stop].to(store.shard.device, copy=True)
        if self._offloaded is not None:
            self._offloaded.store(chunk, original)
        self._point(chunk)
        if layout.trainable:
            self._cut(chunk)
        return chunk

    def _store(self, layout: ChunkLayout, original: torch.Tensor) -> ParameterStore:
        """Where a chunk's parameters lie, filled with their first values but for those that go to disk."""
        decision = self._plan.chunks[layout.index]
        on_disk, uploads = decision.parameter_home is Home.DISK, self._plan.brings_up(layout.index)
        if on_disk or self._device is not None:
            kind = UploadedParameters if uploads else OffloadedParameters
            store = (
                kind(layout.num_elems, layout.dtype)
                if self._transport is None or not decision.optimizer_sharded
                else self._transport.offloaded_parameters(layout.num_elems, layout.dtype, uploads)
            )
            if not on_disk and self._device is not None:
                owned = original[store.start : store.stop].to(layout.dtype)
                store.settle(self._device.home(owned, decision.parameter_home is Home.DEVICE))
            return store
        if self._transport is None or not decision.optimizer_sharded:
            return LocalParameters(original.to(layout.dtype))
        shared = self._transport.parameters(layout.num_elems, layout.dtype, decision.parameters_sharded)
        shared.fill(original.to(layout.dtype))
        return shared

    def _cut(self, chunk: ChunkState) -> None:
        """The pieces of a chunk that this rank updates. Those that move are flat, and of limited size."""
        store, layout = chunk.store, chunk.layout
        whole = self._transport is None or not self._plan.chunks[layout.index].gradients_sharded
        base = chunk.master if chunk.has_master else store.shard
        moves = chunk.moves_pieces or chunk.optim is not None
        for piece in owned_pieces(layout, store.start, store.stop):
            index = layout.fields.index(piece.field)
            step = TILE_ELEMS if moves else piece.stop - piece.start
            for start in range(piece.start, piece.stop, step):
                stop = min(start + step, piece.stop)
                if chunk.moves_pieces:
                    tensor = torch.empty(0, dtype=torch.float32 if chunk.has_master else layout.dtype)
                else:
                    assert base is not None
                    tensor = base[start - store.start : stop - store.start]
                if piece.is_whole and not moves:
                    tensor = tensor.view(piece.field.shape)
                chunk.pieces.append(
                    OwnedPiece(index, tensor, start - store.start, stop - start, start - (0 if whole else store.start))
                )
