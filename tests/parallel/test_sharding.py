"""Sharding arithmetic: shards put together again are the chunk, and pieces cover what was asked for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outgrow.memory.chunk import layout_chunk
from outgrow.parallel.sharding import owned_pieces, shard_range

SIZES = st.lists(st.integers(0, 300), min_size=1, max_size=6)


def layout_of(sizes: list[int], num_shards: int, dtype: torch.dtype = torch.float32):
    named = [(f"p{index}", torch.empty(size, device="meta")) for index, size in enumerate(sizes)]
    return layout_chunk(0, "u", named, dtype, True, num_shards)


@given(SIZES, st.integers(1, 8), st.sampled_from([torch.float32, torch.bfloat16]))
def test_gathering_shards_gives_the_chunk_back(sizes, num_ranks, dtype):
    layout = layout_of(sizes, num_ranks, dtype)
    chunk = torch.arange(layout.num_elems)
    ranges = [shard_range(layout.num_elems, num_ranks, rank) for rank in range(num_ranks)]
    assert torch.equal(torch.cat([chunk[start:stop] for start, stop in ranges]), chunk)
    assert len({stop - start for start, stop in ranges}) == 1


@given(SIZES, st.integers(1, 8))
def test_the_pieces_of_all_ranks_cover_every_parameter_exactly_once(sizes, num_ranks):
    layout = layout_of(sizes, num_ranks)
    times = torch.zeros(layout.num_elems, dtype=torch.int64)
    values = torch.arange(layout.num_elems)
    parts: dict[str, list[torch.Tensor]] = {field.name: [] for field in layout.fields}
    for rank in range(num_ranks):
        start, stop = shard_range(layout.num_elems, num_ranks, rank)
        for piece in owned_pieces(layout, start, stop):
            assert start <= piece.start < piece.stop <= stop
            assert piece.field.start <= piece.start
            assert piece.stop <= piece.field.stop
            assert piece.is_whole == (piece.stop - piece.start == piece.field.num_elems)
            times[piece.start : piece.stop] += 1
            parts[piece.field.name].append(values[piece.start : piece.stop])
    for field in layout.fields:
        assert torch.equal(torch.cat([*parts[field.name], values[:0]]), values[field.start : field.stop])
        times[field.start : field.stop] -= 1
    assert not times.any(), "padding belongs to no piece"


@given(SIZES, st.integers(0, 2000), st.integers(0, 2000))
def test_any_range_is_covered(sizes, first, second):
    layout = layout_of(sizes, 1)
    start, stop = sorted((min(first, layout.num_elems), min(second, layout.num_elems)))
    owned = [place for piece in owned_pieces(layout, start, stop) for place in range(piece.start, piece.stop)]
    expected = [place for f in layout.fields for place in range(f.start, f.stop) if start <= place < stop]
    assert owned == expected


def test_a_size_that_does_not_divide_is_padded_and_the_padding_is_the_last_ranks():
    layout = layout_of([10007], 4)
    assert layout.num_elems == 10048
    ranges = [shard_range(layout.num_elems, 4, rank) for rank in range(4)]
    assert ranges == [(0, 2512), (2512, 5024), (5024, 7536), (7536, 10048)]
    last = owned_pieces(layout, *ranges[3])
    assert [(piece.start, piece.stop, piece.is_whole) for piece in last] == [(7536, 10007, False)]


def test_the_last_ranks_of_a_small_chunk_own_padding_alone():
    layout = layout_of([5], 4)
    assert [len(owned_pieces(layout, *shard_range(layout.num_elems, 4, rank))) for rank in range(4)] == [1, 0, 0, 0]


def test_a_parameter_may_straddle_ranks():
    layout = layout_of([16, 32, 16], 2)
    pieces = [owned_pieces(layout, *shard_range(64, 2, rank)) for rank in range(2)]
    found = [[(piece.field.name, piece.start, piece.stop, piece.is_whole) for piece in part] for part in pieces]
    assert found == [
        [("p0", 0, 16, True), ("p1", 16, 32, False)],
        [("p1", 32, 48, False), ("p2", 48, 64, True)],
    ]


@pytest.mark.parametrize(("num_elems", "size", "rank"), [(10, 3, 0), (12, 3, 3), (12, 3, -1)])
def test_what_cannot_be_is_our_own_mistake(num_elems, size, rank):
    with pytest.raises(AssertionError):
        shard_range(num_elems, size, rank)
