"""The case `disk`: the disk lanes alone against `fio`, with the same block size, depth, file size and folder.

Owns the way in which both are asked to do the same. Reads, writes, and both at once (each over half of the file), past
the page cache. Ours moves whole extents of 32 MiB through `DiskStore`, several tickets in flight, checksums included,
as a training step does; `fio` moves blocks through libaio. Where `fio` is not installed, its place is taken by threads
that call preadv and pwritev on aligned memory and do nothing else. Turns alternate; a ratio is taken round by round.
"""

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Protocol

from ..memory.checksum import checksum
from ..memory.direct_io import AlignedBuffer
from ..memory.disk import DiskStore, ExtentSpec
from ..memory.disk_file import file_system_of
from ..memory.disk_lanes import Ticket
from ..memory.errors import OutgrowError
from .figures import Figure, Target, paired_ratios
from .suite import Findings, Options

__all__ = ["BLOCKS_MIB", "DEPTHS", "MODES", "disk_folder", "fio_command", "fio_rate", "run"]

BLOCKS_MIB = (1, 4, 16)
DEPTHS = (1, 4, 8)
MODES = ("read", "write", "both")
_MIB = 1 << 20
_EXTENT_BYTES = 32 * _MIB
_NUM_EXTENTS = 12
_FILE_BYTES = _NUM_EXTENTS * _EXTENT_BYTES
_MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs", "devtmpfs")
_AT_LEAST = Target(low=0.9)


class Contestant(Protocol):
    """Something that moves the whole file, in one of the modes, and says how many bytes a second it moved."""

    def move(self, mode: str) -> float: ...


def run(options: Options, say: Callable[[str], None]) -> Findings:
    """Measure every block size, depth and mode.

    Raises:
        ValueError: a folder that does not exist or lies in memory.
        OutgrowError: the disk failed, or `fio` did.
    """
    parent = disk_folder(options.folder)
    has_fio = shutil.which("fio") is not None
    figures: list[Figure] = []
    fastest_read = 0.0
    with tempfile.TemporaryDirectory(prefix="outgrow-disk-", dir=parent) as name:
        folder = Path(name)
        reference = _file(folder)
        for block_mib in BLOCKS_MIB:
            for depth in DEPTHS:
                label = f"{block_mib} MiB, depth {depth}"
                with ExitStack() as stack:
                    ours = stack.enter_context(_lanes(folder, block_mib * _MIB, depth))
                    theirs: Contestant = (_Fio if has_fio else _Raw)(reference, block_mib * _MIB, depth)
                    for mode in MODES:
                        say(f"{label}, {mode}")
                        rates = _measure(ours, theirs, mode, options)
                        figures.append(_figure(mode, label, *rates, "fio" if has_fio else "a raw loop"))
                        if mode == "read":
                            fastest_read = max(fastest_read, max(rates[0]), max(rates[1]))
    figures.sort(key=lambda figure: MODES.index(figure.group.split()[0]))  # stable
    say("checksum")
    figures += _checksum_figures(fastest_read, options.num_rounds)
    notes = [
        f"{parent} on {file_system_of(parent)}, a file of {_FILE_BYTES // _MIB} MiB, O_DIRECT, written before.",
        "ours: extents of 32 MiB in blocks of the size named, checksums included; both: half is read, half written.",
    ]
    if not has_fio:
        notes.append("fio is not installed (Debian package fio): compared with threads calling preadv and pwritev.")
    return Findings(tuple(figures), tuple(notes))


def _measure(
    ours: Contestant, theirs: Contestant, mode: str, options: Options
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Bytes a second of both, in turns whose order alternates."""
    rates: dict[int, list[float]] = {0: [], 1: []}
    for number in range(options.num_warmup + options.num_rounds):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            rate = (ours, theirs)[side].move(mode)
            if number >= options.num_warmup:
                rates[side].append(rate)
    return tuple(rates[0]), tuple(rates[1])


def _figure(mode: str, label: str, ours: Sequence[float], theirs: Sequence[float], name: str) -> Figure:
    ratios = paired_ratios(ours, theirs)
    middle = [sorted(each)[len(each) // 2] / 1e9 for each in (ours, theirs)]
    titles = {"read": "read alone", "write": "write alone", "both": "both at once"}
    return Figure(
        titles[mode],
        f"{label}: ours / {name}",
        "ratio",
        ratios,
        _AT_LEAST,
        f"{middle[0]:.2f} of {middle[1]:.2f} GB/s",
    )


def _checksum_figures(read_rate: float, num_rounds: int) -> list[Figure]:
    data = memoryview(os.urandom(4 * _MIB))
    rates = []
    for _ in range(num_rounds):
        began_s = time.perf_counter()
        for _ in range(64):
            checksum(data)
        rates.append(64 * len(data) / (time.perf_counter() - began_s))
    group = "checksum of blocks of 4 MiB, one core"
    return [
        Figure(group, "throughput", "GB/s", tuple(rate / 1e9 for rate in rates)),
        Figure(group, "against the fastest read", "ratio", tuple(rate / read_rate for rate in rates)),
    ]


# ---- the folder and the file


def disk_folder(given: str | None) -> Path:
    """The folder to measure in: the one given, else the first of the usual ones that lies on a disk."""
    if given is not None:
        path = Path(given)
        if not path.is_dir():
            raise ValueError(f"--folder {given}: there is no such folder")
        if file_system_of(path) in _MEMORY_FILE_SYSTEMS:
            raise ValueError(f"--folder {given} is a {file_system_of(path)}: it lies in memory; name one on a disk")
        return path
    usual = [Path(tempfile.gettempdir()), Path("/var/tmp"), Path.home(), Path.cwd()]
    for path in usual:
        if path.is_dir() and os.access(path, os.W_OK) and file_system_of(path) not in _MEMORY_FILE_SYSTEMS:
            return path
    raise ValueError(f"none of {', '.join(map(str, usual))} lies on a disk; name a folder with --folder")


def _file(folder: Path) -> Path:
    """A file of random bytes for the other side, written once, like ours."""
    path = folder / "reference"
    block = os.urandom(_EXTENT_BYTES)
    with path.open("wb") as file:
        for _ in range(_NUM_EXTENTS):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


# ---- ours


@contextmanager
def _lanes(folder: Path, block_bytes: int, depth: int) -> Iterator["_Lanes"]:
    """A store whose extents were all written once, and memory for enough tickets to keep its lanes full."""
    num_buffers = min(_NUM_EXTENTS // 2, 2 + depth * block_bytes // _EXTENT_BYTES)
    names = [f"c{index}:param" for index in range(_NUM_EXTENTS)]
    specs = [ExtentSpec(name, _EXTENT_BYTES) for name in names]
    with ExitStack() as stack:
        buffers = [stack.enter_context(closing(AlignedBuffer(_EXTENT_BYTES))) for _ in range(2 * num_buffers)]
        store = stack.enter_context(
            DiskStore(folder, "perf", 0, specs, block_bytes=block_bytes, depth=depth,
                      in_flight_bytes=num_buffers * _EXTENT_BYTES)
        )  # fmt: skip
        for buffer in buffers:
            buffer.view[:] = os.urandom(_EXTENT_BYTES)
        lanes = _Lanes(store, names, buffers[:num_buffers], buffers[num_buffers:])
        lanes.move("write")
        yield lanes


class _Lanes:
    def __init__(
        self, store: DiskStore, names: Sequence[str], sources: Sequence[AlignedBuffer], targets: Sequence[AlignedBuffer]
    ) -> None:
        self._store, self._names, self._sources, self._targets = store, names, sources, targets

    def move(self, mode: str) -> float:
        half = len(self._names) // 2
        reads = {"read": self._names, "both": self._names[:half]}.get(mode, ())
        writes = {"write": self._names, "both": self._names[half:]}.get(mode, ())
        tickets: dict[str, deque[Ticket]] = {"read": deque(), "write": deque()}
        began_s = time.perf_counter()
        for index in range(max(len(reads), len(writes))):
            for names, act, buffers, lane in (
                (reads, self._store.read, self._targets, "read"),
                (writes, self._store.write, self._sources, "write"),
            ):
                if index < len(names):
                    if len(tickets[lane]) == len(buffers):
                        tickets[lane].popleft().wait()
                    tickets[lane].append(act(names[index], buffers[index % len(buffers)]))
        for waiting in tickets.values():
            while waiting:
                waiting.popleft().wait()
        return (len(reads) + len(writes)) * _EXTENT_BYTES / (time.perf_counter() - began_s)


# ---- theirs


def fio_command(path: Path, mode: str, block_bytes: int, depth: int) -> list[str]:
    """The call of `fio` that moves the file in one of the modes."""
    common = [
        "fio", "--output-format=json", "--ioengine=libaio", "--direct=1", f"--filename={path}", f"--bs={block_bytes}",
        f"--iodepth={depth}", "--fallocate=none", "--overwrite=1", "--thread=1",
    ]  # fmt: skip
    parts = {"read": [("read", 0, 1)], "write": [("write", 0, 1)], "both": [("read", 0, 2), ("write", 1, 2)]}[mode]
    jobs = []
    for verb, part, of in parts:
        size = _FILE_BYTES // of
        jobs += [f"--name={verb}", f"--rw={verb}", f"--offset={part * size}", f"--size={size}"]
    return common + jobs


def fio_rate(report: str) -> float:
    """Bytes a second over all jobs of a report, from the first's begin to the last's end.

    Raises:
        OutgrowError: a job failed.
    """
    document = json.loads(report[report.index("{") :])
    num_bytes, longest_ms = 0, 0
    for job in document["jobs"]:
        if job["error"]:
            raise OutgrowError(f"fio failed in job {job['jobname']} with error {job['error']}")
        for verb in ("read", "write"):
            num_bytes += job[verb]["io_bytes"]
            longest_ms = max(longest_ms, job[verb]["runtime"])
    return num_bytes / (max(longest_ms, 1) / 1e3)


class _Fio:
    def __init__(self, path: Path, block_bytes: int, depth: int) -> None:
        self._path, self._block_bytes, self._depth = path, block_bytes, depth

    def move(self, mode: str) -> float:
        command = fio_command(self._path, mode, self._block_bytes, self._depth)
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise OutgrowError(f"fio failed with status {done.returncode}: {done.stderr.strip()[-400:]}")
        return fio_rate(done.stdout)


class _Raw:
    """Threads that move blocks between the file and aligned memory, and do nothing else."""

    def __init__(self, path: Path, block_bytes: int, depth: int) -> None:
        self._path, self._block_bytes, self._depth = path, block_bytes, depth

    def move(self, mode: str) -> float:
        offsets = range(0, _FILE_BYTES, self._block_bytes)
        half = len(offsets) // 2
        parts = {"read": [(os.preadv, offsets)], "write": [(os.pwritev, offsets)]}.get(
            mode, [(os.preadv, offsets[:half]), (os.pwritev, offsets[half:])]
        )
        descriptor = os.open(self._path, os.O_RDWR | os.O_DIRECT)
        try:
            with ExitStack() as stack:
                work = []
                for call, places in parts:
                    for first in range(self._depth):
                        buffer = stack.enter_context(closing(AlignedBuffer(self._block_bytes)))
                        buffer.view[:] = bytes(self._block_bytes)
                        work.append((call, descriptor, buffer, places[first :: self._depth]))
                with ThreadPoolExecutor(len(work)) as threads:
                    began_s = time.perf_counter()
                    list(threads.map(lambda each: _move(*each), work))
                    return _FILE_BYTES / (time.perf_counter() - began_s)
        except OSError as error:
            raise OutgrowError(f"the raw loop failed on {self._path}: {error}") from error
        finally:
            os.close(descriptor)


def _move(call: Callable[..., int], descriptor: int, buffer: AlignedBuffer, offsets: Sequence[int]) -> None:
    with buffer.view as view:
        for offset in offsets:
            moved = call(descriptor, [view], offset)
            if moved != len(view):
                raise OSError(f"{moved:,} of {len(view):,} bytes were moved at {offset:,}")
