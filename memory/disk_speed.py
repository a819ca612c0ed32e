"""How fast a folder's disk is, through the very lanes that training uses.

Owns the measurement. It does not own what a plan makes of it (`scheduler/hardware.py`).
"""

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .direct_io import AlignedBuffer
from .disk import DiskStore, ExtentSpec
from .disk_lanes import Ticket

__all__ = ["DiskSpeed", "measure_disk"]

_ROUNDS = 5
_RING = 3  # buffers: while one is filled or emptied, the next request is already queued


@dataclass(frozen=True)
class DiskSpeed:
    """Measured bandwidths of one folder.

    Attributes:
        read_bytes_per_s, write_bytes_per_s: each lane alone.
        both_bytes_per_s: of the two together, as many bytes read as written at the same time.
        slowdown: how much longer other work takes while both lanes move bytes; 1 where none was given.
        direct: False where the file system refused O_DIRECT.
    """

    read_bytes_per_s: float
    write_bytes_per_s: float
    both_bytes_per_s: float
    slowdown: float
    direct: bool
    file_system: str
    num_bytes: int
    block_bytes: int
    depth: int


def measure_disk(
    folder: str | Path,
    num_bytes: int = 512 << 20,
    block_bytes: int = 4 << 20,
    depth: int = 4,
    deadline_s: float = 60.0,
    beside: Callable[[], object] | None = None,
) -> DiskSpeed:
    """Write, then read, then do both at once with about `num_bytes` random bytes in `folder`, checksums included as in
    training, and remove them.

    The blocks are written once before the clock starts, as first writes pay for the file system's bookkeeping.
    Takes memory for 12 * depth blocks. Raises what `DiskStore` raises.

    Args:
        beside: other work, which is timed alone and while both lanes move bytes.
    """
    extent_bytes = 2 * depth * block_bytes
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
            slowdown = 1.0
            if beside is not None:
                moves = (store.write, names[:half], sources), (store.read, names[half : 2 * half], targets)
                slowdown = _slowdown(beside, lambda: _pass(*moves))
            found = store.statistics()
    finally:
        for buffer in buffers:
            buffer.close()
    moved_bytes = len(names) * extent_bytes
    return DiskSpeed(
        read_bytes_per_s=moved_bytes / read_s,
        write_bytes_per_s=moved_bytes / write_s,
        both_bytes_per_s=2 * half * extent_bytes / both_s,
        slowdown=slowdown,
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


def _slowdown(work: Callable[[], object], moving: Callable[[], object]) -> float:
    """How much longer `work` takes while bytes are moved: the median of some rounds, in turns."""
    ratios = []
    work()
    for _ in range(_ROUNDS):
        alone_s = _seconds(work)
        is_over = threading.Event()

        def keep_moving(is_over: threading.Event = is_over) -> None:
            while not is_over.is_set():
                moving()

        thread = threading.Thread(target=keep_moving, name="measure-disk")
        thread.start()
        try:
            ratios.append(_seconds(work) / alone_s)
        finally:
            is_over.set()
            thread.join()
    return max(1.0, statistics.median(ratios))


def _seconds(work: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s
