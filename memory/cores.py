"""Which cores a process keeps to beside others, and a thread that computes and its kernels' helper within them.

Owns the cores of threads. Does not own threads (`runtime/turns.py`) nor how many of them compute.
"""

import os
from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["keep_process_to_share", "keep_to_own_cores"]

_SHARED_ELEMS = 1 << 17  # of a sum that every kernel's helper has a part in


def keep_process_to_share(index: int, num_processes: int) -> None:
    """Every thread of this process, and those that they begin, keeps to its share of the machine's cores: to the
    `index`-th part of them, where as many processes compute side by side and each part is as large.

    A lane of one process would else be put on the core that another one computes on, and hold the interpreter's lock
    there while it waits for its turn (it has a lower priority, and Linux moves it only when a core has nothing to do).
    On the core of its own process it runs as soon as that one waits for it.
    """
    with suppress(AttributeError, OSError):  # as below
        cores = sorted(os.sched_getaffinity(0))
        if num_processes < 2 or len(cores) % num_processes != 0:
            return
        size = len(cores) // num_processes
        own = cores[index * size : (index + 1) * size]
        for thread in Path("/proc/self/task").iterdir():
            with suppress(ProcessLookupError):  # it has just ended
                os.sched_setaffinity(int(thread.name), own)


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
