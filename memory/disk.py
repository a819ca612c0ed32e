"""The disk tier: a store of extents, one for each slot of a chunk, on a disk that may fail.

Owns the layout (known before anything is written), the checksums and generations of what was written, and the check of
all that is read. It does not own threads and order (`disk_lanes.py`), the file itself (`disk_file.py`), nor what moves
when.

    extents  c0:param | c0:exp_avg | c0:exp_avg_sq | c1:param | ...      at multiples of 4096 bytes in one file per rank
    blocks   [ 16 MiB ][ 16 MiB ][rest]                                  moved concurrently; each has its own checksum

What is read is what was written last, or an error: every block's checksum is kept in memory and compared on every read
(beside the data on disk, a lost write would leave an old block with its matching old checksum). The store holds nothing
that a checkpoint does not: it needs no flush, and its file goes with the process.
"""

import logging
import os
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from .checksum import checksum
from .direct_io import ALIGN_BYTES, AlignedBuffer, DirectIO, bytes_of, round_up
from .disk_file import SlotFile, store_error
from .disk_lanes import DiskLanes, LaneName, LaneStatistics, Order, Ticket
from .errors import ChunkCorrupted, DoesNotFit, OutgrowError, Place, StoreError

__all__ = ["BLOCK_BYTES", "DEPTH", "DiskStatistics", "DiskStore", "ExtentSpec"]

_log = logging.getLogger(__name__)

BLOCK_BYTES, DEPTH = 16 << 20, 2
"""Of a store, where its user does not say. A request keeps its thread and the kernel busy for a fixed while beside what
its bytes take; smaller blocks, with more of them in flight, bring a disk no further and take more from computing."""

_SCRATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class ExtentSpec:
    """One run of bytes in the store. `name` is `chunk:slot`, such as `c7:exp_avg`, or any other word."""

    name: str
    num_bytes: int

    def __post_init__(self) -> None:
        if not self.name or any(letter.isspace() for letter in self.name):
            raise ValueError(f"an extent needs a name without spaces, such as 'c7:exp_avg', not {self.name!r}")
        if self.num_bytes <= 0:
            raise ValueError(f"extent {self.name} must have at least 1 byte, not {self.num_bytes}")


@dataclass(frozen=True)
class DiskStatistics:
    """A snapshot of a store: its lanes, and what its file is."""

    read: LaneStatistics
    write: LaneStatistics
    file_bytes: int
    direct: bool
    """False: the file system refused O_DIRECT, and transfers go through the page cache."""
    file_system: str


@dataclass
class _Extent:
    """What the store knows of one extent. Changed only while a request on it completes."""

    spec: ExtentSpec
    offset_bytes: int
    order: Order = field(default_factory=Order)
    generation: int = 0  # complete writes so far
    checksums: array = field(default_factory=lambda: array("Q"))  # per block, of this generation
    previous: array = field(default_factory=lambda: array("Q"))  # of the one before: a lost write leaves these
    lost: str = ""  # why the last write failed: the bytes on disk are unknown


class DiskStore:
    """Reads and writes whole extents, several at a time, in the order in which they were asked for on the same extent.

    Args:
        folder: an existing folder on the disk to use.
        run, rank: whose bytes these are; they name the file and stand in every error.
        extents: everything that will ever be stored, laid out in this order.
        limit_bytes: the budget of the disk tier on this rank; None: the free space is the limit.
        block_bytes: the size of one transfer and of what one checksum covers, a multiple of 4096.
        depth: transfers in flight on each lane (two threads more than both lanes have).
        in_flight_bytes: bytes of unfinished requests on each lane; a call that would exceed them waits.
        deadline_s: how long any wait may last.
        io: the system calls; tests pass ones that fail.

    Raises (constructor): DoesNotFit over `limit_bytes`; DiskFull; StoreError if the folder is missing or not writable;
    DiskFault if it does not give back what is written; ValueError.
    """

    def __init__(
        self,
        folder: str | Path,
        run: str,
        rank: int,
        extents: Sequence[ExtentSpec],
        *,
        limit_bytes: int | None = None,
        block_bytes: int = BLOCK_BYTES,
        depth: int = DEPTH,
        in_flight_bytes: int = 256 << 20,
        deadline_s: float = 60.0,
        io: DirectIO | None = None,
    ) -> None:
        if block_bytes <= 0 or block_bytes % ALIGN_BYTES:
            raise ValueError(f"block_bytes must be a positive multiple of {ALIGN_BYTES}, not {block_bytes}")
        self.block_bytes = block_bytes
        self.file_bytes = 0
        self._extents: dict[str, _Extent] = {}
        for spec in extents:
            if spec.name in self._extents:
                raise ValueError(f"extent {spec.name} is named twice")
            self._extents[spec.name] = _Extent(spec, self.file_bytes)
            self.file_bytes += round_up(spec.num_bytes)
        self.file_bytes = max(self.file_bytes, ALIGN_BYTES)
        if limit_bytes is not None and self.file_bytes > limit_bytes:
            raise DoesNotFit(
                f"run {run}, rank {rank}: the disk tier needs {self.file_bytes:,} bytes and its limit is "
                f"{limit_bytes:,}, {self.file_bytes - limit_bytes:,} too few; raise the limit or give the host more"
            )
        self._pid = os.getpid()
        scratch_bytes = min(block_bytes, _SCRATCH_BYTES)
        self.scratch_bytes = 2 * (depth + 1) * scratch_bytes
        """Memory beyond the callers' own that unaligned transfers may come to use."""
        self._file = SlotFile(folder, run, rank, self.file_bytes, io or DirectIO())
        try:
            self._lanes = DiskLanes(str(self._file.place), depth, in_flight_bytes, deadline_s, scratch_bytes)
        except BaseException:
            self._file.close()
            raise

    @property
    def path(self) -> str:
        """The file."""
        return self._file.path

    def read(self, name: str, into: AlignedBuffer | memoryview | bytearray | torch.Tensor) -> Ticket:
        """Start filling `into` (exactly the extent's bytes) with what was written last; leave it alone until done.

        The ticket's errors: ChunkCorrupted, DiskFault, StoreError if nothing was written or its writing failed.
        Waits here, up to the deadline (LaneTimeout), while too many bytes are in flight. Fastest into aligned memory.
        """
        extent = self._find(name)
        view = bytes_of(into)
        if view.readonly:
            raise ValueError(f"{name} cannot be read into read-only memory")
        padded = self._fitting(extent, view, into)

        def transfer(block: int, scratch: AlignedBuffer) -> Callable[[], None]:
            start, stop, place = self._span(extent, block)
            self._check_written(extent, place)
            try:
                self._file.read(self._part(padded, start, stop, view), extent.offset_bytes + start, scratch)
            except Exception as error:
                raise store_error(error, f"read {stop - start:,} bytes", place) from error
            return lambda: self._verify(extent, block, checksum(view[start:stop]), place)

        return self._submit("read", extent, transfer, lambda error: None)

    def write(self, name: str, source: AlignedBuffer | memoryview | bytearray | bytes | torch.Tensor) -> Ticket:
        """Start writing `source` (exactly the extent's bytes); it must not change until the ticket is done.

        The ticket's errors: DiskFull, DiskFault; the extent is lost then until written again. Waits as `read` does.
        """
        extent = self._find(name)
        view = bytes_of(source)
        padded = self._fitting(extent, view, source)
        fresh = array("Q", bytes(8 * self._num_blocks(extent)))

        def transfer(block: int, scratch: AlignedBuffer) -> Callable[[], None]:
            start, stop, place = self._span(extent, block)
            try:
                self._file.write(self._part(padded, start, stop, view), extent.offset_bytes + start, scratch)
            except Exception as error:
                raise store_error(error, f"write {stop - start:,} bytes", place) from error
            return lambda: fresh.__setitem__(block, checksum(view[start:stop]))

        def finish(error: BaseException | None) -> None:
            if error is None:
                extent.previous, extent.checksums, extent.lost = extent.checksums, fresh, ""
                extent.generation += 1
            else:
                extent.lost = str(error)

        return self._submit("write", extent, transfer, finish)

    def drain(self, timeout_s: float | None = None) -> None:
        """Wait until nothing is in flight. Raises the first error that no ticket's `wait` has raised yet."""
        self._lanes.drain(timeout_s)

    def close(self, timeout_s: float | None = None) -> None:
        """Cancel what has not begun, wait for what runs, end the threads and remove the file. May be repeated.

        Raises LaneTimeout if a transfer never comes back: the file's name is gone then, its space with the process.
        """
        try:
            self._lanes.close(timeout_s)
        except OutgrowError:
            self._file.abandon()
            raise
        self._file.close()

    def statistics(self) -> DiskStatistics:
        """A snapshot."""
        return DiskStatistics(
            self._lanes.statistics("read"),
            self._lanes.statistics("write"),
            self.file_bytes,
            self._file.direct,
            self._file.file_system,
        )

    def generation(self, name: str) -> int:
        """How often `name` has been written completely."""
        return self._find(name).generation

    def place(self, name: str) -> Place:
        """Where `name` lies."""
        return self._span(self._find(name), 0)[2]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except OutgrowError:
            if error is None:
                raise
            _log.exception("closing the disk store failed too; the first error goes on")

    def _find(self, name: str) -> _Extent:
        if name not in self._extents:
            known = ", ".join(list(self._extents)[:8])
            raise ValueError(
                f"{self._file.place}: there is no extent {name!r}; there are {len(self._extents)}: {known} …"
            )
        return self._extents[name]

    def _fitting(self, extent: _Extent, view: memoryview, given: object) -> memoryview:
        """The memory that transfers may touch: up to the end of its last page where the buffer is ours."""
        if len(view) != extent.spec.num_bytes:
            raise ValueError(f"{extent.spec.name} has {extent.spec.num_bytes:,} bytes, the memory given {len(view):,}")
        return given.padded if isinstance(given, AlignedBuffer) else view

    def _num_blocks(self, extent: _Extent) -> int:
        return -(-extent.spec.num_bytes // self.block_bytes)

    def _span(self, extent: _Extent, block: int) -> tuple[int, int, Place]:
        """First byte and end of a block within its extent, and its place for errors."""
        start = block * self.block_bytes
        stop = min(start + self.block_bytes, extent.spec.num_bytes)
        chunk, _, slot = extent.spec.name.partition(":")
        return start, stop, replace(self._file.place, chunk=chunk, slot=slot, offset_bytes=extent.offset_bytes + start)

    @staticmethod
    def _part(padded: memoryview, start: int, stop: int, view: memoryview) -> memoryview:
        """The block's bytes; the last block goes on to the end of the padding."""
        return padded[start:] if stop == len(view) else padded[start:stop]

    @staticmethod
    def _check_written(extent: _Extent, place: Place) -> None:
        if extent.lost:
            raise StoreError(f"its last write failed, what the disk holds is unknown ({extent.lost}). "
                             "Write it again, or start from a checkpoint", place)  # fmt: skip
        if not extent.generation:
            raise StoreError("it has never been written, so there is nothing to read. Write it first", place)

    @staticmethod
    def _verify(extent: _Extent, block: int, actual: int, place: Place) -> None:
        expected = extent.checksums[block]
        if actual == expected:
            return
        why = "its bytes changed"
        if extent.previous and actual == extent.previous[block]:
            why = f"it still holds generation {extent.generation - 1}: a write was lost"
        raise ChunkCorrupted(
            f"block {block} is not what was written as generation {extent.generation}: {why} "
            f"(xxh3 expected {expected:016x}, actual {actual:016x}). Check disk and memory; start from a checkpoint",
            place,
        )

    def _submit(self, lane: LaneName, extent: _Extent, transfer, finish) -> Ticket:
        if os.getpid() != self._pid:
            raise StoreError("the store belongs to the process that opened it, and this is a fork of that one. "
                             "Open another store here", self._file.place)  # fmt: skip
        label = f"{lane.upper()} {extent.spec.name}"
        num_bytes = extent.spec.num_bytes
        return self._lanes.submit(lane, label, num_bytes, self._num_blocks(extent), extent.order, transfer, finish)
