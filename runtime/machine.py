"""What this machine offers: cores, memory, cgroup limits, GPUs, disk speed.

Owns reading these figures for the doctor and for sharing a machine among workers. It does not own the budget that is
made of them (`memory/budget.py`).
"""

import contextlib
import mmap
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CgroupLimits", "DiskProbe", "Gpu", "cgroup_limits", "gpus", "num_cores", "num_gpus", "probe_disk"]

_UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as a number near 2**63
_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class CgroupLimits:
    """The limits of this process's cgroup and those above it. `version` 0: none found."""

    version: int
    memory_bytes: int | None = None
    used_bytes: int | None = None
    cores: float | None = None


@dataclass(frozen=True)
class Gpu:
    """One GPU as its driver describes it."""

    name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class DiskProbe:
    """One small write and read in a folder. `direct`: both went around the page cache (`O_DIRECT`)."""

    direct: bool
    write_bytes_per_s: float
    read_bytes_per_s: float
    free_bytes: int


def num_cores() -> int:
    """Cores that this process may use, by affinity and cgroup quota; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_limits().cores
    return max(1, cores if quota is None else min(cores, int(quota)))


def num_gpus() -> int:
    """GPUs that torch can use."""
    import torch

    return torch.cuda.device_count()


def gpus() -> list[Gpu]:
    """The GPUs that the driver knows, also those that torch cannot use; none without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            name = pynvml.nvmlDeviceGetName(handle)
            found.append(Gpu(name.decode() if isinstance(name, bytes) else name, int(memory.total), int(memory.free)))
        return found
    finally:
        pynvml.nvmlShutdown()


def cgroup_limits(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> CgroupLimits:
    """The tightest limits on the way from this process's cgroup up to `root`, for version 2 or 1."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return CgroupLimits(version=0)
    paths = {kind: path for _, kind, path in (line.split(":", 2) for line in lines if line.count(":") >= 2)}
    if (root / "cgroup.controllers").exists():
        folders = list(_upwards(root, paths.get("", "/")))
        return CgroupLimits(
            version=2,
            memory_bytes=_least(_number(folder / "memory.max") for folder in folders),
            used_bytes=_first(_number(folder / "memory.current") for folder in folders),
            cores=_least(_quota_v2(folder / "cpu.max") for folder in folders),
        )
    controllers = {name: path for kind, path in paths.items() for name in kind.split(",")}
    if not (root / "memory").exists():
        return CgroupLimits(version=0)
    memory = list(_upwards(root / "memory", controllers.get("memory", "/")))
    cpu = list(_upwards(root / "cpu", controllers.get("cpu", "/")))
    return CgroupLimits(
        version=1,
        memory_bytes=_least(_number(folder / "memory.limit_in_bytes") for folder in memory),
        used_bytes=_first(_number(folder / "memory.usage_in_bytes") for folder in memory),
        cores=_least(_quota_v1(folder) for folder in cpu),
    )


def probe_disk(folder: Path, num_bytes: int = 64 << 20) -> DiskProbe:
    """Write and read `num_bytes` in `folder`, by `O_DIRECT` where that is supported. Raises OSError."""
    path = folder / f".outgrow-probe-{os.getpid()}"
    block = mmap.mmap(-1, _BLOCK_BYTES)  # page-aligned, as O_DIRECT asks
    block.write(os.urandom(_BLOCK_BYTES))
    direct = getattr(os, "O_DIRECT", 0)
    try:
        try:
            write_s = _write(path, block, num_bytes, direct)
        except OSError:
            if not direct:
                raise
            direct = 0
            write_s = _write(path, block, num_bytes, 0)
        read_s = _read(path, block, num_bytes, direct)
        statistics = os.statvfs(folder)
        return DiskProbe(
            bool(direct), num_bytes / write_s, num_bytes / read_s, statistics.f_bavail * statistics.f_frsize
        )
    finally:
        block.close()
        path.unlink(missing_ok=True)


def _write(path: Path, block: mmap.mmap, num_bytes: int, flags: int) -> float:
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | flags, 0o600)
    try:
        start_s = time.perf_counter()
        for _ in range(num_bytes // _BLOCK_BYTES):
            if os.write(descriptor, block) != _BLOCK_BYTES:
                raise OSError(f"a short write in {path.parent}: is the disk full?")
        os.fsync(descriptor)
        return time.perf_counter() - start_s
    finally:
        os.close(descriptor)


def _read(path: Path, block: mmap.mmap, num_bytes: int, flags: int) -> float:
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        start_s = time.perf_counter()
        for _ in range(num_bytes // _BLOCK_BYTES):
            os.readv(descriptor, [block])
        return time.perf_counter() - start_s
    finally:
        os.close(descriptor)


def _upwards(root: Path, path: str) -> Iterator[Path]:
    """The folder of a cgroup and of those above it; in a container the path may not exist: then `root` alone."""
    folder = root / path.strip("/")
    if folder.is_dir():
        while folder != root and root in folder.parents:
            yield folder
            folder = folder.parent
    yield root


def _number(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        value = int(path.read_text())
        return value if value < _UNLIMITED else None
    return None


def _quota_v2(path: Path) -> float | None:
    with contextlib.suppress(OSError, ValueError):
        quota, period = path.read_text().split()
        return int(quota) / int(period)
    return None


def _quota_v1(folder: Path) -> float | None:
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return quota / period if quota is not None and quota > 0 and period else None


def _least(values: Iterator[float | int | None]) -> "int | None":
    known = [value for value in values if value is not None]
    return min(known) if known else None  # type: ignore[return-value]


def _first(values: Iterator[int | None]) -> int | None:
    return next((value for value in values if value is not None), None)
