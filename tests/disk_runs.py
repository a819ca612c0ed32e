"""Small training runs with state on disk, whose disk does what a test wants; and what must be left of them: nothing."""

import functools
import itertools
import resource
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from faulty_io import Fault, FaultyIO
from held import held
from torch import nn

from outgrow.memory.budget import Memory
from outgrow.memory.direct_io import DirectIO
from outgrow.memory.errors import OutgrowError, StoreError
from outgrow.runtime import opening as opening_module
from outgrow.runtime.disk_tier import DiskTier
from outgrow.runtime.engine import Engine
from outgrow.scheduler.program import Program

BY_UNIT = {"order": "by-unit", "micro_batches": 3}


class Layer(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(dim, dim), nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(torch.tanh(self.linear(x)))


class Net(nn.Module):
    """Three units, a head, and a parameter that is used outside of them."""

    def __init__(self, dim: int = 24) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))
        self.layers = nn.ModuleList([Layer(dim) for _ in range(2)])
        self.head = nn.Linear(dim, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.scale
        for layer in self.layers:
            x = layer(x)
        return self.head(x * self.scale)


def net(dim: int = 24) -> nn.Module:
    torch.manual_seed(3)
    return Net(dim)


def batch(step: int, samples: int = 6, dim: int = 24) -> Any:
    generator = torch.Generator().manual_seed(50 + step)
    return torch.randn(samples, dim, generator=generator), torch.randint(0, 5, (samples,), generator=generator)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


@contextmanager
def tier_of(io: DirectIO | None, deadline_s: float = 20.0) -> Iterator[None]:
    """Disk tiers that are opened meanwhile are the real ones, with these system calls."""
    tier = functools.partial(DiskTier, io=io, deadline_s=deadline_s, depth=1)
    with mock.patch.object(opening_module, "DiskTier", tier):
        yield


def make(
    folder: Path | str | None,
    io: DirectIO | None = None,
    deadline_s: float = 20.0,
    model: Callable[[], nn.Module] = net,
    disk_limit: int | str | None = None,
    **settings: Any,
) -> Engine:
    """An engine with all of its state in `folder`; None: in memory. One transfer at a time on each lane: requests reach
    the disk in the order of the program."""
    memory = None if folder is None else Memory(disk=folder, disk_limit=disk_limit)
    settings = {"offload": "none" if folder is None else "all", "run_name": "demo"} | settings
    with tier_of(io, deadline_s):
        return Engine(model(), optimizer=adamw, loss=nn.CrossEntropyLoss(), memory=memory, seed=1, **settings)


def train(engine: Engine, first: int, last: int) -> list[float]:
    """Losses of steps `first` to `last`, counted from 1."""
    return [engine.step(batch(step)).loss for step in range(first, last + 1)]


@functools.cache
def expected(num_steps: int = 4, **settings: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and last weights of a run that keeps everything in memory."""
    engine = make(None, **settings)
    losses = train(engine, 1, num_steps)
    weights = engine.state_dict()
    engine.close()
    return losses, weights


def same_weights(mine: dict[str, torch.Tensor], its: dict[str, torch.Tensor]) -> bool:
    return mine.keys() == its.keys() and all(torch.equal(value, its[name]) for name, value in mine.items())


class From:
    """A fault on the n-th read (or write; None: either) and the `times` - 1 after it (None: all), until `heal`."""

    def __init__(self, fault: Fault, write: bool | None, n: int = 0, times: int | None = None) -> None:
        self.fault, self.write, self.n = fault, write, n
        self.stop = float("inf") if times is None else n + times
        self.count = self.num_hits = 0
        self._lock = threading.Lock()
        self._healed = False

    def heal(self) -> None:
        self._healed = True

    def __call__(self, transfer: Callable[[memoryview], int], view: memoryview, write: bool) -> int:
        if self._healed or self.write not in (None, write):
            return transfer(view)
        with self._lock:
            hits = self.n <= self.count < self.stop
            self.count += 1
            self.num_hits += hits
        return self.fault(transfer, view, write) if hits else transfer(view)


class BrokenDriverError(Exception):
    """What no one expects a system call to raise."""


def another_kind(transfer: Callable[[memoryview], int], view: memoryview, write: bool) -> int:
    raise BrokenDriverError("the driver is mad")


def attempt(call: Callable[[], Any]) -> tuple[Any, OutgrowError | None]:
    """What it gives, or what it raises."""
    try:
        return call(), None
    except OutgrowError as error:
        return None, error


@dataclass
class Failing:
    """An engine after two steps whose disk has a fault of this `kind` at its n-th request from now on."""

    n: int
    engine: Engine
    disk: "From"
    kind: type[StoreError]
    path: Path
    position: int

    def third_step(self) -> StoreError:
        """What the step fails with."""
        _, error = attempt(lambda: train(self.engine, 3, 3))
        assert type(error) is self.kind, f"request {self.n}: {error!r}"
        return error


def each_request_fails(
    folder: Path,
    write: bool,
    kinds: Sequence[tuple[Fault, type[StoreError]]],
    moves: Callable[[Program], Sequence[int]],
    **settings: Any,
) -> Iterator[Failing]:
    """One engine for each request of the third step, and one that has all of its requests behind it.

    Args:
        kinds: faults and what is raised for them, in turn.
        moves: positions of the requests in a program, in their order.
    """
    losses, _ = expected(**{key: settings[key] for key in BY_UNIT if key in settings})
    for n in itertools.count():
        fault, kind = kinds[n % len(kinds)]
        disk = From(fault, write, n)
        io = FaultyIO(always=disk)
        engine = make(folder, io, **settings)
        with tier_of(io):  # that of activations is opened with the first step's program
            assert train(engine, 1, 2) == losses[:2]
        (path,) = files(folder)
        assert engine.program is not None
        positions = moves(engine.program)
        io.arm()
        if n == len(positions):  # there is no such request
            assert train(engine, 3, 3) == losses[2:3]
            assert disk.count == n
            engine.close()
            return
        yield Failing(n, engine, disk, kind, path, positions[n])
        engine.close()


def files(folder: Path | str) -> list[Path]:
    return sorted(Path(folder).glob("outgrow-*"))


def names_the_place(error: StoreError, path: Path, rank: int = 0, run: str = "demo") -> bool:
    """Whether the error says all that a person needs to find the bytes, in fields and in words, and what to do."""
    place, text = error.place, str(error)
    assert place is not None
    assert (place.run, place.rank, place.path) == (run, rank, str(path))
    assert place.chunk.startswith("c")
    assert place.slot in ("param", "optim")
    assert place.offset_bytes is not None
    for words in (f"run {run}", f"rank {rank}", f"chunk {place.chunk}", f"slot {place.slot}", f"file {path}"):
        assert words in text
    assert f"offset {place.offset_bytes}" in text
    return any(words in text for words in ("start from a checkpoint", "Start from a checkpoint", "Free space"))


@contextmanager
def nothing_is_left(folder: Path) -> Iterator[None]:
    """No descriptor, thread or mapped memory is there afterwards that was not before, and no file of ours."""
    before = held()
    yield
    left = held().since(before)
    assert not left, left
    assert files(folder) == []


@contextmanager
def small_file_system(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A folder with so much space: a file system of its own where we may mount one; else files are limited to it."""
    folder.mkdir()
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)], capture_output=True, check=False
    ).returncode  # fmt: skip
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not mounted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield folder
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)
