"""Which cores a thread that computes and its kernels' helper keep to.

Owns the cores of one thread. Does not own threads (`runtime/turns.py`) nor how many of them compute.
"""

import os
from contextlib import suppress

import torch

__all__ = ["keep_to_own_cores"]

_SHARED_ELEMS = 1 << 17  # of a sum that every kernel's helper has a part in


def keep_to_own_cores() -> None:
    """The calling thread computes on one core from now on, and its kernels' helper on the other, where two threads are
    to compute and the process has two cores: before its first kernel. What it begins itself stays on its core too.

    Where more threads compute in turns than there are cores, their helpers sleep between any two kernels (libgomp), and
    Linux wakes them on the core of the thread that wakes them as long as the cores were busy of late (it does not look
    for an idle one then): both compute on one core, and the other has nothing to do. With more threads nothing is done:
    helpers come and go there, and would stay where they came from.
    """
    with suppress(AttributeError, OSError):  # a system whose threads have no cores, or whose cores have just changed
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) != 2 or torch.get_num_threads() != 2:
            return
        os.sched_setaffinity(0, cores[1:])  # which the helper is born with
        torch.ones(_SHARED_ELEMS).add_(1.0)
        os.sched_setaffinity(0, cores[:1])
