"""Seconds before the first step: of every unit, of this machine, and of the exchange between ranks.

Owns what is measured when, within the memory that is left, what is kept of it from run to run, and the agreement of all
ranks on one set of figures. Does not own the measurements (`scheduler/unit_times.py`, `runtime/probing.py`) nor what
becomes of them (`scheduler/cost.py`).

Nothing here may cost a run: where seconds cannot be had (a model that needs values, a unit that refuses made-up inputs,
too little memory to run a unit alone), the reason is said, and a plan is chosen without them.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..memory.errors import OutgrowError
from ..parallel.units import Unit
from ..scheduler.cost import TimeProfile, UnitSeconds
from ..scheduler.hardware import Hardware
from ..scheduler.memory_profile import MemoryProfile
from ..scheduler.stopwatch import CACHE_BYTES, Stopwatch
from ..scheduler.trace import InputDtype, Trace
from ..scheduler.twin import Shapes
from ..scheduler.unit_times import measure_seconds
from .probing import (
    PROBE_BYTES,
    cache_folder,
    fault_figures,
    kept_figures,
    machine_key,
    measure_net,
    probe,
    update_figures,
    use_memory,
)

if TYPE_CHECKING:
    from ..parallel.collectives import Transport
    from .optimizer import PiecewiseOptimizer

__all__ = ["NotProfiled", "Profiled", "Profiler"]

_SLACK_BYTES = 16 << 20  # of what measuring takes beside tensors
_USED_BYTES = 128 << 20  # that fresh blocks of units find used just before
_TEAMS_BYTES = 32 << 20  # of what kernels' helpers of more threads keep


class NotProfiled(OutgrowError):
    """Seconds could not be measured; says why."""


@dataclass(frozen=True, slots=True)
class Profiled:
    """Measured figures, the same on all ranks.

    Attributes:
        has_faults: whether units were timed where freed blocks went back at once: what they make lay in fresh pages.
    """

    times: TimeProfile
    hardware: Hardware
    has_faults: bool = False


@dataclass(frozen=True)
class Profiler:
    """What the seconds of a run are measured of.

    Attributes:
        model, units, forward, loss, shapes, input_dtype: as in `measure_seconds`.
        disk_folder: on the disk that may be used; None: none.
        transport: None on one rank.
        folder: of what is kept from run to run; None: the user's cache.
        takes_turns: whether micro-batches may take turns.
    """

    model: nn.Module
    units: Sequence[Unit]
    forward: Callable[[nn.Module, Any], Any]
    loss: Callable[[Any, Any], torch.Tensor]
    shapes: Shapes
    input_dtype: InputDtype
    optimizer: "PiecewiseOptimizer"
    disk_folder: str | None = None
    transport: "Transport | None" = None
    folder: Path | None = None
    takes_turns: bool = False

    def measure(
        self,
        trace: Trace,
        part: Any,
        memory: MemoryProfile | None = None,
        left_bytes: int | None = None,
        gives_back: bool = False,
    ) -> Profiled:
        """Measure. Collective: all ranks measure at the same time, as they will compute, and the slowest counts.

        Args:
            part: a micro-batch.
            memory: what units take; None where memory is ample.
            left_bytes: that this process may still take; None: no matter.
            gives_back: whether this process gives freed blocks back at once: fresh ones cost page faults.

        Raises:
            NotProfiled: on every rank, where any of them could not.
        """
        room = None if left_bytes is None else left_bytes - _SLACK_BYTES
        found: tuple[TimeProfile, Hardware] | NotProfiled
        try:
            hardware = _in_turns(lambda: self._machine(room), self.transport)
            times = self._unit_seconds(trace, part, memory, room, gives_back)
            if gives_back and self._fits_probe(room):  # what units' page faults took, and not those of another hour
                paged_s, huge_s = fault_figures()
                hardware = replace(hardware, fault_s_per_byte=paged_s, huge_fault_s_per_byte=huge_s)
            found = times, hardware
        except NotProfiled as error:
            found = error
        if self.transport is not None:
            return replace(_agreed(found, self.transport), has_faults=gives_back)
        if isinstance(found, NotProfiled):
            raise found
        return Profiled(*found, gives_back)

    def _machine(self, room: int | None) -> Hardware:
        folder = self.folder or cache_folder()
        found = kept_figures(self.disk_folder, folder)
        if found is None and not self._fits_probe(room):
            raise NotProfiled(
                f"measuring this machine takes {PROBE_BYTES >> 20} MiB, and {max(room or 0, 0) >> 20} MiB of the "
                "budget are left (it is done once: by `outgrow plan`, or by any run with more memory)"
            )
        try:
            found = found or probe(self.disk_folder, folder=folder)
        except (OSError, OutgrowError) as error:
            raise NotProfiled(f"this machine could not be measured: {error}") from error
        if not self._fits_probe(room):
            return found
        latency_s, elems_per_s = update_figures(self.optimizer)
        return replace(found, update_latency_s=latency_s, update_elems_per_s=elems_per_s)

    def _fits_probe(self, room: int | None) -> bool:
        return room is None or room >= PROBE_BYTES

    def _unit_seconds(
        self, trace: Trace, part: Any, memory: MemoryProfile | None, room: int | None, gives_back: bool
    ) -> TimeProfile:
        blocks = "returned" if gives_back else "kept"
        path = (self.folder or cache_folder()) / f"units-{blocks}-{machine_key(None)}.json"
        kept = _read(path)
        before = dict(kept)
        shapes, units = self.shapes, self.units

        def needed_bytes(run: int) -> int:
            assert memory is not None
            if run == len(memory.units):
                output_bytes = memory.units[-1].output_bytes
                return 4 * output_bytes + memory.loss.peak_bytes + memory.loss_backward.peak_bytes
            unit = memory.units[run]
            parameters = 2 * sum(
                torch.Size(shapes[name][0]).numel() * shapes[name][1].itemsize if name in shapes else parameter.nbytes
                for name, parameter in _named(units[unit.unit])
            )
            top = max(unit.forward.peak_bytes, unit.saved_bytes + unit.backward.collecting_peak_bytes)
            return parameters + top + 2 * (unit.input_bytes + unit.output_bytes)

        def has_room(run: int) -> bool:
            return room is None or memory is None or needed_bytes(run) <= room

        spare_bytes = CACHE_BYTES + _TEAMS_BYTES
        if room is not None and memory is not None:
            every = map(needed_bytes, range(len(memory.units) + 1))
            spare_bytes = max(0, room - max((size for size in every if size <= room), default=0))
        used_bytes = min(_USED_BYTES, max(0, spare_bytes - CACHE_BYTES)) if gives_back else 0
        # As the micro-batches and steps before one have done.
        watch = Stopwatch(min(CACHE_BYTES, spare_bytes), lambda: use_memory(used_bytes) if used_bytes else None)
        takes_turns = self.takes_turns and spare_bytes >= CACHE_BYTES + _TEAMS_BYTES
        try:
            found = measure_seconds(
                self.model, units, trace, self.forward, self.loss, part, shapes, self.input_dtype, kept, has_room,
                watch, takes_turns,
            )  # fmt: skip
        except Exception as error:  # of the user's own code too, on inputs that we made up
            raise NotProfiled(f"the model's units could not be timed: {type(error).__name__}: {error}") from error
        if kept != before:
            _write(path, kept)
        return found


def _in_turns(work: Callable[[], Hardware], transport: "Transport | None") -> Hardware:
    """Rank 0 first, then the others, which find what it has kept: they share what is measured."""
    if transport is not None and transport.rank != 0:
        transport.gather_rows([0.0])
        return work()
    try:
        return work()
    finally:
        if transport is not None:
            transport.gather_rows([0.0])


def _named(unit: Unit) -> list[tuple[str, nn.Parameter]]:
    return [(f"{unit.name}.{name}" if unit.name else name, p) for name, p in unit.module.named_parameters()]


def _agreed(found: "tuple[TimeProfile, Hardware] | NotProfiled", transport: "Transport") -> Profiled:
    """The slowest rank's seconds, and rank 0's machine with the exchange; or everyone's error. What was not measured
    travels as a negative number."""
    failed = transport.gather_rows([float(isinstance(found, NotProfiled))])[:, 0].tolist()
    if isinstance(found, NotProfiled):
        raise found
    if any(failed):
        raise NotProfiled(f"rank {failed.index(1.0)} could not measure its units or its machine")
    times, hardware = found
    numbers = [-1.0 if number is None else number for unit in times.units for number in asdict(unit).values()]
    slowest = (
        transport.gather_rows([*numbers, times.loss_s, times.loss_backward_s, times.in_turns])
        .max(dim=0)
        .values.tolist()
    )
    size = len(UnitSeconds.__dataclass_fields__)
    runs = tuple(_unit_from(slowest[size * run : size * run + size]) for run in range(len(times.units)))
    hardware = replace(hardware, net=measure_net(transport))
    return transport.broadcast_object(Profiled(TimeProfile(runs, *slowest[-3:]), hardware))


def _unit_from(numbers: Sequence[float]) -> UnitSeconds:
    """From the fields in their order; only what may be None is ever negative."""
    return UnitSeconds(*(None if number < 0 else number for number in numbers))  # type: ignore[arg-type]


def _read(path: Path) -> dict[str, UnitSeconds]:
    try:
        return {kind: UnitSeconds(*numbers) for kind, numbers in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # none, or of another version: measured anew


def _write(path: Path, kept: dict[str, UnitSeconds]) -> None:
    """As far as it goes: what is not kept is measured again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps({kind: list(asdict(unit).values()) for kind, unit in kept.items()}))
        partial.replace(path)
    except OSError:
        return
