"""One chunk's slots on one rank: the record that the managers of a model's state share.

Owns the record, and where optimizer slots lie inside one buffer. Does not own what is done with it
(`runtime/model_state.py`), nor when it is in memory (`runtime/offload.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ..memory.chunk import ChunkLayout
from ..memory.direct_io import round_up
from ..parallel.placement import ParameterStore

__all__ = ["ChunkState", "OptimLayout", "OwnedPiece", "Places"]

MASTER = "master"


@dataclass
class OwnedPiece:
    """A part of a parameter that this rank updates.

    Attributes:
        index: of the parameter's field in the chunk.
        tensor: what the optimizer holds: the same object from first to last, wherever its data lie.
        start: its place in the owned range, in elements.
        num_elems: of it.
        gradient_start: its place in the chunk's summed gradients.
    """

    index: int
    tensor: torch.Tensor
    start: int
    num_elems: int
    gradient_start: int


@dataclass
class ChunkState:
    """One chunk's slots on one rank.

    Attributes:
        store: of the parameters.
        parameters: the model's, in the order of the layout's fields.
        master: float32 of the owned range where the model computes in another dtype, else None; None too while it is
            on disk.
        has_master: whether there is one at all.
        sums: float32 gradients summed over ranks and micro-batches: of the owned range, or of the whole chunk.
        squares: sum of squares of `sums` over the owned range.
        gradients: what a micro-batch's backward made, per field, between the parameters and the sums; None: it is
            still where autograd made it.
        used: per field, whether any rank had a gradient in this step.
        optim: where its optimizer slots lie in one buffer, if their home is the disk.
        optim_is_written: whether the optimizer's slots are on disk; before the first update the master alone is.
        slots: those slots while they are in memory: name -> [owned range].
    """

    layout: ChunkLayout
    store: ParameterStore
    parameters: list[nn.Parameter]
    master: torch.Tensor | None = None
    has_master: bool = False
    sums: torch.Tensor | None = None
    squares: float = 0.0
    gradients: list[torch.Tensor | None] | None = None
    used: torch.Tensor | None = None
    pieces: list[OwnedPiece] = field(default_factory=list)
    optim: "OptimLayout | None" = None
    optim_is_written: bool = False
    slots: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def is_offloaded(self) -> bool:
        """Whether the parameters' home is the disk."""
        return self.store.moves

    @property
    def moves_pieces(self) -> bool:
        """Whether the data of the pieces lie elsewhere at every update."""
        return self.is_offloaded or (self.optim is not None and self.has_master)

    def slots_of(self, piece: OwnedPiece) -> dict[str, torch.Tensor]:
        """A piece's part of the slots that are in memory, the master left out."""
        stop = piece.start + piece.num_elems
        return {name: slot[piece.start : stop] for name, slot in self.slots.items() if name != MASTER}


class Places:
    """Where chunks lie that units compute with now: to tell a view of one from any other tensor, at once."""

    def __init__(self) -> None:
        self._chunks: dict[int, ChunkState] = {}  # by the address of the storage

    def put(self, chunk: ChunkState) -> None:
        """It has come, gone, or moved. Lanes may say so of several chunks at the same time."""
        for address in [address for address, other in self._chunks.copy().items() if other is chunk]:
            del self._chunks[address]
        full = chunk.store.full
        if full is not None and full.numel() > 0:
            self._chunks[full.untyped_storage().data_ptr()] = chunk

    def chunk_at(self, address: int) -> ChunkState | None:
        """The chunk whose storage begins there."""
        return self._chunks.get(address)


@dataclass(frozen=True)
class OptimLayout:
    """Where the slots of an owned range lie in one buffer: one after the other, each from a whole page on.

    Attributes:
        num_elems: of the owned range.
        dtypes: slot -> dtype; `master` first, where there is one.
    """

    num_elems: int
    dtypes: Mapping[str, torch.dtype]

    @property
    def num_bytes(self) -> int:
        return sum(round_up(self.num_elems * dtype.itemsize) for dtype in self.dtypes.values())

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Slot -> its elements in `buffer` (uint8)."""
        views: dict[str, torch.Tensor] = {}
        start = 0
        for name, dtype in self.dtypes.items():
            num_bytes = self.num_elems * dtype.itemsize
            views[name] = buffer[start : start + num_bytes].view(dtype)
            start += round_up(num_bytes)
        return views
