"""State on a device with memory of its own: what UP, DOWN and the DROP of a device's copy do on one rank.

Owns the way of parameters from the host to the device and of gradients back. Does not own the arenas and the copies'
primitives (`memory/tiers.py`), what lies on disk (`runtime/offload.py`), nor when anything moves (programs).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from ..memory.tiers import Tiers
from ..parallel.placement import UploadedParameters
from ..scheduler.moves import DEVICE_COPY
from .chunk_state import ChunkState

__all__ = ["DeviceState"]


class DeviceState:
    """Carries out the moves between host and device of one rank.

    Args:
        tiers: with a buffer for everything that the program moves.
        point: makes a chunk's parameters point at its gathered copy, or at nothing.
    """

    def __init__(self, tiers: Tiers, point: Callable[[ChunkState], None]) -> None:
        self._tiers = tiers
        self._point = point

    @property
    def device(self) -> torch.device:
        return self._tiers.device.device

    def up(self, chunk: ChunkState) -> None:
        """UP: the device has a copy of the rank's part of the parameters."""
        buffer = self._tiers.device.buffer(f"{chunk.layout.name}:{DEVICE_COPY}")
        self._bring(chunk, buffer[: chunk.store.shard.nbytes].view(chunk.layout.dtype))

    def drop(self, chunk: ChunkState) -> None:
        """DROP: nobody looks at the device's copy any more."""
        assert isinstance(chunk.store, UploadedParameters)
        chunk.store.forget()
        self._point_at_copy(chunk)

    def down(self, chunk: ChunkState, gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """DOWN: a micro-batch's gradients, one for each parameter that has any, are in the host's buffer: returned."""
        flat = self._tiers.host.buffer(f"{chunk.layout.name}:grad")[: chunk.layout.num_bytes].view(chunk.layout.dtype)
        brought: list[torch.Tensor | None] = []
        with self._tiers.device.copying():
            for field, gradient in zip(chunk.layout.fields, gradients, strict=True):
                target = None
                if gradient is not None:
                    target = chunk.layout.view(flat, field)
                    target.copy_(gradient, non_blocking=True)
                brought.append(target)
        return brought

    def home(self, values: torch.Tensor, on_device: bool) -> torch.Tensor:
        """A copy of a flat tensor in memory that stays, on the device or on the host."""
        tier = self._tiers.device if on_device else self._tiers.host
        return tier.empty(values.numel(), values.dtype).copy_(values)

    @contextmanager
    def brought(self, chunk: ChunkState) -> Iterator[None]:
        """Between steps: the device has a copy, in memory of its own."""
        if not isinstance(chunk.store, UploadedParameters) or chunk.store.is_up:
            yield
            return
        self._bring(chunk, self._tiers.device.empty(chunk.store.shard.numel(), chunk.layout.dtype))
        try:
            yield
        finally:
            self.drop(chunk)

    def leave(self, chunk: ChunkState) -> None:
        """For good: the parameters themselves are what the model has, where they are whole and at home on the host."""
        store = chunk.store
        if isinstance(store, UploadedParameters) and not store.moves and not store.gathers:
            store.bring(store.shard)
            self._point(chunk)

    def _bring(self, chunk: ChunkState, target: torch.Tensor) -> None:
        assert isinstance(chunk.store, UploadedParameters)
        with self._tiers.device.copying():
            target.copy_(chunk.store.shard, non_blocking=True)
        chunk.store.bring(target)
        self._point_at_copy(chunk)

    def _point_at_copy(self, chunk: ChunkState) -> None:
        """What is gathered is no business of the shard's moves: other lanes gather and drop it at the same time."""
        assert isinstance(chunk.store, UploadedParameters)
        if not chunk.store.gathers:
            self._point(chunk)
