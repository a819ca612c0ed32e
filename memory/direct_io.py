"""Aligned memory, and whole transfers between it and a file opened with O_DIRECT.

Owns the alignment rule (address, file offset and length are multiples of 4096 bytes; devices ask for 512 or 4096), the
buffers that keep it, the system calls behind one small replaceable object, and the loops that turn short transfers into
whole ones. It does not own names, folders or extents (`disk_file.py`, `disk.py`) nor threads (`disk_lanes.py`).

A direct transfer moves bytes between the device and our memory without a copy through the page cache: the memory that a
run needs is then the memory that was planned, and what is measured is the device. A file system that refuses it is used
through the page cache instead, which is kept from growing by flushing and dropping what was written and read.

Every page of a direct transfer is pinned and handed to the device by itself. Large buffers therefore ask for huge
pages: a block of 4 MiB is then a few pieces instead of a thousand, which takes a tenth of the kernel's time and makes
some devices a third faster.
"""

import errno
import fcntl
import mmap
import os
from contextlib import suppress
from types import TracebackType
from typing import Self

import numpy as np
import torch

__all__ = [
    "ALIGN_BYTES",
    "AlignedBuffer",
    "DirectIO",
    "address_of",
    "bytes_of",
    "pread_full",
    "pwrite_full",
    "round_up",
]

ALIGN_BYTES = 4096

_HUGE_PAGE_BYTES = 2 << 20  # of x86-64 and of arm64 with pages of 4096 bytes

# Transfers in a row that may move less than one aligned block before we call the device faulty instead of trying again.
_PATIENCE = 16


def round_up(num_bytes: int) -> int:
    """`num_bytes` rounded up to whole aligned blocks."""
    return -(-num_bytes // ALIGN_BYTES) * ALIGN_BYTES


class AlignedBuffer:
    """Private memory of exactly `num_bytes` (its last page is whole, nothing more), aligned for direct transfers.

    Pages cost memory from their first use on. Never rounded up to a power of two. From 2 MiB on they are huge where the
    kernel has such: whole ones within the buffer only, so that it never takes more than `num_bytes`.

    Args:
        asks_for_huge: False: pages are as small as those of anything else.
    """

    def __init__(self, num_bytes: int, asks_for_huge: bool = True) -> None:
        if num_bytes <= 0:
            raise ValueError(f"an aligned buffer needs at least 1 byte, not {num_bytes}")
        self.num_bytes = num_bytes
        self._map: mmap.mmap | None = mmap.mmap(-1, round_up(num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if asks_for_huge and num_bytes >= _HUGE_PAGE_BYTES:
            with suppress(OSError):  # a kernel without huge pages
                self._map.madvise(mmap.MADV_HUGEPAGE)

    @property
    def view(self) -> memoryview:
        """The `num_bytes` bytes, writable."""
        return self.padded[: self.num_bytes]

    @property
    def padded(self) -> memoryview:
        """All bytes up to the end of the last page: what a direct transfer may touch."""
        if self._map is None:
            raise ValueError("the aligned buffer is closed")
        return memoryview(self._map)

    def take_pages(self) -> None:
        """Have all pages now, zeroed where they were not used before, instead of at their first uses."""
        pages = np.frombuffer(self.padded, np.uint8)[:: mmap.PAGESIZE]
        pages += 0  # numpy leaves out to assign what is there

    def tensor(self, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        """The buffer as a flat tensor of `dtype`, sharing its bytes; trailing bytes that fill no element are left out.

        The memory lives at least as long as the tensor, even if the buffer is closed before.
        """
        usable_bytes = self.num_bytes // dtype.itemsize * dtype.itemsize
        return torch.from_numpy(np.frombuffer(self.padded, np.uint8, usable_bytes)).view(dtype)

    def close(self) -> bool:
        """Give the memory back: now (True), or when the last view or tensor of it is gone (False). May be repeated."""
        mapping, self._map = self._map, None
        if mapping is None:
            return True
        try:
            mapping.close()
        except BufferError:  # someone still looks at it; the last one to let go unmaps it
            return False
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def bytes_of(data: AlignedBuffer | memoryview | bytearray | bytes | torch.Tensor) -> memoryview:
    """The bytes behind `data`, without a copy. ValueError if they are not one contiguous run in host memory."""
    if isinstance(data, AlignedBuffer):
        return data.view
    if isinstance(data, torch.Tensor):
        if data.device.type != "cpu" or not data.is_contiguous():
            raise ValueError(
                f"the disk tier moves contiguous host memory, not a tensor on {data.device} with shape "
                f"{tuple(data.shape)} and strides {data.stride()}; copy it into a staging buffer first"
            )
        return memoryview(data.detach().reshape(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
    view = memoryview(data)
    if not view.c_contiguous:
        raise ValueError("the disk tier moves contiguous memory; this memoryview has gaps")
    return view.cast("B")


def address_of(view: memoryview) -> int:
    """Where the first byte of `view` lies."""
    return np.frombuffer(view, np.uint8).__array_interface__["data"][0]


class DirectIO:
    """The system calls of the disk tier, one method each, so that tests can replace any of them with a fault.

    `direct=False` never asks for O_DIRECT (to compare, or for a file system that accepts it and lies).
    All methods raise OSError as the kernel says it; `pread` and `pwrite` may move fewer bytes than asked.
    """

    def __init__(self, direct: bool = True) -> None:
        self.direct = direct

    def create(self, path: str) -> int:
        """Make a new file, readable by this user alone; never follow or reuse what is there."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    def set_direct(self, fd: int, direct: bool) -> None:
        """Turn O_DIRECT on or off for `fd`. File systems without it say EINVAL, here or at the first transfer."""
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT)

    def allocate(self, fd: int, num_bytes: int) -> None:
        """Reserve the blocks of the whole file."""
        os.posix_fallocate(fd, 0, num_bytes)

    def pread(self, fd: int, view: memoryview, offset_bytes: int) -> int:
        """Read into `view`; returns the bytes moved, 0 at the end of the file."""
        return os.preadv(fd, [view], offset_bytes)

    def pwrite(self, fd: int, view: memoryview, offset_bytes: int) -> int:
        """Write `view`; returns the bytes moved."""
        return os.pwritev(fd, [view], offset_bytes)

    def forget(self, fd: int, num_bytes: int, offset_bytes: int, written: bool) -> None:
        """After a buffered transfer: flush what was written, and drop the range from the page cache."""
        if written:
            os.fdatasync(fd)
        os.posix_fadvise(fd, offset_bytes, num_bytes, os.POSIX_FADV_DONTNEED)

    def status(self, fd: int) -> os.stat_result:
        """fstat: the size and the number of names the file has."""
        return os.fstat(fd)

    def close(self, fd: int) -> None:
        """Close `fd`."""
        os.close(fd)


def pread_full(io: DirectIO, fd: int, view: memoryview, offset_bytes: int) -> None:
    """Fill `view` (aligned) from an aligned offset.

    A short read goes on from the last whole aligned block, so that it stays direct. EIO is tried once more: a read
    changes nothing, and a path that failed over answers the second time. Raises OSError, or EOFError past the end.
    """
    done = 0
    stalls = 0
    tried_again = False
    while done < len(view):
        try:
            count = io.pread(fd, view[done:], offset_bytes + done)
        except OSError as error:
            if error.errno == errno.EIO and not tried_again:
                tried_again = True
                continue
            raise
        if count == 0:
            raise EOFError(f"the file ends at byte {offset_bytes + done}, {len(view) - done} bytes too early")
        done, stalls = _advance(done, count, len(view), stalls)


def pwrite_full(io: DirectIO, fd: int, view: memoryview, offset_bytes: int) -> None:
    """Write all of `view` (aligned) at an aligned offset; a short write goes on from the last whole aligned block.

    Errors are not tried again: what the device holds is unknown then. Raises OSError.
    """
    done = 0
    stalls = 0
    while done < len(view):
        count = io.pwrite(fd, view[done:], offset_bytes + done)
        done, stalls = _advance(done, count, len(view), stalls)


def _advance(done: int, count: int, total: int, stalls: int) -> tuple[int, int]:
    """Where the next transfer starts, and how many in a row have moved less than one aligned block."""
    reached = done + count
    if reached < total:
        reached -= reached % ALIGN_BYTES
    if reached > done:
        return reached, 0
    if stalls + 1 >= _PATIENCE:
        raise OSError(errno.EIO, f"{_PATIENCE} transfers in a row moved less than {ALIGN_BYTES} bytes")
    return done, stalls + 1
