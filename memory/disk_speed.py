"""How fast a folder's disk is, through the very lanes that training uses.

Owns the measurement. It does not own what a plan makes of it (`scheduler/hardware.py`).
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .direct_io import AlignedBuffer
from .disk import BLOCK_BYTES, DEPTH, DiskStore, ExtentSpec
from .disk_lanes import Ticket

__all__ = ["DiskSpeed", "TransferTimes", "measure_disk", "measure_transfers"]

_ROUNDS = 4
_WORK_S = 0.04  # of the work alone, before each look at it beside transfers
_BESIDE_S = 0.03  # of transfers beside it, at least; and each size once
_RING = 3  # buffers: while one is filled or emptied, the next request is already queued


@dataclass(frozen=True, slots=True)
class TransferTimes:
    """Transfers that a lane does one after the other, as a step has them.

    Attributes:
        alone: (bytes, seconds) of each size, checksums included.
        beside: times as long that one takes while other work keeps all cores busy; at least 1.
        slowdown: times as long that this work takes meanwhile; at least 1.
    """

    alone: tuple[tuple[int, float], ...]
    beside: float
    slowdown: float


@dataclass(frozen=True)
class DiskSpeed:
    """Measured bandwidths of one folder.

    Attributes:
        read_bytes_per_s, write_bytes_per_s: each lane alone.
        both_bytes_per_s: of the two together, as many bytes read as written at the same time.
        direct: False where the file system refused O_DIRECT.
    """

    read_bytes_per_s: float
    write_bytes_per_s: float
    both_bytes_per_s: float
    direct: bool
    file_system: str
    num_bytes: int
    block_bytes: int
    depth: int


def measure_disk(
    folder: str | Path,
    num_bytes: int = 512 << 20,
    block_bytes: int = BLOCK_BYTES,
    depth: int = DEPTH,
    deadline_s: float = 60.0,
) -> DiskSpeed:
    """Write, then read, then do both at once with about `num_bytes` random bytes in `folder`, checksums included as in
    training, and remove them.

    The blocks are written once before the clock starts, as first writes pay for the file system's bookkeeping.
    Takes memory for 6 * depth blocks. Raises what `DiskStore` raises.
    """
    extent_bytes = depth * block_bytes
    names = [f"c{index}:param" for index in range(max(_RING, -(-num_bytes // extent_bytes)))]
    specs = [ExtentSpec(name, extent_bytes) for name in names]
    buffers = [AlignedBuffer(extent_bytes) for _ in range(2 * _RING)]
    try:
        with DiskStore(folder, "measure", 0, specs, block_bytes=block_bytes, depth=depth, deadline_s=deadline_s,
                       in_flight_bytes=_RING * extent_bytes) as store:  # fmt: skip
            for seed, buffer in enumerate(buffers):
                buffer.view[:] = np.random.default_rng(seed).bytes(extent_bytes)
            sources, targets = buffers[:_RING], buffers[_RING:]
            half = len(names) // 2
            _pass((store.write, names, sources))
            write_s = _pass((store.write, names, sources))
            read_s = _pass((store.read, names, targets))
            both_s = _pass((store.write, names[:half], sources), (store.read, names[half : 2 * half], targets))
            found = store.statistics()
    finally:
        for buffer in buffers:
            buffer.close()
    moved_bytes = len(names) * extent_bytes
    return DiskSpeed(
        read_bytes_per_s=moved_bytes / read_s,
        write_bytes_per_s=moved_bytes / write_s,
        both_bytes_per_s=2 * half * extent_bytes / both_s,
        direct=found.direct,
        file_system=found.file_system,
        num_bytes=moved_bytes,
        block_bytes=block_bytes,
        depth=depth,
    )


def _pass(*moves: tuple[Callable[[str, AlignedBuffer], Ticket], list[str], list[AlignedBuffer]]) -> float:
    """Seconds for moving every extent once, all moves at the same time, each with one request per buffer in flight."""
    flying: list[deque[Ticket]] = [deque() for _ in moves]
    began_s = time.perf_counter()
    for index in range(max(len(names) for _, names, _ in moves)):
        for (move, names, buffers), tickets in zip(moves, flying, strict=True):
            if len(tickets) == len(buffers):
                tickets.popleft().wait()
            if index < len(names):
                tickets.append(move(names[index], buffers[index % len(buffers)]))
    for tickets in flying:
        while tickets:
            tickets.popleft().wait()
    return time.perf_counter() - began_s


def measure_transfers(
    folder: str | Path,
    work: Callable[[], object],
    sizes: Sequence[int] = (2 << 20, 16 << 20),
    block_bytes: int = BLOCK_BYTES,
    depth: int = DEPTH,
    deadline_s: float = 60.0,
) -> tuple[TransferTimes, TransferTimes, TransferTimes]:
    """Time transfers that a lane does one after the other, alone and beside other work: reads, writes, and writes of
    what is copied to the buffer first.

    Args:
        work: what keeps all cores busy for some thousandths of a second, without Python; it is done again and again.
        sizes: in bytes, of transfers, the smallest first.

    Raises: what `DiskStore` raises.
    """
    specs = [ExtentSpec(f"c{index}:param", size) for index, size in enumerate(sizes)]
    buffers = [AlignedBuffer(size) for size in sizes]
    pairs = list(zip([spec.name for spec in specs], buffers, strict=True))
    try:
        with DiskStore(folder, "measure", 0, specs, block_bytes=block_bytes, depth=depth, deadline_s=deadline_s,
                       in_flight_bytes=max(sizes)) as store:  # fmt: skip
            for seed, buffer in enumerate(buffers):
                buffer.view[:] = np.random.default_rng(seed).bytes(sizes[seed])
            for name, buffer in pairs:
                store.write(name, buffer).wait()  # pays for the file system's bookkeeping
            work()
            source = np.ones(max(sizes), dtype=np.uint8)

            def save(name: str, buffer: AlignedBuffer) -> Ticket:
                np.copyto(np.frombuffer(buffer.view, dtype=np.uint8), source[: len(buffer.view)])
                return store.write(name, buffer)

            kinds = [_Kind(move, pairs) for move in (store.read, store.write, save)]
            for _ in range(_ROUNDS):  # of all, so that a machine's slower moments slow all alike
                for kind in kinds:
                    kind.move_alone()
                    kind.move_beside(work)
            reads, writes, saves = (kind.times() for kind in kinds)
            return reads, writes, saves
    finally:
        for buffer in buffers:
            buffer.close()


class _Kind:
    """Transfers of one kind, of each size, alone and beside work."""

    def __init__(
        self, move: Callable[[str, AlignedBuffer], Ticket], pairs: Sequence[tuple[str, AlignedBuffer]]
    ) -> None:
        self._move = move
        self._pairs = pairs
        self._alone: list[list[float]] = [[] for _ in pairs]
        self._beside: list[list[float]] = [[] for _ in pairs]
        self._slowdowns: list[float] = []

    def move_alone(self) -> None:
        self._move_all(self._alone)

    def move_beside(self, work: Callable[[], object]) -> None:
        """The work alone, and at once again beside transfers: a machine is as fast in both. There is work until the
        last transfer has ended, so that none of them is beside nothing."""
        alone_s: list[float] = []
        while sum(alone_s) < _WORK_S:
            alone_s.append(_seconds(work))

        def move() -> float:
            while True:
                self._move_all(self._beside)
                ended_s = time.perf_counter()
                if ended_s - began_s > _BESIDE_S:
                    return ended_s

        calls: list[tuple[float, float]] = []
        with ThreadPoolExecutor(1, "measure-disk") as mover:
            began_s = time.perf_counter()
            moved = mover.submit(move)
            while not moved.done():
                call_s = time.perf_counter()
                calls.append((call_s, _seconds(work)))
        ended_s = moved.result()
        done = sum(min(1.0, max(0.0, ended_s - call_s) / seconds) for call_s, seconds in calls)
        if done:
            self._slowdowns.append((ended_s - began_s) / (done * statistics.fmean(alone_s)))

    def _move_all(self, seconds: list[list[float]]) -> None:
        for (name, buffer), found in zip(self._pairs, seconds, strict=True):
            found.append(_seconds(lambda name=name, buffer=buffer: self._move(name, buffer).wait()))

    def times(self) -> TransferTimes:
        alone_s, beside_s = ([statistics.median(found) for found in each] for each in (self._alone, self._beside))
        sizes = (len(buffer.view) for _, buffer in self._pairs)
        return TransferTimes(
            tuple(zip(sizes, alone_s, strict=True)),
            max(1.0, sum(beside_s) / sum(alone_s)),
            max(1.0, statistics.fmean(sorted(self._slowdowns)[1:-1] or [1.0])),
        )


def _seconds(work: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s
