"""Huge pages for tensors: how a process that is yet to start is told to ask for them.

Owns the variable of torch's that does it. Its allocator then asks the kernel for huge pages wherever a tensor has room
for one; where freed blocks go back at once, which tight budgets want, most of a step's page faults and the time that
they take are saved. Whole huge pages within a tensor only: no tensor takes more. torch reads it with the first tensor,
so it has to be there before the process is. It does not own the buffers of transfers (`direct_io.py`).
"""

import os

__all__ = ["asks_for_huge_pages", "huge_page_environment"]

_NAME = "THP_MEM_ALLOC_ENABLE"


def huge_page_environment() -> dict[str, str]:
    """Variables for a process that trains; what the user has set stays."""
    return {_NAME: os.environ.get(_NAME, "1")}


def asks_for_huge_pages() -> bool:
    """Whether tensors of this process do."""
    return os.environ.get(_NAME) == "1"
