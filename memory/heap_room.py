"""Room that the heap of a process grows by in its first dozen steps, taken at once.

Owns how much that is and when. Does not own what the C library does with freed blocks (`allocator.py`): where it keeps
them all, and no bound is set to them, there is something to take.

Where lanes work beside computing, small blocks come to lie between the large ones at another place in every step, and
what was one piece for a large block is a little too short for it in the next: the heap grows step by step, to about a
third more than after the second one. All of it are fresh pages, which the kernel zeroes, and a virtual machine's host
has to find first: some MiB of them in the midst of a step cost as much as a good part of a forward pass.
"""

import ctypes
import logging

import torch

from .process import resident_bytes

__all__ = ["HeapRoom", "heap_bytes"]

_log = logging.getLogger(__name__)

_STEP = 2  # behind which it is taken: the first one makes what steps keep
_PART = 3  # of what was freed
_PIECE_BYTES = 24 << 20  # each has whole huge pages, and none is mapped for itself
_LEFT = 4  # the part of what the budget has left that may be taken


class _Mallinfo(ctypes.Structure):
    # `arena` is the first, `fordblks` the ninth.
    _fields_ = [(f"field_{index}", ctypes.c_size_t) for index in range(10)]


def heap_bytes() -> tuple[int, int]:
    """The C library's heap, and what is free in it; zeros where it cannot say."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        return 0, 0
    mallinfo2.restype = _Mallinfo
    found = mallinfo2()
    return int(found.field_0), int(found.field_8)


class HeapRoom:
    """Behind the second step, the heap is made larger by a third of what steps have freed.

    Made before the first step: what was free already, another engine has left, and what that one needed is there.

    Args:
        budget_bytes: of the process's resident set; a quarter of what it has left is taken at the most. None: no bound.
    """

    def __init__(self, budget_bytes: int | None) -> None:
        self._budget_bytes = budget_bytes
        self._begin_bytes = heap_bytes()[0]
        self._num_steps = 0
        self.taken_bytes = 0
        """How much larger the heap was made."""

    def end_step(self) -> None:
        """A step is over."""
        self._num_steps += 1
        if self._num_steps != _STEP:
            return
        total_bytes, free_bytes = heap_bytes()
        wanted_bytes = min(total_bytes - self._begin_bytes, free_bytes) // _PART
        if self._budget_bytes is not None:
            wanted_bytes = min(wanted_bytes, (self._budget_bytes - resident_bytes()) // _LEFT)
        if wanted_bytes < _PIECE_BYTES:
            return
        self.taken_bytes = _enlarge(total_bytes + wanted_bytes)
        _log.info("the heap was made %d MiB larger for the steps to come", self.taken_bytes >> 20)


def _enlarge(goal_bytes: int) -> int:
    """Blocks fill what is free, and then the heap's end, until it is as large; returns by how much it grew."""
    begin_bytes, free_bytes = heap_bytes()
    most = (free_bytes + goal_bytes - begin_bytes) // _PIECE_BYTES + 1
    blocks: list[torch.Tensor] = []
    while heap_bytes()[0] + _PIECE_BYTES <= goal_bytes and len(blocks) < most:
        try:
            block = torch.empty(_PIECE_BYTES, dtype=torch.uint8)
        except RuntimeError:  # the process may have no more: what was for the next steps only must not end this one
            break
        block[::4096] = 0
        blocks.append(block)
    blocks.clear()
    return heap_bytes()[0] - begin_bytes
