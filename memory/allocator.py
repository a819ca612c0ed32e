"""What the C library does with large blocks that are freed.

Owns one switch of the process. By default glibc returns blocks of some MiB to the kernel when they are freed, and the
next step pays for fresh, zeroed pages: `perf step` shows what that costs. Keeping them costs some resident memory
instead, so it is done only where the budget is ample (the caller decides).
"""

import ctypes
import logging
from pathlib import Path

import torch

__all__ = ["keep_freed_blocks", "release_kernel_buffers", "return_blocks_at_once", "return_freed_blocks"]

_log = logging.getLogger(__name__)

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_NEVER = 2**31 - 1  # bytes; an int to mallopt


def keep_freed_blocks() -> bool:
    """Let this process keep freed blocks of any size for its next step. False where the C library cannot."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        _log.info("this C library has no mallopt: freed blocks go back to the kernel")
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))


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
