"""What a process that trains has to be told before it starts.

Owns two variables. `THP_MEM_ALLOC_ENABLE`: torch's allocator then asks the kernel for huge pages wherever a tensor has
room for one; where freed blocks go back at once, which tight budgets want, most of a step's page faults and the time
that they take are saved. Whole huge pages within a tensor only: no tensor takes more. `MALLOC_ARENA_MAX`: glibc has one
heap for all threads, of which all that is free can be given back (`allocator.py`); heaps of other threads, of which a
process with ranks or a cluster has plenty, keep their ends. Both are read too early for the process itself to say so.
Does not own the buffers of transfers (`direct_io.py`).
"""

import os

__all__ = ["asks_for_huge_pages", "worker_environment"]

_HUGE_PAGES, _NUM_HEAPS = "THP_MEM_ALLOC_ENABLE", "MALLOC_ARENA_MAX"


def worker_environment() -> dict[str, str]:
    """Variables for a process that trains; what the user has set stays."""
    return {name: os.environ.get(name, "1") for name in (_HUGE_PAGES, _NUM_HEAPS)}


def asks_for_huge_pages() -> bool:
    """Whether tensors of this process do."""
    return os.environ.get(_HUGE_PAGES) == "1"
