"""Measuring the machine for the planner: memory, updates, the disk, the exchange between ranks.

Owns the measurements and their cache, one file per machine and disk in the user's cache folder; `fresh=True` measures
anew. Does not own the record (`scheduler/hardware.py`).
"""

import hashlib
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..memory.direct_io import AlignedBuffer
from ..memory.disk_speed import TransferTimes, measure_disk, measure_transfers
from ..memory.worker_environment import asks_for_huge_pages
from ..scheduler.hardware import DiskFigures, Hardware, NetFigures, Transfers
from .machine import num_cores

if TYPE_CHECKING:
    from ..parallel.collectives import Transport
    from .optimizer import PiecewiseOptimizer

__all__ = [
    "PROBE_BYTES",
    "cache_folder",
    "fault_figures",
    "kept_figures",
    "machine_key",
    "measure_net",
    "probe",
    "update_figures",
    "use_memory",
]

_ELEMS = 6 << 20  # of a tensor for memory figures: two of 24 MiB are more than caches hold
_DISK_BYTES = 96 << 20
_NET_BYTES = (256 << 10, 1 << 20, 8 << 20)
_ROUNDS, _FAULT_ROUNDS = 5, 25
_FEW_ELEMS = 64 << 10  # of an update that takes next to nothing beside its call
_PAGED_BYTES, _HUGE_BYTES = 400 << 10, 6 << 20  # of blocks whose page faults are timed
_USED_ROUNDS, _USED_BYTES = 2, 128 << 20  # of memory that was in use before them
_NET_ROUNDS = 24  # of which the eighth at each end is left out
_ALONE_S = 0.1  # in which a thread computes without an exchange beside it
_NUM_PRODUCTS = 4  # of a quarter of a GFLOP each, about as long as a unit's kernels, that are done at once beside disks
_METHOD = 12  # of measuring: figures that were taken by another one are not comparable
_BLOCK_BYTES, _DEPTH = 8 << 20, 2  # where both directions are measured together: less memory than the engine has
PROBE_BYTES = 136 << 20  # the most that measuring takes: an update's tensors, or the disk's blocks and what fills them


def cache_folder() -> Path:
    """Where figures are kept: `outgrow` in the user's cache folder (XDG)."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "outgrow"


def probe(disk_folder: str | None = None, fresh: bool = False, folder: Path | None = None) -> Hardware:
    """The figures of this machine, from the cache where they are there.

    Args:
        disk_folder: on the disk that may be used; None: no disk is measured.
        fresh: measure anew.
        folder: of the cache; None: the user's.

    Raises: what the disk store raises.
    """
    found = None if fresh else kept_figures(disk_folder, folder)
    if found is not None:
        return found
    path = _figures_path(disk_folder, folder)
    found = _measure(_machine_name(), disk_folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(found.to_json(), encoding="utf-8")
    partial.replace(path)
    return found


def kept_figures(disk_folder: str | None = None, folder: Path | None = None) -> Hardware | None:
    """What was measured earlier; None: nothing, or by another version."""
    path = _figures_path(disk_folder, folder)
    try:
        return Hardware.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def machine_key(disk_folder: str | None) -> str:
    """Names files of figures that hold for this machine, this many threads, this version of torch, tensors in huge
    pages or not, this disk, and this way to measure."""
    device = "" if disk_folder is None else str(Path(disk_folder).stat().st_dev)
    text = f"{_machine_name()} {asks_for_huge_pages()} {device} {_METHOD}"
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _machine_name() -> str:
    threads = f"{torch.get_num_threads()} threads on {num_cores()} cores"
    return f"{platform.node()}, {platform.machine()}, {threads}, torch {torch.__version__}"


def _figures_path(disk_folder: str | None, folder: Path | None) -> Path:
    return (folder or cache_folder()) / f"hardware-{machine_key(disk_folder)}.json"


def _measure(name: str, disk_folder: str | None) -> Hardware:
    copy_s, sum_s, update_s = _tensor_seconds()
    return Hardware(
        name,
        torch.get_num_threads(),
        4 * _ELEMS / copy_s,
        4 * _ELEMS / sum_s,
        _ELEMS / update_s,
        _action_seconds(),
        _turn_seconds(),
        *fault_figures(),
        None if disk_folder is None else _measure_disk(disk_folder),
    )


def _tensor_seconds() -> tuple[float, float, float]:
    """Of a copy, a sum and an update of `_ELEMS` elements. What they need is let go of."""
    source, target = torch.ones(_ELEMS), torch.zeros(_ELEMS)
    copy_s = _median_s(lambda: target.copy_(source))
    sum_s = _median_s(lambda: target.add_(source))
    parameter = torch.nn.Parameter(target)
    parameter.grad = source
    return copy_s, sum_s, _median_s(torch.optim.AdamW([parameter], lr=0.0, fused=True).step)


def _measure_disk(folder: str) -> DiskFigures:
    """All cores compute beside it: those that this rank leaves, for the others that are on this machine."""
    num_threads = torch.get_num_threads()
    num_teams = max(1, num_cores() // num_threads)
    left, right = torch.ones(128, 1024), torch.ones(1024, 1024)

    def compute() -> None:
        torch.set_num_threads(num_threads)  # torch keeps it for each thread
        for _ in range(_NUM_PRODUCTS):
            torch.nn.functional.gelu(left @ right)

    with ThreadPoolExecutor(num_teams, "compute") as others:

        def compute_everywhere() -> None:
            computing = [others.submit(compute) for _ in range(num_teams - 1)]
            compute()
            for each in computing:
                each.result()

        found = measure_transfers(folder, compute_everywhere)
    read, write, save = map(_transfers, found)
    full = measure_disk(folder, _DISK_BYTES, _BLOCK_BYTES, _DEPTH)
    capacity = (1 / full.read_bytes_per_s + 1 / full.write_bytes_per_s) * full.both_bytes_per_s / 2
    return DiskFigures(read, write, save, min(max(capacity, 1.0), 2.0))  # beyond that it was noise


def _transfers(times: TransferTimes) -> Transfers:
    latency_s, bytes_per_s = _fit(times.alone)
    return Transfers(bytes_per_s, latency_s, times.beside, times.slowdown - 1)


def fault_figures() -> tuple[float, float]:
    """What a page fault takes for each byte, in blocks without and with room for huge pages; as it is now."""
    for _ in range(_USED_ROUNDS):
        use_memory(_USED_BYTES)
    huge_s = _fault_seconds(_HUGE_BYTES, asks_for_huge_pages())
    return _fault_seconds(_PAGED_BYTES, asks_for_huge=False), huge_s


def use_memory(num_bytes: int) -> None:
    """Take so much memory, fill it and give it back. The host of a virtual machine takes back what was free for
    seconds, and the next touch of that takes ten times as long as those in the middle of a step do."""
    used = AlignedBuffer(max(4096, num_bytes))
    used.tensor(torch.float32).fill_(1.0)
    used.close()


def _fault_seconds(num_bytes: int, asks_for_huge: bool) -> float:
    """For each byte of a fresh block, what it takes to get it, to fill it and to give it back more than to fill it
    again, of memory that was used just before: that of the fastest tenth, since the host of a virtual machine may take
    ten times as long to put memory behind a page, for moments that a step may or may not meet."""
    differences: list[float] = []
    for _ in range(_FAULT_ROUNDS):
        began_s = time.perf_counter()
        fresh = AlignedBuffer(num_bytes, asks_for_huge)
        values = fresh.tensor(torch.float32)
        values.fill_(1.0)
        filled_s = time.perf_counter()
        values.fill_(1.0)
        again_s = time.perf_counter()
        del values
        fresh.close()
        differences.append(time.perf_counter() - again_s + (filled_s - began_s) - (again_s - filled_s))
    return max(0.0, sorted(differences)[_FAULT_ROUNDS // 10]) / num_bytes


def _action_seconds() -> float:
    """What the executor takes for an action that does nothing, in a lane of its own."""
    from ..parallel.actions import Action, Kind
    from ..scheduler.program import Instruction, Lane, Program
    from .executor import Executor

    count = 200
    chain = [
        Instruction(Action(Kind.NORM), Lane.NET if n % 2 else Lane.COMPUTE, (n - 1,) * (n > 0)) for n in range(count)
    ]
    with Executor({Kind.NORM: lambda _action: None}) as executor:

        def run() -> None:
            executor.begin(Program(tuple(chain)))
            executor.finish()

        return _median_s(run) / count


def _turn_seconds() -> float:
    """What it takes beside the work of a turn to end it and to begin that of another micro-batch."""
    from ..parallel.actions import Action, Kind
    from ..scheduler.program import Instruction, Lane, Program
    from .executor import Executor
    from .turns import Turns

    turns_of_each, micro_batches = 20, 2
    order = [Action(Kind.F, unit, number) for unit in range(turns_of_each) for number in range(micro_batches)]
    program = Program(tuple(Instruction(a, Lane.COMPUTE, (n - 1,) * (n > 0)) for n, a in enumerate(order)))
    left, right = torch.ones(256, 256), torch.ones(256, 256)  # kernels with helpers, as units have them
    with Executor({}) as executor:
        turns = Turns(executor)

        def body(number: int) -> None:
            for unit in range(turns_of_each):
                turns.advance_to(Action(Kind.F, unit, number))
                torch.mm(left, right)

        def run() -> None:
            executor.begin(program)
            turns.run([(number, partial(body, number)) for number in range(micro_batches)])
            executor.finish()

        try:
            both_s = _median_s(run)
        finally:
            turns.close()
    product_s = _median_s(lambda: torch.mm(left, right))
    return max(0.0, both_s / len(order) - product_s)


def _median_s(work: Callable[[], object]) -> float:
    work()  # the first one makes what the others find
    seconds = []
    for _ in range(_ROUNDS):
        began_s = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began_s)
    return statistics.median(seconds)


def _usual_s(work: Callable[[], object]) -> float:
    """What an exchange takes on average: some wait for a core and others find one, so that no single one is usual."""
    work()  # as above
    seconds = []
    for _ in range(_NET_ROUNDS):
        began_s = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began_s)
    return statistics.fmean(sorted(seconds)[_NET_ROUNDS // 8 : -(_NET_ROUNDS // 8)])


def update_figures(optimizer: "PiecewiseOptimizer", elems: int = _ELEMS // 2) -> tuple[float, float]:
    """What the run's own optimizer takes for an update of one chunk beside its elements, and how many of those it
    updates in a second; its slots in memory. Gradients are let go of behind it, as in a step."""
    points: list[tuple[int, float]] = []
    for size in (_FEW_ELEMS, max(elems, 2 * _FEW_ELEMS)):
        parameter = torch.nn.Parameter(torch.ones(size))
        step = optimizer.alone(parameter).step
        seconds: list[float] = []
        for _ in range(_ROUNDS + 1):
            parameter.grad = torch.ones(size)
            began_s = time.perf_counter()
            step()
            parameter.grad = None
            seconds.append(time.perf_counter() - began_s)
        points.append((size, statistics.median(seconds[1:])))  # the first one makes the slots
    return _fit(points)


class _Computing:
    """A thread that computes until the end, and counts how much."""

    def __init__(self) -> None:
        self._num_threads = torch.get_num_threads()
        self._is_over = False
        self._count = 0
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)

    def __enter__(self) -> "_Computing":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self._thread.join()

    def rate_during(self, work: Callable[[], object]) -> float:
        """How much it computes in a second meanwhile."""
        began, began_s = self._count, time.perf_counter()
        work()
        return (self._count - began) / (time.perf_counter() - began_s)

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)  # torch keeps it for each thread
        left, right = torch.ones(256, 512), torch.ones(512, 512)  # about as long as a unit's kernels
        while not self._is_over:
            torch.mm(left, right)
            self._count += 1


def measure_net(transport: "Transport") -> NetFigures:
    """Latency and bandwidth of the exchange while all ranks compute, fitted over several sizes; the slowest rank's.
    What waits for a peer wakes up late on a core that computes. Collective."""
    rows: list[tuple[int, float, float]] = []
    with _Computing() as computing:
        transport.gather_rows([0.0])
        alone = computing.rate_during(lambda: time.sleep(_ALONE_S))
        transport.gather_rows([0.0])
        beside = computing.rate_during(lambda: rows.extend(_net_rows(transport)))
    slowdown = float(transport.gather_rows([alone / max(beside, 1e-9)]).mean())
    gather_latency, gather_speed = _fit([(size, seconds) for size, seconds, _ in rows])
    reduce_latency, reduce_speed = _fit([(size, seconds) for size, _, seconds in rows])
    return NetFigures(gather_speed, gather_latency, reduce_speed, reduce_latency, max(0.0, slowdown - 1))


def _net_rows(transport: "Transport") -> list[tuple[int, float, float]]:
    """Bytes of an exchange, and what gathering and reducing so many take on the slowest rank."""
    rows = []
    for size in _NET_BYTES:
        elems = size // 4 // transport.size * transport.size
        other = type(transport)(transport.group)  # its buffers are for measuring alone
        other.prepare_reduce(elems, torch.float32, 1)
        source, out = torch.ones(elems), torch.empty(elems // transport.size)
        full, shard = torch.empty(elems), torch.ones(elems // transport.size)

        def pack(flat: torch.Tensor, flags: torch.Tensor, source: torch.Tensor = source) -> None:
            flat.copy_(source)
            flags.fill_(1)

        def reduce(other: "Transport" = other, elems: int = elems, out: torch.Tensor = out, pack=pack) -> None:
            other.reduce(pack, elems, 1, out, whole=False, accumulate=True)

        def gather(other: "Transport" = other, full: torch.Tensor = full, shard: torch.Tensor = shard) -> None:
            other.gather_into(full, shard)

        transport.gather_rows([0.0])
        slowest = transport.gather_rows([_usual_s(gather), _usual_s(reduce)]).max(dim=0).values.tolist()
        rows.append((elems * 4, *slowest))
    return rows


def _fit(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Latency and bandwidth by least squares of relative errors (ALGORITHMS 5.1); a negative latency counts as none."""
    weights = [1 / seconds**2 for _, seconds in points]
    total = sum(weights)
    mean_size = sum(w * size for w, (size, _) in zip(weights, points, strict=True)) / total
    mean_s = sum(w * seconds for w, (_, seconds) in zip(weights, points, strict=True)) / total
    spread = sum(w * (size - mean_size) ** 2 for w, (size, _) in zip(weights, points, strict=True))
    slope = sum(w * (size - mean_size) * (s - mean_s) for w, (size, s) in zip(weights, points, strict=True)) / spread
    size, seconds = points[-1]
    if slope <= 0:  # noise: one bandwidth says more
        return 0.0, size / seconds
    return max(0.0, mean_s - slope * mean_size), 1 / slope
