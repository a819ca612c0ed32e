"""What the kernel says this process holds.

Owns the reading of `/proc` and of the cgroup. Does not decide what follows from it (`memory/budget.py`).
"""

from dataclasses import dataclass
from pathlib import Path

import psutil

__all__ = [
    "ProcessMemory",
    "cgroup_limit_bytes",
    "peak_host_bytes",
    "read_process_memory",
    "reset_peak",
    "resident_bytes",
]

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Bytes of this process: resident now, the peak since the last reset, and the part of `resident` that is shared
    memory (which other processes may hold too)."""

    resident_bytes: int
    peak_bytes: int
    shared_bytes: int


def read_process_memory() -> ProcessMemory:
    """Resident set, its high-water mark and shared pages, as the kernel counts them (by `psutil` without /proc)."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        info = psutil.Process().memory_info()
        return ProcessMemory(info.rss, info.rss, 0)
    fields = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "VmHWM", "RssShmem"))}
    return ProcessMemory(
        int(fields.get("VmRSS", 0)) * 1024, int(fields.get("VmHWM", 0)) * 1024, int(fields.get("RssShmem", 0)) * 1024
    )


def resident_bytes() -> int:
    """The resident set alone: some microseconds."""
    return int(psutil.Process().memory_info().rss)


def peak_host_bytes(owned_shared_bytes: int) -> int:
    """Peak of the resident set since `reset_peak`, with shared memory counted at what this process owns of it."""
    memory = read_process_memory()
    return max(memory.peak_bytes - memory.shared_bytes, 0) + min(owned_shared_bytes, memory.shared_bytes)


def reset_peak() -> None:
    """Start a new high-water mark, where the kernel lets us; else it goes on from the process's start."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def cgroup_limit_bytes() -> int | None:
    """The smallest memory limit of the cgroups that this process is in (v2 and v1), or None where there is none."""
    limits = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = Path("/sys/fs/cgroup"), "memory.max"
        elif "memory" in controllers.split(","):
            root, name = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        else:
            continue
        folder = root / path.lstrip("/")
        for place in (folder, *folder.parents):
            limit = _read_limit(place / name)
            if limit is not None:
                limits.append(limit)
            if place == root:
                break
    return min(limits, default=None)


def _read_limit(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    if not text.isdigit() or int(text) >= 1 << 60:  # "max", or version 1's way to say so
        return None
    return int(text)
