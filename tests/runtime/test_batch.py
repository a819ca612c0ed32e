"""Batches: counting, cutting, calling."""

from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from outgrow.runtime.batch import call_loss, call_model, cast_floats, num_samples, num_tokens, split_batch

Pair = namedtuple("Pair", ["inputs", "target"])


def rows(count: int, *more: int) -> torch.Tensor:
    return torch.arange(count * max(1, torch.Size(more).numel()), dtype=torch.float32).view(count, *more)


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        (rows(4), 4),
        (rows(4, 3), 4),
        ((rows(3, 2), torch.zeros(3, dtype=torch.int64)), 3),
        ({"x": rows(5, 2), "scale": torch.tensor(2.0), "name": "a"}, 5),
        ([rows(2), {"y": rows(2, 2)}], 2),
        (None, 0),
        (rows(0, 3), 0),
    ],
)
def test_samples_are_counted_by_the_first_dimension(batch, count):
    assert num_samples(batch) == count


@pytest.mark.parametrize("batch", [{}, 7, "text", torch.tensor(1.0), {"scale": torch.tensor(2.0)}])
def test_a_batch_without_samples_to_count_is_refused(batch):
    with pytest.raises(ValueError, match="no tensor with a first dimension"):
        num_samples(batch)


def test_tensors_that_disagree_are_refused():
    with pytest.raises(ValueError, match=r"different numbers of samples: \[3, 4\]"):
        num_samples((rows(4), rows(3)))


def test_tokens_are_the_elements_of_the_first_integers():
    ids = torch.zeros(4, 6, dtype=torch.int64)
    assert num_tokens({"weights": rows(4, 9), "input_ids": ids, "mask": torch.ones(4, 7, dtype=torch.bool)}) == 24
    assert num_tokens((rows(4, 9), torch.zeros(4, dtype=torch.int64))) == 4
    assert num_tokens(rows(4, 9)) == 4


@given(st.integers(0, 20), st.integers(1, 8))
def test_parts_put_together_are_the_batch_and_as_equal_as_can_be(count, parts):
    batch = (rows(count, 3), torch.arange(count))
    found = split_batch(batch, parts)
    assert len(found) == parts
    whole = [part for part in found if part is not None]
    if parts > 1:
        sizes = [num_samples(part) for part in found]
        assert sum(sizes) == count
        assert max(sizes) - min(sizes) <= 1
        assert sizes == sorted(sizes, reverse=True)
        assert all(part is None for part, size in zip(found, sizes, strict=True) if size == 0)
    for index, original in enumerate(batch):
        assert torch.equal(torch.cat([part[index] for part in whole]) if whole else original[:0], original)


def test_one_part_is_the_batch_itself():
    batch = object()
    assert split_batch(batch, 1) == [batch]


def test_structures_keep_their_kind_and_what_has_no_samples_is_repeated():
    batch = {
        "x": rows(4, 2),
        "names": ["a", "b", "c", "d"],
        "scale": torch.tensor(3.0),
        "nested": Pair(rows(4), (rows(4), "same")),
        "short": [1, 2],
        "flag": True,
    }
    first, second = split_batch(batch, 2)
    assert torch.equal(first["x"], rows(4, 2)[:2])
    assert torch.equal(second["x"], rows(4, 2)[2:])
    assert (first["names"], second["names"]) == (["a", "b"], ["c", "d"])
    assert first["scale"].item() == second["scale"].item() == 3.0
    assert isinstance(first["nested"], Pair)
    assert torch.equal(second["nested"].target[0], rows(4)[2:])
    assert second["nested"].target[1] == "same"
    assert first["short"] == second["short"] == [1, 2]
    assert second["flag"] is True
    assert type(first) is dict


def test_mappings_of_other_kinds_stay_what_they_are():
    class Encoding(OrderedDict):
        """As tokenizers give."""

    batch = Encoding(input_ids=torch.zeros(4, 6, dtype=torch.int64), weights=rows(4))
    assert num_samples(batch) == num_samples((batch, rows(4))) == 4
    assert num_tokens(batch) == 24
    _, second = split_batch(batch, 2)
    assert isinstance(second, Encoding)
    assert torch.equal(second["weights"], rows(4)[2:])
    cast = cast_floats((batch, 1), torch.bfloat16)[0]
    assert isinstance(cast, Encoding)
    assert (cast["weights"].dtype, cast["input_ids"].dtype) == (torch.bfloat16, torch.int64)


def test_parts_share_the_batch_s_memory():
    batch = rows(4, 2)
    assert split_batch(batch, 2)[0].data_ptr() == batch.data_ptr()


class Notes(nn.Module):
    def forward(self, *args: object, **kwargs: object) -> tuple[object, object]:
        return args, kwargs


@pytest.mark.parametrize(
    ("batch", "has_loss", "args", "kwargs"),
    [
        ({"x": 1, "y": 2}, True, (), {"x": 1, "y": 2}),
        ((1, 2, 3), True, (1, 2), {}),
        ((1, 2, 3), False, (1, 2, 3), {}),
        ([1, 2], True, (1,), {}),
        ((1,), True, (1,), {}),
        (7, True, (7,), {}),
    ],
)
def test_batches_go_into_models_by_convention(batch, has_loss, args, kwargs):
    assert call_model(Notes(), batch, has_loss) == (args, kwargs)


def test_a_loss_gets_the_target_or_the_whole_batch():
    seen = []

    def loss(output: object, target: object) -> torch.Tensor:
        seen.append((output, target))
        return torch.tensor([2.5])

    for batch, target in (((1, 2), 2), ([1, 3], 3), ({"x": 1}, {"x": 1}), (9, 9), ((4,), (4,))):
        value = call_loss(loss, "out", batch)
        assert value.shape == ()
        assert value.item() == 2.5
        assert seen[-1] == ("out", target)


@pytest.mark.parametrize(
    "output",
    [torch.tensor(1.5), torch.tensor([[1.5]]), {"loss": torch.tensor(1.5)}, SimpleNamespace(loss=torch.tensor(1.5))],
)
def test_without_a_loss_the_output_has_it(output):
    assert call_loss(None, output, None).item() == 1.5


@pytest.mark.parametrize(
    ("output", "found"),
    [
        (torch.zeros(2, 3), r"a tensor of shape \(2, 3\)"),
        ("text", "NoneType"),
        ({"logits": torch.zeros(1)}, "NoneType"),
        ({"loss": 1.5}, "float"),
        ((torch.tensor(1.0),), "NoneType"),
    ],
)
def test_what_is_no_loss_is_refused(output, found):
    with pytest.raises(ValueError, match=f"it is {found}: give `loss="):
        call_loss(None, output, None)


def test_only_floats_are_cast():
    ids = torch.zeros(2, dtype=torch.int64)
    found = cast_floats({"x": rows(2), "ids": ids, "more": [rows(2).double(), "text"]}, torch.bfloat16)
    assert found["x"].dtype is torch.bfloat16
    assert found["ids"] is ids
    assert found["more"][0].dtype is torch.bfloat16
    assert found["more"][1] == "text"
