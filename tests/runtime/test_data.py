import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from outgrow.runtime.config import TrainConfig
from outgrow.runtime.data import DataError, check_data, open_data, row_bounds


class Numbers(Dataset):
    """Sample i is (i, -i); counts which samples were fetched."""

    def __init__(self, length):
        self.length, self.fetched = length, []

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.fetched.append(index)
        return torch.tensor(index), torch.tensor(-index)


class Stream(IterableDataset):
    def __init__(self, length, noise=lambda: 0.0):
        self.length, self.noise = length, noise

    def __iter__(self):
        for index in range(self.length):
            yield {"x": torch.tensor(float(index)) + self.noise()}


def epochs(data, num_ranks, num_epochs=1, **arguments):
    """Per epoch and batch: the rows of all ranks put together again, and the number of rows that each rank got."""
    sources = [open_data(data, TrainConfig(**arguments), rank, num_ranks) for rank in range(num_ranks)]
    together = []
    for epoch in range(num_epochs):
        for parts in zip(*(source.epoch(epoch) for source in sources), strict=True):
            leaves = [first(part.samples) for part in parts]
            rows = [value for leaf in leaves if leaf is not None for value in leaf.tolist()]
            assert all(part.num_samples == len(rows) and part.epoch == epoch for part in parts)
            together.append((rows, [0 if leaf is None else len(leaf) for leaf in leaves]))
    return together


def first(samples):
    if samples is None:
        return None
    if isinstance(samples, dict):
        return next(iter(samples.values()))
    return samples[0] if isinstance(samples, list | tuple) else samples


@given(st.integers(0, 50), st.integers(1, 7))
def test_row_bounds_are_those_of_tensor_split(num_rows, num_ranks):
    parts = torch.tensor_split(torch.arange(num_rows), num_ranks)
    for rank, part in enumerate(parts):
        assert torch.arange(num_rows)[slice(*row_bounds(num_rows, rank, num_ranks))].tolist() == part.tolist()


LOADER = DataLoader(TensorDataset(torch.arange(30), -torch.arange(30)), batch_size=12, shuffle=True)
NOISY = Stream(30, noise=lambda: torch.rand(()) + np.random.rand() + random.random())


@pytest.mark.parametrize(
    ("data", "arguments"),
    [
        (Numbers(30), {"batch_size": 12}),
        (Numbers(30), {"batch_size": 12, "shuffle": True}),
        (TensorDataset(torch.arange(30)), {"batch_size": 12, "shuffle": True, "seed": 5}),
        (Stream(30), {"batch_size": 12}),
        (NOISY, {"batch_size": 12}),
        (LOADER, {}),
        (lambda: Numbers(30), {"batch_size": 12}),
        ([torch.tensor(number) for number in range(30)], {"batch_size": 12}),
    ],
    ids=["dataset", "shuffled", "tensors", "stream", "noisy-stream", "loader", "function", "list"],
)
def test_global_batches_are_the_same_for_any_number_of_ranks(data, arguments):
    alone = epochs(data, 1, num_epochs=2, **arguments)
    assert [len(rows) for rows, _ in alone] == [12, 12, 6] * 2
    for num_ranks in (2, 3, 4):
        shared = epochs(data, num_ranks, num_epochs=2, **arguments)
        assert [rows for rows, _ in shared] == [rows for rows, _ in alone]
        assert shared[0][1] == [12 // num_ranks] * num_ranks


def test_last_batch_may_leave_ranks_without_samples():
    batches = epochs(Numbers(9), 4, batch_size=8)
    assert batches == [(list(range(8)), [2, 2, 2, 2]), ([8], [1, 0, 0, 0])]
    assert epochs(Stream(9), 4, batch_size=8)[-1][1] == [1, 0, 0, 0]


def test_a_rank_fetches_its_own_samples_only():
    data = Numbers(8)
    list(open_data(data, TrainConfig(batch_size=4), 1, 2).epoch(0))
    assert data.fetched == [2, 3, 6, 7]


def test_shuffle_depends_on_seed_and_epoch_alone():
    def order(**arguments):
        torch.manual_seed(random.randrange(1000))
        return [rows for rows, _ in epochs(Numbers(30), 1, num_epochs=2, batch_size=30, shuffle=True, **arguments)]

    one, two = order(), order()
    assert one == two
    assert one[0] != one[1]
    assert sorted(one[0]) == list(range(30))
    assert order(seed=1) != one


def test_streams_leave_the_process_random_numbers_alone():
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    expected = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    epochs(NOISY, 2, batch_size=4)
    epochs(LOADER, 2)
    assert torch.equal(torch.get_rng_state(), expected[0])
    assert random.getstate() == expected[1]
    assert np.random.get_state()[1].tolist() == expected[2]


def test_number_of_batches():
    assert open_data(Numbers(30), TrainConfig(batch_size=12), 0, 2).num_batches == 3
    assert open_data(LOADER, TrainConfig(), 0, 2).num_batches == 3
    assert open_data(Stream(30), TrainConfig(batch_size=12), 0, 2).num_batches is None


@pytest.mark.parametrize(
    ("data", "arguments", "words"),
    [
        (Numbers(0), {}, "Numbers yields nothing"),
        (DataLoader(TensorDataset(torch.arange(0)), batch_size=2), {}, "yields nothing"),
        (LOADER, {"batch_size": 16}, "batch_size=16 .* gives batches of 12"),
        (LOADER, {"batch_size": 32}, "batch_size=32 .* gives batches of 12"),
        (LOADER, {"micro_batches": 5}, "batch_size=12 does not divide by 2 ranks x 5"),
        (LOADER, {"shuffle": True}, "give the DataLoader itself shuffle=True"),
        (Stream(5), {"shuffle": True}, "shuffle inside it"),
        (Numbers(5), {"batch_size": 3}, "does not divide by 2 ranks"),
        (iter([1, 2]), {}, "give a function"),
        (lambda: iter([1, 2]), {}, "give a function"),
        (lambda: Numbers, {}, "must return a data set"),
        ("text", {}, "data must be a torch Dataset"),
        ({"x": torch.ones(4)}, {}, "data must be a torch Dataset"),
        (7, {}, "data must be a torch Dataset, .* got 7"),
    ],
)
def test_refuses(data, arguments, words):
    with pytest.raises(DataError, match=words):
        open_data(data, TrainConfig(**arguments), 0, 2)


def test_data_behind_a_function_is_not_opened_up_front():
    def data():
        raise AssertionError("opened")

    check_data(data, TrainConfig(), 2)
    with pytest.raises(ValueError, match="does not divide"):
        check_data(data, TrainConfig(batch_size=3), 2)
    with pytest.raises(DataError, match="yields nothing"):
        check_data(Numbers(0), TrainConfig(), 2)


def test_uncountable_batches_are_named():
    loader = DataLoader(Numbers(4), batch_size=2, collate_fn=lambda samples: "nothing")
    with pytest.raises(DataError, match="cannot be counted"):
        next(open_data(loader, TrainConfig(), 0, 1).epoch(0))
