"""Sums over ranks: the bits of the naive sum in rank order, wherever a range is cut."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outgrow.parallel.kernels import BLOCK, sum_ranks, sum_ranks_torch

SIZES = [1, 7, 8, 9, 1000, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 13]
KERNELS = pytest.mark.parametrize("kernel", [sum_ranks, sum_ranks_torch])


def gradients(num_ranks: int, num_elems: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Numbers of very different sizes: another order of adding gives other bits."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num_ranks, num_elems, generator=generator)
    return (values * 10 ** torch.randint(-4, 5, (num_ranks, num_elems), generator=generator)).to(dtype)


def naive(parts: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
    """The sum over the ranks in rank order, each addition rounded to float32, then onto what was there."""
    total = parts[0].float().numpy().copy()
    for part in parts[1:]:
        total = (total + part.float().numpy()).astype(np.float32)
    return torch.from_numpy(total if before is None else (before.numpy() + total).astype(np.float32))


def squares_of(out: torch.Tensor) -> float:
    return float((out.double() ** 2).sum())


@KERNELS
@pytest.mark.parametrize("num_elems", SIZES)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_the_bits_are_those_of_the_naive_sum_in_rank_order(kernel, num_elems, num_ranks):
    parts = gradients(num_ranks, num_elems)
    out = torch.full((num_elems,), float("nan"))
    squares = kernel(parts, out, False)
    assert torch.equal(out, naive(parts, None))
    assert squares == pytest.approx(squares_of(out), rel=1e-5)


@KERNELS
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_accumulating_adds_the_whole_sum_to_what_is_there(kernel, num_ranks):
    first, second = gradients(num_ranks, 5000, 1), gradients(num_ranks, 5000, 2)
    out = torch.empty(5000)
    kernel(first, out, False)
    before = out.clone()
    squares = kernel(second, out, True)
    assert torch.equal(out, naive(second, before))
    assert squares == pytest.approx(squares_of(out), rel=1e-5), "of what is there afterwards, not of what was added"


def test_the_order_of_the_ranks_matters_to_these_numbers():
    parts = gradients(3, 1000)
    assert not torch.equal(naive(parts, None), naive(parts.flip(0), None)), "the tests above would show nothing"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("num_elems", [1, 8191, 70001])
def test_narrow_gradients_are_summed_in_float32(dtype, num_ranks, num_elems):
    parts = gradients(num_ranks, num_elems).clamp(-1000, 1000).to(dtype)
    out = torch.empty(num_elems)
    squares = sum_ranks(parts, out, False)
    assert torch.equal(out, naive(parts, None))
    assert squares == pytest.approx(squares_of(out), rel=1e-4)
    sum_ranks(parts, out, True)
    assert torch.equal(out, naive(parts, naive(parts, None)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=30)
@given(cuts=st.lists(st.integers(0, 9000), max_size=5), accumulate=st.booleans())
def test_the_sum_does_not_depend_on_how_a_range_is_cut(dtype, cuts, accumulate):
    parts = gradients(3, 9000, dtype=dtype)
    before = gradients(1, 9000, 7)[0]
    whole, pieces = before.clone(), before.clone()
    sum_ranks(parts, whole, accumulate)
    borders = [0, *sorted(cuts), 9000]
    for start, stop in pairwise(borders):
        sum_ranks(parts[:, start:stop], pieces[start:stop], accumulate)
    assert torch.equal(whole, pieces)


def test_the_sum_of_squares_is_formed_in_double_precision():
    num_elems = 2 * BLOCK + 5
    parts = torch.ones(1, num_elems)
    parts[0, 0] = 2.0**13  # in float32, 2**26 and a few thousand ones lose most of the ones
    assert sum_ranks(parts, torch.empty(num_elems), False) == 2.0**26 + num_elems - 1


def test_the_same_range_gives_the_same_squares():
    parts = gradients(2, 9999)
    first, second = torch.empty(9999), torch.empty(9999)
    assert sum_ranks(parts, first, False) == sum_ranks(parts, second, False)


@KERNELS
def test_what_is_not_finite_is_passed_on(kernel):
    parts = torch.ones(2, 10)
    parts[1, 3], parts[0, 5] = float("nan"), float("inf")
    out = torch.zeros(10)
    squares = kernel(parts, out, False)
    assert out[3].isnan()
    assert out[5].isinf()
    assert not np.isfinite(squares)
    assert out[[0, 1, 2, 4, 6, 7, 8, 9]].tolist() == [2.0] * 8


@KERNELS
def test_nothing_to_sum_is_nothing(kernel):
    assert kernel(torch.empty(3, 0), torch.empty(0), False) == 0.0


@KERNELS
def test_gradients_are_left_as_they_were(kernel):
    parts = gradients(3, 100)
    before = parts.clone()
    kernel(parts, torch.zeros(100), True)
    assert torch.equal(parts, before)
