"""What the C library does with large blocks that are freed.

Owns one switch of the process. By default glibc returns blocks of some MiB to the kernel when they are freed, and the
next step pays for fresh, zeroed pages: `perf step` shows what that costs. Keeping them costs some resident memory
instead. So it is done without end where the budget is ample; else from step to step within a bound (`StepHeap`), or not
at all. The caller decides.
"""

import ctypes
import logging
import os
from pathlib import Path

import torch

from .process import resident_bytes

__all__ = [
    "StepHeap",
    "keep_freed_blocks",
    "num_heaps",
    "release_kernel_buffers",
    "return_blocks_at_once",
    "return_freed_blocks",
    "uses_first_heap",
]

_log = logging.getLogger(__name__)

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_NEVER = -1  # as glibc's manual has it: no end of the heap is too large to be kept


def keep_freed_blocks() -> bool:
    """Let this process keep freed blocks of any size for its next step, in one heap for all threads: those of its other
    heaps are given back whenever one of them is empty. False where the C library cannot."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        _log.info("this C library has no mallopt: freed blocks go back to the kernel")
        return False
    thresholds = bool(mallopt(_M_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
    return thresholds and bool(mallopt(_M_ARENA_MAX, 1))


def return_blocks_at_once() -> bool:
    """Let this process give freed blocks of 128 KiB and more back at once, and use one heap for all threads: what is
    resident is then what is in use, at the price of page faults. False where the C library cannot."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    thresholds = bool(mallopt(_M_MMAP_THRESHOLD, 128 << 10)) and bool(mallopt(_M_TRIM_THRESHOLD, 128 << 10))
    return thresholds and bool(mallopt(_M_ARENA_MAX, 1))


def return_freed_blocks() -> bool:
    """Give what is freed and kept back to the kernel now: what stays resident is in use. False if nothing was."""
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (OSError, AttributeError):
        return False


def release_kernel_buffers() -> bool:
    """Give back what matrix kernels keep for each thread that ever called them (tens of MiB for large matrices); they
    take it again with the next call. False where torch's library has no such function."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        library.mkl_serv_free_buffers()
    except (OSError, AttributeError):
        return False
    return True


def num_heaps() -> int:
    """Heaps of the C library, of which a thread uses one; 0 where it cannot say. Blocks above the last one in use are
    given back by `return_freed_blocks` in the first heap only."""
    file = os.memfd_create("heaps")
    try:
        library = ctypes.CDLL(None)
        library.fdopen.restype = ctypes.c_void_p
        stream = ctypes.c_void_p(library.fdopen(os.dup(file), b"w"))
        library.malloc_info(0, stream)
        library.fclose(stream)
        return os.pread(file, 1 << 20, 0).count(b"<heap nr=")
    except (OSError, AttributeError):
        return 0
    finally:
        os.close(file)


def uses_first_heap() -> bool:
    """Whether the blocks of this thread come from the C library's first heap. It grows by `brk`, below all others."""
    try:
        library = ctypes.CDLL(None)
        library.malloc.restype = library.sbrk.restype = ctypes.c_void_p
        block = ctypes.c_void_p(library.malloc(64 << 10))
        end = library.sbrk(0)
        library.free(block)
    except AttributeError:
        return False
    return block.value is not None and end is not None and block.value < end


class StepHeap:
    """From step to step, freed blocks are kept for the next ones as long as the process stays within a budget.

    Before every part of a step the caller says how much that part allocates at the most, all blocks added up. A heap
    that reuses what it can never grows by more; so where that much fits beside what is resident now, nothing has to be
    done, and else what is free is given back first. What is resident then passes the budget only where what is in use
    and the growth together do.

    Args:
        budget_bytes: of the process's resident set.
        margin_bytes: of it, for what nobody announces.
        is_ample: freed blocks are kept from the beginning, and when steps are over.
    """

    def __init__(self, budget_bytes: int, margin_bytes: int, is_ample: bool = False) -> None:
        self._most_bytes = budget_bytes - margin_bytes
        self._is_ample = is_ample
        self._is_open = is_ample and keep_freed_blocks()
        self.num_returns = 0
        """How often blocks had to be given back."""

    def begin_step(self) -> None:
        """Freed blocks are kept from now on: behind the step too, since the next one begins with what this one had."""
        self._is_open = self._is_open or keep_freed_blocks()

    def end_steps(self) -> None:
        """Something else than a step comes next, which announces nothing: what is free is given back, and what will be
        freed too, until the next step."""
        if self._is_open and not self._is_ample:
            self._is_open = False
            return_blocks_at_once()
            return_freed_blocks()

    def make_room(self, growth_bytes: int) -> None:
        """Up to `growth_bytes` are going to be allocated until this is called again."""
        if self._is_open and resident_bytes() + growth_bytes > self._most_bytes:
            return_freed_blocks()
            self.num_returns += 1
