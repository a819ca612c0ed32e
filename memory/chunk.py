"""The layout of a chunk: which parameter lies where in one flat, contiguous storage.

Owns: offsets, alignment and padding, and cutting a module's parameters into chunks. Does not own: bytes (the
engine's placements hold them), ranks (`parallel/sharding.py`), or when a chunk moves (plans and programs).

A chunk holds parameters of one unit, of one dtype, all trainable or all frozen: frozen parameters then need neither
gradients nor optimizer slots, and every view stays aligned. Every parameter starts at a multiple of `ALIGN_BYTES`, as
torch's own allocator gives: matrix kernels may round differently by alignment, and results here are to be bit-exact.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

__all__ = ["ALIGN_BYTES", "ChunkLayout", "Field", "layout_chunk"]

ALIGN_BYTES = 64


@dataclass(frozen=True, slots=True)
class Field:
    """One parameter inside a chunk.

    Attributes:
        name: the parameter's first name in the model (tied parameters have one field).
        shape: its shape.
        start: offset of its first element in the chunk, in elements; a multiple of ALIGN_BYTES.
    """

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def num_elems(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def stop(self) -> int:
        return self.start + self.num_elems


@dataclass(frozen=True, slots=True)
class ChunkLayout:
    """Where the parameters of a chunk lie.

    Attributes:
        index: the chunk's number, its name in actions (`c7`).
        unit: name of the unit whose parameters it holds.
        dtype: of the parameters as the model computes with them.
        trainable: whether its parameters get gradients and optimizer slots.
        fields: the parameters, in the model's order, without overlap.
        num_elems: of the whole chunk, padding included.
    """

    index: int
    unit: str
    dtype: torch.dtype
    trainable: bool
    fields: tuple[Field, ...]
    num_elems: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the `param` slot, padding included."""
        return self.num_elems * self.dtype.itemsize

    @property
    def name(self) -> str:
        return f"c{self.index}"

    def view(self, flat: torch.Tensor, field: Field) -> torch.Tensor:
        """The parameter `field` as a view of the chunk's flat storage."""
        return flat[field.start : field.stop].view(field.shape)


def layout_chunk(
    index: int,
    unit: str,
    parameters: Sequence[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
    trainable: bool,
    num_shards: int = 1,
) -> ChunkLayout:
    """Lay parameters out one after the other, each aligned, the whole padded so that `num_shards` equal, aligned parts
    result (ALGORITHMS 1.4)."""
    align = max(1, ALIGN_BYTES // dtype.itemsize)
    fields: list[Field] = []
    offset = 0
    for name, parameter in parameters:
        fields.append(Field(name, tuple(parameter.shape), offset))
        offset += _round_up(parameter.numel(), align)
    return ChunkLayout(
        index, unit, dtype, trainable, tuple(fields), max(_round_up(offset, align * num_shards), align * num_shards)
    )


def total_bytes(layouts: Iterable[ChunkLayout]) -> int:
    """Bytes of the `param` slots of all chunks together, padding included."""
    return sum(layout.num_bytes for layout in layouts)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
