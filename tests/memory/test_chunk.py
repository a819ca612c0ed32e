"""The layout of a chunk: alignment, padding, views."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outgrow.memory.chunk import ALIGN_BYTES, ChunkLayout, Field, layout_chunk

SHAPES = st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), max_size=6)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.uint8])


def named(shapes: list[tuple[int, ...]]) -> list[tuple[str, torch.Tensor]]:
    return [(f"p{index}", torch.empty(shape, device="meta")) for index, shape in enumerate(shapes)]


@given(SHAPES, DTYPES, st.integers(1, 8))
def test_parameters_lie_aligned_and_in_order_without_overlap(shapes, dtype, num_shards):
    layout = layout_chunk(3, "unit", named(shapes), dtype, True, num_shards)
    assert [(f.name, f.shape) for f in layout.fields] == [(f"p{i}", shape) for i, shape in enumerate(shapes)]
    end = 0
    for field in layout.fields:
        assert field.start * dtype.itemsize % ALIGN_BYTES == 0
        assert field.start >= end
        assert field.stop - field.start == field.num_elems == torch.Size(field.shape).numel()
        assert (field.start - end) * dtype.itemsize < ALIGN_BYTES, "a gap wider than alignment asks for"
        end = field.stop
    assert layout.num_elems >= end


@given(SHAPES, DTYPES, st.integers(1, 8))
def test_a_chunk_divides_into_equal_aligned_shards_with_as_little_padding_as_that_takes(shapes, dtype, num_shards):
    layout = layout_chunk(0, "unit", named(shapes), dtype, True, num_shards)
    assert layout.num_elems % num_shards == 0
    assert layout.num_bytes // num_shards % ALIGN_BYTES == 0
    end = layout.fields[-1].stop if layout.fields else 0
    assert layout.num_bytes - end * dtype.itemsize < ALIGN_BYTES * (num_shards + 1)
    assert layout.num_bytes >= ALIGN_BYTES * num_shards, "even a chunk without elements has a shard for every rank"


def test_a_layout_by_hand():
    layout = layout_chunk(7, "blocks.2", named([(3, 5), (1,), (16,)]), torch.float32, True, 4)
    assert [(f.start, f.stop) for f in layout.fields] == [(0, 15), (16, 17), (32, 48)]
    assert layout.num_elems == 64
    assert layout.num_bytes == 256
    assert layout.name == "c7"
    assert (layout.index, layout.unit, layout.dtype, layout.trainable) == (7, "blocks.2", torch.float32, True)


def test_narrow_types_are_aligned_by_bytes():
    layout = layout_chunk(0, "u", named([(3,), (3,)]), torch.bfloat16, False, 1)
    assert layout.fields[1].start == 32
    assert layout.num_bytes == 128


def test_a_scalar_has_one_element_and_an_empty_parameter_none():
    layout = layout_chunk(0, "u", named([(), (0, 4), (2,)]), torch.float32, True, 1)
    assert [f.num_elems for f in layout.fields] == [1, 0, 2]
    assert [f.start for f in layout.fields] == [0, 16, 16]


def test_a_view_shares_the_flat_storage():
    layout = layout_chunk(0, "u", named([(2, 3), (4,)]), torch.float32, True, 1)
    flat = torch.arange(layout.num_elems, dtype=torch.float32)
    view = layout.view(flat, layout.fields[1])
    assert view.tolist() == [16, 17, 18, 19]
    assert layout.view(flat, layout.fields[0]).shape == (2, 3)
    view.fill_(-1)
    assert flat[16:20].tolist() == [-1, -1, -1, -1]
    assert flat[15] == 15
    assert flat[20] == 20
    assert view.data_ptr() == flat.data_ptr() + 64


def test_layouts_are_values():
    field = Field("w", (2,), 0)
    first = ChunkLayout(0, "u", torch.float32, True, (field,), 16)
    assert first == ChunkLayout(0, "u", torch.float32, True, (Field("w", (2,), 0),), 16)
    with pytest.raises(AttributeError):
        field.start = 3  # pyright: ignore[reportAttributeAccessIssue]
