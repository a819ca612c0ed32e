"""A pool of aligned buffers of exact sizes, all known before it starts.

Owns which buffers are free. How many of which size there are is the plan's decision: the pool never makes another one,
so what it may take of memory is known before step 1, and a wait for a buffer ends when one is given back or at its
deadline. To stay free of deadlocks a caller takes all the buffers that it needs before it waits for anything else.
"""

import threading
from collections.abc import Mapping

from .direct_io import AlignedBuffer, round_up
from .errors import DoesNotFit, LaneTimeout

__all__ = ["BufferPool"]


class BufferPool:
    """`counts[num_bytes]` buffers of `num_bytes` each. Raises ValueError for counts or sizes below 1."""

    def __init__(self, counts: Mapping[int, int], deadline_s: float = 60.0) -> None:
        if any(count < 1 for count in counts.values()):
            raise ValueError(f"each size needs at least one buffer, not {dict(counts)}")
        self.num_bytes = sum(round_up(size) * count for size, count in counts.items())
        """All that the pool takes, once every buffer has been used."""
        self._counts = dict(counts)
        self._deadline_s = deadline_s
        self._free = {size: [AlignedBuffer(size) for _ in range(count)] for size, count in counts.items()}
        self._given_back = threading.Condition()

    def take(self, num_bytes: int, timeout_s: float | None = None) -> AlignedBuffer:
        """A free buffer of exactly `num_bytes`; its content is whatever it was.

        Raises DoesNotFit if the plan has none of that size, LaneTimeout if none is given back in time.
        """
        if num_bytes not in self._counts:
            raise DoesNotFit(f"the pool has no buffers of {num_bytes:,} bytes, only of {sorted(self._counts)}")
        deadline_s = self._deadline_s if timeout_s is None else timeout_s
        free = self._free[num_bytes]
        with self._given_back:
            if not self._given_back.wait_for(lambda: free, deadline_s):
                raise LaneTimeout(
                    f"none of the {self._counts[num_bytes]} buffers of {num_bytes:,} bytes was given back within "
                    f"{deadline_s:g} s: their requests hang, or one caller holds more than the plan gives it"
                )
            return free.pop()

    def give(self, buffer: AlignedBuffer) -> None:
        """Take `buffer` back. Nothing may still read from it or write to it."""
        with self._given_back:
            free = self._free[buffer.num_bytes]
            if any(other is buffer for other in free):
                raise ValueError(f"the buffer of {buffer.num_bytes:,} bytes was given back twice")
            free.append(buffer)
            self._given_back.notify()

    def close(self) -> None:
        """Give the memory of all free buffers back. A buffer that is still out goes with its last user."""
        with self._given_back:
            for free in self._free.values():
                while free:
                    free.pop().close()
