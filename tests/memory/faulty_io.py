"""A disk that fails on request: the system calls of `DirectIO`, with faults put before or behind them.

Shared by all tests that need a failing disk. Requests (`pread` and `pwrite` alike) are counted from 0 once `arm` was
called, so a fault can be put on request number n for every n of a sequence.
"""

import errno
import os
import threading
from collections.abc import Callable

from outgrow.memory.direct_io import AlignedBuffer, DirectIO

Fault = Callable[[Callable[[memoryview], int], memoryview, bool], int]
"""Called with the true transfer, its memory, and whether it writes; returns the bytes said to be moved, or raises."""


class FaultyIO(DirectIO):
    """`faults[n]` happens on request n; `always` on every request; nothing happens before `arm`."""

    def __init__(
        self, faults: dict[int, Fault] | None = None, always: Fault | None = None, direct: bool = True
    ) -> None:
        super().__init__(direct)
        self.faults = faults or {}
        self.always = always
        self.num_requests = 0
        self.num_faults = 0
        self._armed = False
        self._lock = threading.Lock()

    def arm(self) -> None:
        self._armed = True

    def pread(self, fd: int, view: memoryview, offset_bytes: int) -> int:
        return self._move(lambda part: super(FaultyIO, self).pread(fd, part, offset_bytes), view, False)

    def pwrite(self, fd: int, view: memoryview, offset_bytes: int) -> int:
        return self._move(lambda part: super(FaultyIO, self).pwrite(fd, part, offset_bytes), view, True)

    def _move(self, transfer: Callable[[memoryview], int], view: memoryview, write: bool) -> int:
        with self._lock:
            fault = None
            if self._armed:
                fault = self.faults.get(self.num_requests, self.always)
                self.num_requests += 1
                self.num_faults += fault is not None
        return transfer(view) if fault is None else fault(transfer, view, write)


def fails_with(code: int) -> Fault:
    """The kernel answers with an error number."""

    def fault(transfer: Callable[[memoryview], int], view: memoryview, write: bool) -> int:
        raise OSError(code, os.strerror(code))

    return fault


def short_by_half(transfer: Callable[[memoryview], int], view: memoryview, write: bool) -> int:
    """Only the first half moves, cut in the middle of a page; what is left is garbage."""
    if not write:
        view[:] = bytes(len(view))
    return min(transfer(view), len(view) // 2 + 100)


def nothing_moved(transfer: Callable[[memoryview], int], view: memoryview, write: bool) -> int:
    """Zero bytes: a read at the end of the file; a write that makes no progress."""
    return 0


def bit_flipped(transfer: Callable[[memoryview], int], view: memoryview, write: bool) -> int:
    """One bit changes on the way."""
    if not write:
        count = transfer(view)
        view[0] ^= 4
        return count
    with AlignedBuffer(len(view)) as changed:
        changed.view[:] = view
        changed.view[0] ^= 4
        return transfer(changed.view)


def write_lost(transfer: Callable[[memoryview], int], view: memoryview, write: bool) -> int:
    """The disk says that it wrote, and did not. Reads are true."""
    return len(view) if write else transfer(view)


class Gate:
    """A fault that holds every request until `open`; `reached` is set when the first one arrives."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()

    def open(self) -> None:
        self._open.set()

    def __call__(self, transfer: Callable[[memoryview], int], view: memoryview, write: bool) -> int:
        self.reached.set()
        assert self._open.wait(30), "the test never opened its gate"
        return transfer(view)


EIO = fails_with(errno.EIO)
ENOSPC = fails_with(errno.ENOSPC)
EDQUOT = fails_with(errno.EDQUOT)
EINVAL = fails_with(errno.EINVAL)
