"""Pipelines as candidates beside the data-parallel plan: what is measured for them, in which order, and the choice.

Owns the measuring for one model and its first batch, within what is left of the budget. Does not own prices nor the
choice (`scheduler/layout_choice.py`), stages that fit (`stage_planning.py`), nor running one (`pipelining.py`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..memory.allocator import release_kernel_buffers, return_freed_blocks
from ..memory.errors import DoesNotFit, OutgrowError
from ..memory.process import read_process_memory
from ..parallel.mesh import Mesh
from ..parallel.units import Unit, named_trainable
from ..scheduler.assessment import Open
from ..scheduler.counting import possible_counts
from ..scheduler.dataflow import Flow, may_begin, trace_flow
from ..scheduler.layout_choice import (
    Layout,
    LayoutFigures,
    Priced,
    beside_pipelines,
    choose_layout,
    floor_seconds,
    pipeline_layouts,
    pipeline_seconds,
    with_recompute,
)
from ..scheduler.memory_profile import MemoryProfile, measure_memory
from ..scheduler.pipeline_data import Schedule, ScheduleError
from ..scheduler.plan import Activations, PipelinePlan, Plan, with_zero
from ..scheduler.prediction import Fate
from ..scheduler.stage_choice import UnitSeconds, choose_stages, schedule_of
from ..scheduler.stage_memory import StageMemory
from ..scheduler.trace import Trace
from ..scheduler.twin import Shapes
from .batch import num_samples, split_batch
from .host_figures import RESERVE_BYTES
from .optimizer import PiecewiseOptimizer
from .passage import Passage
from .profiling import Profiled, Profiler
from .stage_planning import Limits, StageFigures, checked, fit_stages, limits_of
from .stage_seconds import ElemSeconds, hosts_of, unit_seconds
from .unit_costs import UnitTimer

if TYPE_CHECKING:
    from ..parallel.collectives import Transport

__all__ = ["Better", "PipelineSearch"]

_AMPLE = 0.75  # of the budget, for a plan that keeps freed blocks
_SLACK_BYTES = 64 << 20  # of what measuring takes beside tensors


class NoLayout(OutgrowError):
    """A layout that cannot be; says why."""


@dataclass(frozen=True)
class Better:
    """A pipeline that is faster than any plan without one.

    Attributes:
        plan: to be run as it stands.
        seconds: of a step.
        runs, elem_s: what unit runs and updates took, for what is foreseen of it.
        fates: of all plans that were looked at, this one first.
        took_s: what was done to come to the plan -> how long it took.
    """

    plan: Plan
    seconds: float
    runs: tuple[UnitSeconds, ...]
    elem_s: ElemSeconds
    fates: tuple[Fate, ...]
    took_s: dict[str, float] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class _Measured:
    """Of one layout's micro-batch."""

    trace: Trace
    flow: Flow
    memory: MemoryProfile
    profiled: Profiled
    part: Any


@dataclass(frozen=True)
class PipelineSearch:
    """What pipelines are looked for with. All of it is the same on all ranks, but for the samples.

    Attributes:
        base: the plan with everything that is fixed, of all ranks side by side.
        open_: what is not fixed.
        zero: that the caller fixed; None: open.
        counts_open: whether the number of micro-batches is.
        budget_bytes: of this process.
        dtypes: of parameters as they were given.
        transport: of all ranks.
        record: f(micro-batch) -> the order of units.
        share: f(data ranks) -> this rank's samples of the first batch, where so many share it out.
    """

    model: nn.Module
    units: Sequence[Unit]
    passage: Passage
    shapes: Shapes
    optimizer: PiecewiseOptimizer
    dtypes: Mapping[str, torch.dtype]
    base: Plan
    open_: Open
    zero: int | None
    counts_open: bool
    budget_bytes: int
    rank: int
    transport: "Transport"
    record: Callable[[Any], Trace]
    share: Callable[[int], Any]

    def run(self, best_s: float, others: Sequence[Fate], words: str) -> tuple[Better | None, tuple[Fate, ...]]:
        """A pipeline that is faster than `best_s`, if any, and the fates of all plans. Collective.

        Args:
            best_s: of a step of the best plan without one; infinite where none fits.
            others: the fates of plans without one, as far as there are several.
            words: the best of them, in words.
        """
        if not others and best_s < math.inf:
            others = [Fate(words, best_s, 0, "chosen")]
        found = _Looking(self)
        layouts = pipeline_layouts(self.transport.size, len(self.units), self._counts)
        if not layouts:
            return None, tuple(others)
        best, fates = choose_layout(best_s, layouts, found.floor, found.priced)
        best, fates = self.transport.broadcast_object((best, fates))
        every = beside_pipelines(others, fates, best)
        if best is None:
            return None, every
        layout = found.layouts[best.plan]
        return Better(best.plan, best.seconds, found.runs[layout], found.elem_s(layout), every), every

    def _counts(self, num_ranks: int, num_data: int) -> Sequence[int]:
        """With fewer micro-batches than ranks some rank always waits; with four times as many, few do."""
        if not self.counts_open:
            return [self.base.micro_batches]
        counts = self.transport.broadcast_object(possible_counts(num_samples(self.share(num_data))))
        enough = [count for count in counts if 2 * num_ranks <= count <= 4 * num_ranks]
        return enough or counts[-1:]


class _Looking:
    """One search."""

    def __init__(self, search: PipelineSearch) -> None:
        self.search = search
        self.runs: dict[Layout, tuple[UnitSeconds, ...]] = {}
        self.layouts: dict[Plan, Layout] = {}
        self._measured: dict[Layout, _Measured] = {}
        self._hosts: dict[Layout, tuple[int, ...]] = {}

    def floor(self, layout: Layout) -> float:
        """Collective."""
        self._refuse(layout)
        measured = self._measured[layout] = self._measure(layout)
        hardware = measured.profiled.hardware
        return floor_seconds(
            layout, measured.profiled.times, sum(self._num_elems.values()), hardware.update_elems_per_s
        )

    def elem_s(self, layout: Layout) -> ElemSeconds:
        hardware = self._measured[layout].profiled.hardware
        return ElemSeconds(1 / hardware.update_elems_per_s, 4 / hardware.copy_bytes_per_s)

    def priced(self, layout: Layout, name: str) -> Priced:
        """Collective."""
        measured, search = self._measured[layout], self.search
        if layout not in self.runs:
            self._time_units(layout, measured)
        runs, hosts = self.runs[layout], self._hosts[layout]
        names = [search.units[call.unit].name for call in measured.trace.calls]
        allowed = [may_begin(measured.flow, names, run) for run in range(len(names))]

        again = [with_recompute(run) for run in runs]
        orders: dict[PipelinePlan, Schedule] = {}

        def cut(memory: StageMemory, recomputes: bool) -> PipelinePlan:
            """By seconds alone, where that fits: the way to the other cuts is long."""
            costs = again if recomputes else runs
            choose = partial(choose_stages, name, layout.num_ranks, layout.micro_batches, costs)
            try:
                free = choose(allowed=allowed, hosts=hosts)
                orders[free] = schedule_of(free, layout.micro_batches)
                return checked(free, orders[free], memory)
            except ScheduleError:
                return choose(allowed=allowed, memory=memory, hosts=hosts)

        plan, memory = self._fitting(layout, measured, cut)
        chosen = plan.pipeline
        assert chosen is not None
        order = orders.get(chosen) or schedule_of(chosen, layout.micro_batches)
        seconds = pipeline_seconds(layout, plan, order, self._figures(layout, measured))
        ends = [*chosen.starts[1:], len(names)]
        needed = memory.needs(order).ranks(list(zip(chosen.starts, ends, strict=True)))
        peak_bytes = int(max(needed)) + self._limits().process_bytes + RESERVE_BYTES
        self.layouts[plan] = layout
        return Priced(plan, seconds, peak_bytes, f"{layout.words}, {name}{_means(plan)}")

    # ---- what cannot be

    def _refuse(self, layout: Layout) -> None:
        search = self.search
        if layout.micro_batches == 1:
            raise NoLayout("with one micro-batch all ranks but one wait; give micro_batches= more, or 'auto'")
        if search.zero and layout.num_data == 1:
            raise NoLayout(f"zero={search.zero} was asked for, and no two of its ranks have the same state to share")
        for name, module in search.model.named_modules():
            if isinstance(module, _BatchNorm):
                raise NoLayout(f"its micro-batches are larger, and {name} normalises over the samples of one")

    # ---- figures

    @property
    def _num_elems(self) -> dict[str, int]:
        shapes = self.search.shapes
        return {name: torch.Size(shapes[name][0]).numel() for name, _ in named_trainable(self.search.model)}

    def _measure(self, layout: Layout) -> _Measured:
        search, passage = self.search, self.search.passage
        part = split_batch(search.share(layout.num_data), layout.micro_batches)[0]
        if part is None:
            raise NoLayout("the first batch leaves a micro-batch without samples")
        try:
            trace = search.record(part)
            flow = trace_flow(search.model, search.units, passage.forward, part, search.shapes)
            memory = measure_memory(search.model, search.units, passage.forward, passage.call_loss, part, search.shapes)
        except Exception as error:  # of the user's own code, without values
            raise NoLayout(f"{type(error).__name__}: {error}") from error
        profiler = Profiler(
            search.model, search.units, passage.forward, passage.call_loss, search.shapes, passage.input_dtype,
            search.optimizer, None, search.transport,
        )  # fmt: skip
        try:
            profiled = profiler.measure(trace, part, memory, self._left_bytes())
        finally:
            release_kernel_buffers()  # of threads that are over, too
            return_freed_blocks()
        return _Measured(trace, flow, memory, profiled, part)

    def _left_bytes(self) -> int:
        return self.search.budget_bytes - read_process_memory().resident_bytes

    def _time_units(self, layout: Layout, measured: _Measured) -> None:
        """Forward, both halves of backward, all of it, on all ranks at once and on one alone."""
        search = self.search
        needed = self._timing_bytes(measured)
        left = int(search.transport.gather_rows([float(self._left_bytes())]).min())
        if needed > left:
            raise NoLayout(f"timing its units takes {needed >> 20} MiB, and {max(left, 0) >> 20} MiB are left")
        mesh = Mesh(search.rank, layout.num_data, layout.num_ranks)
        timer = UnitTimer(
            search.units, measured.trace, measured.flow, search.passage, search.model, search.shapes, measured.part
        )
        try:
            self.runs[layout] = tuple(unit_seconds(timer, mesh))
        except RuntimeError as error:  # of the user's own code, on inputs that we made up: the same on all ranks
            raise NoLayout(f"its units could not be timed: {type(error).__name__}: {error}") from error
        self._hosts[layout] = hosts_of(mesh)
        del timer
        return_freed_blocks()

    def _timing_bytes(self, measured: _Measured) -> int:
        """Every kind of unit with values and gradients, and the fullest of them at work."""
        sizes: dict[Any, int] = {}
        shapes = self.search.shapes
        for call in measured.trace.calls:
            module = self.search.units[call.unit].module
            kind = type(module), tuple(tuple(p.shape) for p in module.parameters())
            sizes[kind] = 2 * sum(
                torch.Size(shapes[name][0]).numel() * shapes[name][1].itemsize for name in call.parameters
            )
        memory = measured.memory
        loss = memory.loss.peak_bytes + memory.loss_backward.peak_bytes + 4 * memory.units[-1].output_bytes
        top = max(max(u.forward.peak_bytes, u.saved_bytes + u.backward.peak_bytes) for u in memory.units)
        return sum(sizes.values()) + max(top, loss) + _SLACK_BYTES

    def _figures(self, layout: Layout, measured: _Measured) -> LayoutFigures:
        hardware, flow = measured.profiled.hardware, measured.flow
        is_here = len(set(self._hosts[layout])) == 1
        net = hardware.net
        return LayoutFigures(
            self.runs[layout],
            self._hosts[layout],
            tuple(output.num_bytes for output in flow.outputs),
            _parameters(measured),
            self._num_elems,
            hardware.copy_bytes_per_s if is_here or net is None else net.gather_bytes_per_s,
            hardware.update_elems_per_s,
            hardware.action_s,
            net,
            self.search.transport.name == "shared-memory",
        )

    # ---- memory

    def _fitting(
        self, layout: Layout, measured: _Measured, cut: Callable[[StageMemory, bool], PipelinePlan]
    ) -> tuple[Plan, StageMemory]:
        """In memory with room to keep freed blocks, or without; or with all units recomputed.

        Raises:
            NoLayout: what would be moved to disk, whose seconds are not known in a pipeline.
            DoesNotFit: none does.
        """
        search = self.search
        plan = replace(
            with_zero(search.base, self._zero(layout)), world_size=layout.num_data, micro_batches=layout.micro_batches
        )
        if plan.uses_disk:
            raise NoLayout("what moves to disk inside a pipeline is not priced; give pipeline= to have it so")
        limits = self._limits()
        limits = replace(limits, open=replace(limits.open, homes=False, activations=False))
        lean = replace(limits, budget_bytes=limits.budget_bytes - _SLACK_BYTES)
        ways = [
            (replace(limits, budget_bytes=int(limits.budget_bytes * _AMPLE)), replace(plan, keeps_freed=True)),
            (lean, plan),
        ]
        if search.open_.activations:
            ways.append((lean, replace(plan, activations=(Activations.RECOMPUTE,) * len(search.units))))
        refused: OutgrowError | None = None
        for limit, each in ways:
            figures = StageFigures(measured.trace, measured.flow, measured.memory, search.shapes, limit)
            recomputes = any(word.is_recomputed for word in each.activations)
            try:
                fitting, chosen = fit_stages(
                    each, len(search.units), figures, lambda memory, again=recomputes: cut(memory, again), copies=False
                )
            except DoesNotFit as error:
                refused = error
                continue
            return replace(fitting, pipeline=chosen), figures.of(fitting, copies=False)
        assert refused is not None
        raise refused

    def _zero(self, layout: Layout) -> int:
        if self.search.zero is not None:
            return self.search.zero
        return 3 if layout.num_data > 1 else 0

    def _limits(self) -> Limits:
        search = self.search
        found = limits_of(search.model, search.budget_bytes, search.open_, search.dtypes, search.optimizer.slots)
        rows = search.transport.gather_rows([float(found.process_bytes), float(found.budget_bytes)])
        return replace(found, process_bytes=int(rows[:, 0].max()), budget_bytes=int(rows[:, 1].min()))


def _parameters(measured: _Measured) -> tuple[frozenset[str], ...]:
    calls, used = measured.trace.calls, measured.flow.parameters
    names = [set(call.parameters) | used[run] for run, call in enumerate(calls)]
    names[-1] |= used[-1]
    return tuple(frozenset(each) for each in names)


def _means(plan: Plan) -> str:
    """What else than memory is used."""
    recomputed = sum(word.is_recomputed for word in plan.activations)
    words = f", {recomputed} units recomputed" if recomputed else ""
    return words + (", state on disk" if plan.uses_disk else "")
