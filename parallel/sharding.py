"""Sharding arithmetic: which part of a chunk a rank owns, and which piece of which parameter that is.

Owns numbers only. Sharding is by equal contiguous parts of the flat chunk (ZeRO; ALGORITHMS 1.4): a parameter may
straddle ranks, and the last ranks may own padding alone.
"""

from dataclasses import dataclass

from ..memory.chunk import ChunkLayout, Field

__all__ = ["Piece", "owned_pieces", "shard_range"]


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of one parameter that lies in a range of a chunk.

    Attributes:
        field: the parameter.
        start, stop: the piece's place in the chunk, in elements.
    """

    field: Field
    start: int
    stop: int

    @property
    def is_whole(self) -> bool:
        return self.start == self.field.start and self.stop == self.field.stop


def shard_range(num_elems: int, size: int, rank: int) -> tuple[int, int]:
    """`[start, stop)` of the elements that `rank` of `size` owns; padding sees to it that `num_elems` divides."""
    assert num_elems % size == 0, f"{num_elems} elements do not divide by {size} ranks: the layout was not padded"
    assert 0 <= rank < size, f"rank {rank} of {size}"
    part = num_elems // size
    return rank * part, (rank + 1) * part


def owned_pieces(layout: ChunkLayout, start: int, stop: int) -> tuple[Piece, ...]:
    """The pieces of parameters that lie in `[start, stop)` of the chunk, in order; empty ones are left out."""
    pieces = []
    for field in layout.fields:
        low, high = max(field.start, start), min(field.stop, stop)
        if low < high:
            pieces.append(Piece(field, low, high))
    return tuple(pieces)
