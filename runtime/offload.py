"""State at home on the disk tier: what READ, WRITE and DROP of a chunk's slots do on one rank.

Owns the slots' way between the disk tier's buffers and the model's parameters, masters and optimizer. Does not own
buffers and files (`runtime/disk_tier.py`), nor what an update is (`runtime/model_state.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ..memory.chunk import ChunkLayout
from ..parallel.actions import Action
from ..parallel.placement import OffloadedParameters
from ..scheduler.plan import Home, Plan
from .chunk_state import MASTER, ChunkState, OptimLayout
from .optimizer import PiecewiseOptimizer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .disk_tier import DiskTier

__all__ = ["OffloadedState", "optim_layouts", "state_extents"]


def optim_layouts(
    layouts: Sequence[ChunkLayout],
    plan: Plan,
    slots: Mapping[str, torch.dtype],
    original_dtypes: Mapping[str, torch.dtype],
) -> list[OptimLayout | None]:
    """For each chunk whose optimizer slots are at home on disk, where they lie; None for the others, and where there is
    nothing to keep."""
    result: list[OptimLayout | None] = []
    for layout, decision in zip(layouts, plan.chunks, strict=True):
        kept: dict[str, torch.dtype] = {}
        if original_dtypes[layout.fields[0].name] is not layout.dtype:
            kept[MASTER] = original_dtypes[layout.fields[0].name]
        if layout.trainable:
            kept |= slots
        owned = layout.num_elems // (plan.world_size if decision.optimizer_sharded else 1)
        on_disk = decision.optimizer_home is Home.DISK and kept
        result.append(OptimLayout(owned, kept) if on_disk else None)
    return result


def state_extents(layouts: Sequence[ChunkLayout], plan: Plan, optims: Sequence[OptimLayout | None]) -> dict[str, int]:
    """Everything that a rank keeps on disk: extent -> bytes."""
    extents: dict[str, int] = {}
    for layout, decision, optim in zip(layouts, plan.chunks, optims, strict=True):
        if decision.parameter_home is Home.DISK:
            extents[f"{layout.name}:param"] = layout.num_bytes // (plan.world_size if decision.optimizer_sharded else 1)
        if optim is not None:
            extents[f"{layout.name}:optim"] = optim.num_bytes
    return extents


class OffloadedState:
    """Carries out the moves between disk and host of one rank.

    Args:
        tier: the disk tier, with an extent for everything of `state_extents`.
        optimizer: whose slots move.
        point: makes a chunk's parameters point at its gathered copy, or at nothing.
    """

    def __init__(self, tier: "DiskTier", optimizer: PiecewiseOptimizer, point: Callable[[ChunkState], None]) -> None:
        self._tier = tier
        self._optimizer = optimizer
        self._point = point
        self.kept: frozenset[str] = frozenset()
        """Buffers that keep what was written, for the next step's first READ (`Program.kept`)."""

    def read(self, chunk: ChunkState, action: Action) -> "Callable[[], None] | None":
        """READ: a slot is in its buffer, and everyone finds it there; at once, or when the result was called. One that
        was kept is there already."""
        name = f"{chunk.layout.name}:{action.slot}"
        if name in self.kept and self._is_attached(chunk, action):
            return None
        buffer = self._tier.buffer(name)
        attach = self._attach_parameters if action.slot == "param" else self._attach_slots
        if not self._tier.is_written(name):  # slots that no update has made yet
            attach(chunk, buffer)
            return None
        ticket = self._tier.read(name)

        def end() -> None:
            ticket.wait()
            attach(chunk, buffer)

        return end

    def write(self, chunk: ChunkState, action: Action) -> "Callable[[], None]":
        """WRITE: a slot is on disk when the result was called, and nobody looks at its buffer any more, unless it is
        kept."""
        name = f"{chunk.layout.name}:{action.slot}"
        ticket = self._tier.write(name)

        def end() -> None:
            ticket.wait()
            chunk.optim_is_written |= action.slot == "optim"
            if name not in self.kept:
                self.drop(chunk, action)

        return end

    def _is_attached(self, chunk: ChunkState, action: Action) -> bool:
        if action.slot == "optim":
            return bool(chunk.slots)
        return isinstance(chunk.store, OffloadedParameters) and chunk.store.is_attached

    def drop(self, chunk: ChunkState, action: Action) -> None:
        """DROP: nobody looks at a slot's buffer any more."""
        if action.slot == "param":
            self._detach_parameters(chunk)
        else:
            self._detach_slots(chunk)

    def drop_all(self, chunk: ChunkState) -> None:
        """After a failed step: as between steps."""
        if chunk.is_offloaded:
            self._detach_parameters(chunk)
        if chunk.optim is not None:
            self._detach_slots(chunk)

    def store(self, chunk: ChunkState, original: torch.Tensor) -> None:
        """Put a chunk's first values to where they are at home.

        Args:
            original: [num_elems], the whole chunk in the model's own dtype.
        """
        owned = original[chunk.store.start : chunk.store.stop]
        if chunk.is_offloaded:
            self._store_extent(f"{chunk.layout.name}:param", {0: owned.to(chunk.layout.dtype)})
        if chunk.optim is not None and MASTER in chunk.optim.dtypes:
            self._store_extent(f"{chunk.layout.name}:optim", {0: owned})

    def _store_extent(self, name: str, parts: Mapping[int, torch.Tensor]) -> None:
        with self._tier.staging(name) as staging:
            bytes_ = staging.tensor()
            for start, part in parts.items():
                bytes_[start : start + part.nbytes].copy_(part.contiguous().view(torch.uint8))
            self._tier.write(name, bytes_).wait()
            del bytes_

    @contextmanager
    def in_memory(self, chunk: ChunkState, with_master: bool) -> "Iterator[None]":
        """Between steps: parameters (and the master, if asked for) are in memory of their own."""
        stagings = []
        bring_parameters = isinstance(chunk.store, OffloadedParameters) and not chunk.store.is_attached
        bring_master = with_master and chunk.has_master and chunk.master is None
        try:
            if bring_parameters:
                stagings.append(self._tier.staging(f"{chunk.layout.name}:param"))
                buffer = stagings[-1].tensor()
                self._tier.read(f"{chunk.layout.name}:param", buffer).wait()
                self._attach_parameters(chunk, buffer)
            if bring_master:
                assert chunk.optim is not None
                stagings.append(self._tier.staging(f"{chunk.layout.name}:optim"))
                buffer = stagings[-1].tensor()
                self._tier.read(f"{chunk.layout.name}:optim", buffer).wait()
                chunk.master = chunk.optim.views(buffer)[MASTER]
            yield
        finally:
            if bring_parameters:
                self._detach_parameters(chunk)
            if bring_master:
                chunk.master = None
            for staging in stagings:
                staging.close()

    def _attach_parameters(self, chunk: ChunkState, buffer: torch.Tensor) -> None:
        assert isinstance(chunk.store, OffloadedParameters)
        owned = chunk.store.stop - chunk.store.start
        chunk.store.attach(buffer[: owned * chunk.layout.dtype.itemsize].view(chunk.layout.dtype))
        self._point_at_shard(chunk)

    def _detach_parameters(self, chunk: ChunkState) -> None:
        assert isinstance(chunk.store, OffloadedParameters)
        chunk.store.detach()
        self._point_at_shard(chunk)

    def _point_at_shard(self, chunk: ChunkState) -> None:
        """A gathered copy is no business of the shard's moves: other lanes gather and drop it at the same time."""
        assert isinstance(chunk.store, OffloadedParameters)
        if chunk.store.computes_with_shard:
            self._point(chunk)

    def _attach_slots(self, chunk: ChunkState, buffer: torch.Tensor) -> None:
        assert chunk.optim is not None
        chunk.slots = chunk.optim.views(buffer)
        chunk.master = chunk.slots.get(MASTER)
        for piece in chunk.pieces:
            views = chunk.slots_of(piece)
            if not chunk.optim_is_written or not self._optimizer.has_slots(piece.tensor):
                self._optimizer.begin(piece.tensor, views)
            else:
                self._optimizer.attach(piece.tensor, views)

    def _detach_slots(self, chunk: ChunkState) -> None:
        chunk.slots = {}
        chunk.master = None
        for piece in chunk.pieces:
            self._optimizer.detach(piece.tensor)
