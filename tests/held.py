"""What a process holds open: descriptors, threads, mapped memory; and what of it is new since an earlier look.

Things are told apart one by one, not counted: what others held before and let go of meanwhile makes no room for a leak,
and is none.
"""

import gc
import mmap
import os
import threading
from dataclasses import dataclass

import torch

__all__ = ["Held", "held"]


@dataclass(frozen=True)
class Held:
    """Each descriptor with what it is open on, each thread, each object that maps memory."""

    descriptors: frozenset[tuple[int, str, int]]
    threads: frozenset[threading.Thread]
    maps: frozenset[int]

    def since(self, before: "Held") -> list[str]:
        """What `before` did not have, in words."""
        return [
            *(f"descriptor {fd} on {name}" for fd, name, _ in sorted(self.descriptors - before.descriptors)),
            *(f"thread {thread.name}" for thread in self.threads - before.threads),
            *(f"memory mapped by the object at {number:#x}" for number in self.maps - before.maps),
        ]


def held() -> Held:
    """What this process holds now, once all that nobody refers to is gone."""
    torch.ones(1, requires_grad=True).backward()  # torch keeps what a failed backward left over until the next one
    gc.collect()
    maps = frozenset(id(each) for each in gc.get_objects() if type(each) is mmap.mmap and not each.closed)
    return Held(frozenset(_descriptors()), frozenset(threading.enumerate()), maps)


def _descriptors() -> list[tuple[int, str, int]]:
    found = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            fd = int(entry)
            found.append((fd, os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd).st_ino))
        except OSError:
            continue  # the one that the list was read through
    return found
