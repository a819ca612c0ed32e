"""The doctor: what this machine offers to a run, and what is wrong with it.

Owns which figures are good, which deserve a warning and which stop a run, and what to do about each. Reading the
figures is `machine.py`'s.
"""

import importlib
import os
import platform
import resource
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from ..memory.budget import format_bytes
from .machine import cgroup_limits, gpus, num_cores, probe_disk

__all__ = ["Finding", "State", "examine", "print_findings"]

_MIN_MEMORY_BYTES = 2 << 30
_MIN_SHARED_BYTES = 512 << 20
_MIN_DISK_BYTES = 2 << 30
_MIN_FILES = 1024


class State(StrEnum):
    """How good a finding is. Only BROKEN keeps a run from working."""

    GOOD = "good"
    WARNING = "warning"
    BROKEN = "broken"


@dataclass(frozen=True)
class Finding:
    """One figure, its state, and what to do where it is not good."""

    topic: str
    value: str
    state: State = State.GOOD
    advice: str = ""


def examine(folder: Path) -> list[Finding]:
    """Examine this machine, and `folder` as a place for chunks and run folders."""
    return [*_processor(), *_memory(), *_gpus(), *_disk(folder), *_limits(), *_packages()]


def print_findings(findings: list[Finding], console: Console) -> bool:
    """Print a table; True when nothing is broken."""
    table = Table(title="outgrow doctor", title_justify="left")
    table.add_column("what")
    table.add_column("found")
    table.add_column("state")
    colours = {State.GOOD: "green", State.WARNING: "yellow", State.BROKEN: "bold red"}
    for finding in findings:
        advice = f"\n[dim]{finding.advice}[/dim]" if finding.advice else ""
        table.add_row(finding.topic, finding.value + advice, f"[{colours[finding.state]}]{finding.state}[/]")
    console.print(table)
    broken = [finding for finding in findings if finding.state is State.BROKEN]
    warnings = [finding for finding in findings if finding.state is State.WARNING]
    if broken:
        console.print(f"[bold red]Broken:[/] {', '.join(finding.topic for finding in broken)}")
    else:
        console.print("Ready to train." if not warnings else f"Ready to train, with {len(warnings)} warning(s).")
    return not broken


def _processor() -> Iterator[Finding]:
    cores, all_cores = num_cores(), os.cpu_count() or 1
    limited = f" of {all_cores} (affinity or cgroup quota)" if cores < all_cores else ""
    yield Finding("cores", f"{cores}{limited}, {platform.machine()}")


def _memory() -> Iterator[Finding]:
    memory, limits = psutil.virtual_memory(), cgroup_limits()
    usable = memory.available
    text = f"{format_bytes(memory.total)}, {format_bytes(memory.available)} available"
    if limits.version:
        text += f"; cgroup v{limits.version}: "
        text += "no limit" if limits.memory_bytes is None else f"limit {format_bytes(limits.memory_bytes)}"
        if limits.used_bytes is not None:
            text += f", {format_bytes(limits.used_bytes)} used"
        if limits.memory_bytes is not None:
            usable = min(usable, limits.memory_bytes)
    else:
        text += "; no cgroup found"
    if usable < _MIN_MEMORY_BYTES:
        advice = f"a Ray worker with torch alone holds about 0.4 GiB; have {format_bytes(_MIN_MEMORY_BYTES)} free"
        yield Finding("memory", text, State.WARNING, advice)
    else:
        yield Finding("memory", text)
    shared = Path("/dev/shm")
    if not shared.is_dir() or not os.access(shared, os.W_OK):
        advice = "ranks of one machine share buffers there; mount a tmpfs on /dev/shm"
        yield Finding("shared memory", "/dev/shm cannot be written", State.WARNING, advice)
        return
    size = psutil.disk_usage(str(shared))
    small = size.free < _MIN_SHARED_BYTES
    advice = "in a container, give it more: docker run --shm-size=8g" if small else ""
    text = f"{format_bytes(size.free)} of {format_bytes(size.total)} free in /dev/shm"
    yield Finding("shared memory", text, State.WARNING if small else State.GOOD, advice)


def _gpus() -> Iterator[Finding]:
    found = gpus()
    if not found:
        yield Finding("GPUs", "none: trains on the CPU")
    for index, gpu in enumerate(found):
        text = f"{gpu.name}, {format_bytes(gpu.free_bytes)} of {format_bytes(gpu.total_bytes)} free"
        yield Finding(f"GPU {index}", text)


def _disk(folder: Path) -> Iterator[Finding]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = probe_disk(folder)
    except OSError as error:
        advice = "run folders go there; choose another with --folder, storage_path= or name="
        yield Finding("disk", f"{folder}: {error}", State.BROKEN, advice)
        return
    text = (
        f"{folder}: {format_bytes(probe.free_bytes)} free, writes {format_bytes(probe.write_bytes_per_s)}/s, "
        f"reads {format_bytes(probe.read_bytes_per_s)}/s"
    )
    if probe.free_bytes < _MIN_DISK_BYTES:
        yield Finding("disk", text, State.WARNING, f"less than {format_bytes(_MIN_DISK_BYTES)} free")
    else:
        yield Finding("disk", text)
    if probe.direct:
        yield Finding("O_DIRECT", "supported in this folder")
    else:
        advice = "the figures above are those of the page cache; local ext4 and xfs disks support it"
        yield Finding("O_DIRECT", "not supported in this folder", State.WARNING, advice)


def _limits() -> Iterator[Finding]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = files != resource.RLIM_INFINITY and files < _MIN_FILES
    advice = "Ray opens many files and sockets; raise it: ulimit -n 65536" if few else ""
    yield Finding("open files", f"limit {files}", State.WARNING if few else State.GOOD, advice)
    temporary = Path(tempfile.gettempdir()) / "ray"
    place = temporary if temporary.exists() else temporary.parent
    if os.access(place, os.W_OK | os.X_OK):
        yield Finding("Ray's folder", f"{temporary} can be written")
    else:
        advice = f"{place} belongs to another user and is closed to this one; have it opened or removed"
        yield Finding("Ray's folder", f"{temporary} cannot be written", State.BROKEN, advice)


def _packages() -> Iterator[Finding]:
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    for name in ("torch", "ray", "ray.train.torch", "numpy", "numba", "safetensors"):
        try:
            module = importlib.import_module(name)
        except Exception as error:  # a broken package can raise anything on import
            advice = "make setup installs what belongs together"
            yield Finding(name, f"import fails: {type(error).__name__}: {error}", State.BROKEN, advice)
            continue
        yield Finding(name, getattr(module, "__version__", "imports"))
