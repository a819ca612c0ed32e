"""What one pass over memory earns: summing ranks and squaring at once, by numba, against torch's several passes.

`pytest tests/perf/test_bench_kernels.py --benchmark-enable` times them; without it each runs once and is checked.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from outgrow.parallel.kernels import sum_ranks, sum_ranks_torch

NUM_ELEMS = 4 * 2**20  # 16 MiB a rank: far more than the caches hold
NUM_ELEMS_UNTIMED = 100_003

Kernel = Callable[[torch.Tensor, torch.Tensor, bool], float]


def whole_tensors(parts: torch.Tensor, out: torch.Tensor, accumulate: bool) -> float:
    """The obvious way: three operations, each over everything."""
    total = parts.sum(dim=0)
    if accumulate:
        out += total
    else:
        out.copy_(total)
    return torch.dot(out, out).item()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As a rank has it that shares its machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("accumulate", [False, True], ids=["set", "accumulate"])
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize(
    "kernel", [sum_ranks, sum_ranks_torch, whole_tensors], ids=["numba", "torch-blocked", "torch-whole"]
)
def test_bench_sum_of_ranks(benchmark: BenchmarkFixture, kernel: Kernel, num_ranks: int, accumulate: bool) -> None:
    benchmark.group = f"sum of {num_ranks} ranks, {'accumulate' if accumulate else 'set'}"
    generator = torch.Generator().manual_seed(0)
    num_elems = NUM_ELEMS if benchmark.enabled else NUM_ELEMS_UNTIMED
    parts = torch.randn(num_ranks, num_elems, generator=generator)
    out = torch.ones(num_elems)
    squares = kernel(parts, out, accumulate)
    expected = parts.double().sum(dim=0) + accumulate
    assert torch.allclose(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert squares == pytest.approx(expected.square().sum().item(), rel=1e-5)
    benchmark(kernel, parts, out, accumulate)
    benchmark.extra_info["bytes"] = parts.nbytes + out.nbytes * (1 + accumulate)


def test_bench_memory_copy(benchmark: BenchmarkFixture) -> None:
    """The yardstick: one read and one write of 16 MiB."""
    source, target = torch.ones(NUM_ELEMS), torch.empty(NUM_ELEMS)
    benchmark(target.copy_, source)
    assert torch.equal(source, target)
