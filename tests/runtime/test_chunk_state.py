"""Where chunks lie: found by the address of what units compute with, as it comes, moves and goes."""

import torch

from outgrow.memory.chunk import ChunkLayout, Field
from outgrow.parallel.placement import OffloadedParameters
from outgrow.runtime.chunk_state import ChunkState, Places


def state(index: int) -> tuple[ChunkState, OffloadedParameters]:
    layout = ChunkLayout(index, f"unit{index}", torch.float32, True, (Field(f"w{index}", (4,), 0),), 4)
    store = OffloadedParameters(4, torch.float32)
    return ChunkState(layout, store, []), store


def test_a_chunk_is_found_where_it_lies_now_and_nowhere_else() -> None:
    places, (one, first), (two, second) = Places(), state(0), state(1)
    buffer, other = torch.zeros(4), torch.zeros(4)
    addresses = [each.untyped_storage().data_ptr() for each in (buffer, other)]

    def found() -> list[int | None]:
        chunks = [places.chunk_at(address) for address in addresses]
        return [None if chunk is None else chunk.layout.index for chunk in chunks]

    places.put(one)
    assert places.chunk_at(0) is None, "what is not in memory has no address"
    first.attach(buffer)
    places.put(one)
    assert found() == [0, None]
    first.attach(other)
    places.put(one)
    assert found() == [None, 0], "it has moved"
    second.attach(buffer)
    places.put(two)
    assert found() == [1, 0]
    first.detach()
    places.put(one)
    assert found() == [1, None]
