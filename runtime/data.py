"""Data: one stream of global batches, of which each rank takes its rows.

Owns the order of samples, epochs, and which rows of a global batch are a rank's. It does not own micro-batches (the
engine cuts a rank's rows), nor moving samples to a device.

Global batch k holds the same samples in the same order for any number of ranks. Rank r gets the rows that
`torch.tensor_split(batch, num_ranks)[r]` gives: equal parts of a full batch; of a last, smaller one perhaps none.

    map-style Dataset      each rank fetches its own rows only; shuffled by (seed, epoch)
    IterableDataset        every rank runs through the whole stream and keeps its rows
    DataLoader             its batches are the global batches; each rank keeps its rows
    ray.data.Dataset       as IterableDataset, a batch at a time

Streams draw their random numbers (torch, numpy, random) from a state of their own, seeded alike on all ranks, so that a
loader that shuffles gives every rank the same batches, and so that the model's own numbers are left alone.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate

from ..memory.errors import OutgrowError
from .batch import num_samples, split_batch
from .config import TrainConfig, check_batch_size

__all__ = ["DataError", "Share", "Source", "check_data", "may_open_anew", "open_data", "row_bounds"]


class DataError(OutgrowError, ValueError):
    """The data cannot be trained on as it is; says what it yielded and what to change."""


@dataclass(frozen=True)
class Share:
    """One rank's rows of one global batch.

    Attributes:
        samples: the rows, collated (tensors, or nests of them); None: no row.
        num_samples: rows of the global batch, over all ranks.
        epoch: counts from 0.
    """

    samples: Any
    num_samples: int
    epoch: int


class Source(Protocol):
    """A stream of global batches, cut for one rank."""

    @property
    def num_batches(self) -> int | None:
        """Batches in an epoch, where known."""
        ...

    def epoch(self, epoch: int) -> Iterator[Share]:
        """The shares of epoch `epoch`, from its start."""
        ...


def row_bounds(num_rows: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """First and past-last row of `rank`, as `torch.tensor_split` cuts: the first ranks have one more."""
    size, rest = divmod(num_rows, num_ranks)
    start = rank * size + min(rank, rest)
    return start, start + size + (rank < rest)


def check_data(data: Any, config: TrainConfig, num_ranks: int) -> None:
    """Raise what can be known about `data` before any process starts; a function's data is checked in the worker."""
    if _is_function(data):
        check_batch_size(config.batch_size, num_ranks, config.micro_batches)
        return
    open_data(data, config, 0, num_ranks)


def may_open_anew(data: Any) -> bool:
    """Whether the data can be looked into and then read from the start, for sure: streams may give samples once."""
    if isinstance(data, DataLoader):
        return not isinstance(data.dataset, IterableDataset)
    has_index = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    return not _is_ray_dataset(data) and (_is_function(data) or has_index)


def open_data(data: Any, config: TrainConfig, rank: int, num_ranks: int) -> Source:
    """The stream of `rank`. Raises DataError (a ValueError) for data that cannot give one."""
    if _is_function(data):
        data = data()
        if _is_function(data):
            raise DataError(f"the data function must return a data set, got the function {data!r}")
    if isinstance(data, DataLoader):
        size = _loader_batch_size(data, config)
        _check_size(size if size is not None else config.batch_size, config, num_ranks)
        if config.shuffle:
            raise DataError("shuffle=True has no effect on a DataLoader; give the DataLoader itself shuffle=True")
        batches: Callable[[], Iterator[Any]] = partial(iter, data)
        return _Stream(batches, _length(data), config, rank, num_ranks)
    _check_size(config.batch_size, config, num_ranks)
    if _is_ray_dataset(data):
        if config.shuffle:
            raise DataError(
                "shuffle=True does not apply to a ray.data.Dataset; call its random_shuffle(seed=...) first"
            )
        return _Stream(partial(_ray_batches, data, config.batch_size), None, config, rank, num_ranks)
    if isinstance(data, IterableDataset) or (isinstance(data, Iterable) and not hasattr(data, "__getitem__")):
        if isinstance(data, Iterator):
            raise DataError(
                f"an iterator ({type(data).__name__}) gives its samples once and to one process; "
                "give a function that returns it"
            )
        if config.shuffle:
            raise DataError(
                f"shuffle=True needs a data set with an index, and {type(data).__name__} is iterable; shuffle inside it"
            )
        batches = partial(_sample_batches, data, config.batch_size)
        return _Stream(batches, None, config, rank, num_ranks, default_collate)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, str | bytes | Mapping):
        return _Indexed(data, config, rank, num_ranks)
    raise DataError(
        "data must be a torch Dataset, IterableDataset or DataLoader, a ray.data.Dataset, or a function that returns "
        f"one, got {_short(data)}"
    )


class _Indexed:
    """Map-style data: a rank fetches its own rows and no others."""

    def __init__(self, data: Any, config: TrainConfig, rank: int, num_ranks: int) -> None:
        self._data: Any = data
        self._config, self._rank, self._num_ranks = config, rank, num_ranks
        self._num_samples = len(data)
        if self._num_samples == 0:
            raise DataError(f"the data set {type(data).__name__} yields nothing: its length is 0")

    @property
    def num_batches(self) -> int | None:
        return -(-self._num_samples // self._config.batch_size)

    def epoch(self, epoch: int) -> Iterator[Share]:
        order = self._order(epoch)
        for first in range(0, self._num_samples, self._config.batch_size):
            rows = order[first : first + self._config.batch_size]
            start, stop = row_bounds(len(rows), self._rank, self._num_ranks)
            yield Share(self._fetch(rows[start:stop]) if stop > start else None, len(rows), epoch)

    def _order(self, epoch: int) -> Any:
        if not self._config.shuffle:
            return range(self._num_samples)
        generator = torch.Generator().manual_seed(_mix(self._config.seed, epoch))
        return torch.randperm(self._num_samples, generator=generator)  # not a list: 8 bytes a sample, not 40

    def _fetch(self, indices: Any) -> Any:
        indices = indices.tolist() if isinstance(indices, torch.Tensor) else list(indices)
        fetch: Any = getattr(self._data, "__getitems__", None)
        if fetch is not None:
            return default_collate(fetch(indices))
        return default_collate([self._data[index] for index in indices])


class _Stream:
    """Batches that come one after the other: every rank runs through them all and keeps its rows.

    `collate` None: `batches` gives collated batches, to be sliced; else lists of samples, sliced and then collated.
    """

    def __init__(
        self,
        batches: Callable[[], Iterator[Any]],
        num_batches: int | None,
        config: TrainConfig,
        rank: int,
        num_ranks: int,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        self._batches, self._num_batches, self._seed = batches, num_batches, config.seed
        self._rank, self._num_ranks, self._collate = rank, num_ranks, collate
        if num_batches == 0:
            raise DataError("the data yields nothing: its length is 0 batches")

    @property
    def num_batches(self) -> int | None:
        return self._num_batches

    def epoch(self, epoch: int) -> Iterator[Share]:
        numbers = _RandomState(_mix(self._seed, epoch))
        with numbers.in_use():
            batches = self._batches()
        while True:
            with numbers.in_use():
                batch = next(batches, None)
            if batch is None:
                return
            if self._collate is not None:
                rows = len(batch)
                start, stop = row_bounds(rows, self._rank, self._num_ranks)
                samples = self._collate(batch[start:stop]) if stop > start else None
            else:
                rows = _count_samples(batch)
                samples = split_batch(batch, self._num_ranks)[self._rank]
            yield Share(samples, rows, epoch)


class _RandomState:
    """Random numbers of its own for code that draws from the process's: torch's, numpy's and the standard library's."""

    def __init__(self, seed: int) -> None:
        self._torch = torch.Generator().manual_seed(seed).get_state()
        self._numpy = np.random.RandomState(seed % 2**32).get_state()
        self._python = random.Random(seed).getstate()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        outer = torch.get_rng_state(), np.random.get_state(), random.getstate()
        torch.set_rng_state(self._torch)
        np.random.set_state(self._numpy)
        random.setstate(self._python)
        try:
            yield
        finally:
            self._torch, self._numpy, self._python = torch.get_rng_state(), np.random.get_state(), random.getstate()
            torch.set_rng_state(outer[0])
            np.random.set_state(outer[1])
            random.setstate(outer[2])


def _sample_batches(data: Iterable[Any], batch_size: int) -> Iterator[list[Any]]:
    samples: list[Any] = []
    for sample in data:
        samples.append(sample)
        if len(samples) == batch_size:
            yield samples
            samples = []
    if samples:
        yield samples


def _ray_batches(data: Any, batch_size: int) -> Iterator[Any]:
    yield from data.iter_torch_batches(batch_size=batch_size, device="cpu")


def _count_samples(batch: Any) -> int:
    try:
        return num_samples(batch)
    except ValueError as error:
        raise DataError(f"the data gave a batch whose samples cannot be counted: {error}") from None


def _loader_batch_size(loader: DataLoader, config: TrainConfig) -> int | None:
    size = loader.batch_size if loader.batch_size is not None else getattr(loader.batch_sampler, "batch_size", None)
    if size is not None and config.batch_size_given and config.batch_size != size:
        raise DataError(
            f"batch_size={config.batch_size} was asked for, but the DataLoader gives batches of {size}, and its "
            "batches are the global batches; leave batch_size out or make the two equal"
        )
    return size


def _check_size(batch_size: int, config: TrainConfig, num_ranks: int) -> None:
    try:
        check_batch_size(batch_size, num_ranks, config.micro_batches)
    except ValueError as error:
        raise DataError(str(error)) from None


def _length(loader: DataLoader) -> int | None:
    try:
        return len(loader)
    except TypeError:
        return None


def _mix(seed: int, epoch: int) -> int:
    """One seed of two, such that (0, 1) and (1, 0) differ."""
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0] >> 1)


def _is_function(data: Any) -> bool:
    if isinstance(data, type):
        return True  # a class is a function that returns one of its objects
    return callable(data) and not hasattr(data, "__getitem__") and not hasattr(data, "__iter__")


def _is_ray_dataset(data: Any) -> bool:
    return type(data).__module__.startswith("ray.data") and hasattr(data, "iter_torch_batches")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
