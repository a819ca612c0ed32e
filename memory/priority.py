"""Which threads the processor goes to first: those that compute.

Owns the priority of one thread. Does not own threads (`disk_lanes.py`) nor how many of them compute.
"""

import os
import threading
from contextlib import suppress

__all__ = ["give_way"]

_NICENESS = 10


def give_way() -> None:
    """The calling thread runs where computing leaves the processor free. What moves bytes can wait for a moment (its
    checksums are what takes time), but a kernel of several threads waits for the one of them that is interrupted. Where
    nothing is free, about a tenth of a processor is left. Nothing happens where threads have no priorities of their
    own."""
    with suppress(OSError):
        me = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, me, min(os.getpriority(os.PRIO_PROCESS, me) + _NICENESS, 19))
