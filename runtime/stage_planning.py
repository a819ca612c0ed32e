"""The stages that fit into a budget: where a pipeline is cut, and what lies elsewhere than in memory inside its stages.

Owns the order in which means are tried, and the figures that cuts are made by. Does not own the cut
(`scheduler/stage_choice.py`), nor measuring. The figures are those of a whole stage, added up without looking at when
what is at its most: a plan that is chosen needs no more than that.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..memory.budget import format_bytes
from ..memory.errors import DoesNotFit
from ..parallel.units import named_trainable
from ..scheduler.dataflow import Flow
from ..scheduler.fit import Open, offloaded
from ..scheduler.memory_profile import MemoryProfile
from ..scheduler.pipeline_data import Schedule, ScheduleError
from ..scheduler.plan import Activations, Home, PipelinePlan, Plan, UpdateTime
from ..scheduler.stage_memory import StageMemory
from ..scheduler.trace import Trace
from ..scheduler.twin import Shapes
from .host_figures import RESERVE_BYTES, process_bytes

__all__ = ["FIXED", "Limits", "StageFigures", "checked", "fit_stages", "limits_of"]

FIXED = Open(homes=False, activations=False, order=False, update=False, may_adapt=False)
"""Where a plan is run as it stands."""

_NUM_BUFFERS = 3  # of what comes from disk: one that is read, one that is used, one that is written
_BORDERS = 4  # inputs and outputs of a stage that wait, each way


@dataclass(frozen=True)
class Limits:
    """What a rank's memory allows, and what may be decided to stay within it.

    Attributes:
        budget_bytes: of the process.
        process_bytes: that it has without the model.
        open: what the caller has not fixed.
        trainable: names of parameters.
        dtypes: of parameters as they were given.
        slots: of the optimizer.
    """

    budget_bytes: int
    process_bytes: int
    open: Open
    trainable: frozenset[str]
    dtypes: Mapping[str, torch.dtype]
    slots: Mapping[str, torch.dtype]


def limits_of(
    model: nn.Module,
    budget_bytes: int,
    open_: Open,
    dtypes: Mapping[str, torch.dtype],
    slots: Mapping[str, torch.dtype],
) -> Limits:
    """Of this process, whose model is not of the process. The rest as in `Limits`."""
    trainable = frozenset(name for name, _ in named_trainable(model))
    return Limits(budget_bytes, process_bytes(list(model.parameters())), open_, trainable, dtypes, slots)


@dataclass(frozen=True)
class StageFigures:
    """What the memory of stages follows from.

    Attributes:
        shapes: of all parameters.
        limits: the same on all ranks.
    """

    trace: Trace
    flow: Flow
    profile: MemoryProfile
    shapes: Shapes
    limits: Limits

    def of(self, plan: Plan, copies: bool) -> StageMemory:
        """The figures of one plan; all of its chunks are treated alike."""
        decision = plan.chunks[0]
        owned = plan.world_size if decision.optimizer_sharded else 1
        state: dict[str, float] = {}
        on_disk: dict[str, float] = {}
        for name, (shape, dtype) in self.shapes.items():
            elems = torch.Size(shape).numel()
            own_dtype = self.limits.dtypes.get(name, dtype)
            slots = own_dtype.itemsize if own_dtype is not dtype else 0
            gradient = 0
            if name in self.limits.trainable:
                slots += sum(slot.itemsize for slot in self.limits.slots.values())
                gradient = 4 if plan.sums_gradients else dtype.itemsize
            values = dtype.itemsize / (plan.world_size if decision.parameters_sharded else 1)
            at_home = values if decision.parameter_home is Home.HOST else 0
            at_home += slots / owned if decision.optimizer_home is Home.HOST else 0
            state[name] = elems * (at_home + gradient / (plan.world_size if decision.gradients_sharded else 1))
            moved = dtype.itemsize if decision.parameter_home is Home.DISK or decision.parameters_sharded else 0
            moved += slots / owned if decision.optimizer_home is Home.DISK else 0
            on_disk[name] = _NUM_BUFFERS * elems * moved
        names = [set(call.parameters) | self.flow.parameters[run] for run, call in enumerate(self.trace.calls)]
        names[-1] |= self.flow.parameters[-1]
        saved, waiting, working = [], [], []
        for run, unit in enumerate(self.profile.units):
            word = plan.activations_of(unit.unit)
            whole = unit.saved_bytes + unit.saved_input_bytes
            saved.append(0 if word.is_offloaded else unit.input_bytes if word is Activations.RECOMPUTE else whole)
            waiting.append(2 * whole if word is Activations.RECOMPUTE else 0)  # inputs, and gradients of outputs
            peak = max(unit.forward.peak_bytes, unit.backward.peak_bytes, self._after(run))
            again = unit.recompute_peak_bytes if word is Activations.RECOMPUTE else 0
            moves = word is Activations.OFFLOAD_DISK or (copies and word is Activations.KEEP)
            staged = _NUM_BUFFERS * whole if moves else 0
            border = _BORDERS * self.flow.outputs[run].num_bytes
            working.append(int(peak + again + staged + border + sum(on_disk[name] for name in names[run])))
        return StageMemory(
            max(self.limits.budget_bytes - self.limits.process_bytes - RESERVE_BYTES, 0),
            tuple(frozenset(each) for each in names),
            state,
            tuple(saved),
            tuple(waiting),
            tuple(working),
            copies,
        )

    def _after(self, run: int) -> int:
        """What comes behind the last unit."""
        if run + 1 < len(self.profile.units):
            return 0
        return self.profile.loss.peak_bytes + self.profile.loss_backward.peak_bytes


def fit_stages(
    plan: Plan,
    num_units: int,
    figures: StageFigures,
    choose: Callable[[StageMemory], PipelinePlan],
    copies: bool,
) -> tuple[Plan, PipelinePlan]:
    """The first plan whose stages fit: in memory; units recomputed; optimizer slots on disk; parameters too.

    Args:
        plan: with what is fixed.
        choose: cuts within the given figures; raises ScheduleError where nothing fits.
        copies: whether the schedule's copies of activations go to disk.

    Raises:
        DoesNotFit: none of them fits.
    """
    why, limits = "", figures.limits
    for candidate in _candidates(plan, limits.open, num_units):
        try:
            return candidate, choose(figures.of(candidate, copies))
        except ScheduleError as error:
            why = str(error)
    more = "" if limits.open.disk else "give a disk (Memory(disk='/a/folder')), "
    raise DoesNotFit(
        f"no plan of this pipeline fits into {format_bytes(limits.budget_bytes)} a rank, of which "
        f"{format_bytes(limits.process_bytes)} are the process itself; of the leanest one, {why}. What helps: {more}"
        "smaller micro-batches (a larger micro_batches=), more pipeline ranks, a schedule that keeps less (v-half, "
        "v-min, 1f1b), a larger budget"
    )


def checked(given: PipelinePlan, order: Schedule, memory: StageMemory) -> PipelinePlan:
    """The stages that are given.

    Args:
        order: their schedule.

    Raises:
        ScheduleError: they do not fit.
    """
    ends = [*given.starts[1:], len(memory.parameters)]
    needed = memory.needs(order).ranks(list(zip(given.starts, ends, strict=True)))
    worst = max(range(given.num_ranks), key=needed.__getitem__)
    if needed[worst] > memory.limit_bytes:
        raise ScheduleError(
            f"the stages of rank {worst} need {needed[worst]:,.0f} bytes, and {memory.limit_bytes:,} are left for them"
        )
    return given


def _candidates(plan: Plan, open_: Open, num_units: int) -> Iterator[Plan]:
    policies: Sequence[tuple[Activations, ...]] = [plan.activations]
    if open_.activations:
        policies = [(), (Activations.RECOMPUTE,) * num_units]
    homes: list[tuple[Home, Home] | None] = [None]
    if open_.homes and open_.disk:
        homes += [(Home.HOST, Home.DISK), (Home.DISK, Home.DISK)]
    for home in homes:
        chunks = plan.chunks if home is None else tuple(offloaded(chunk, *home) for chunk in plan.chunks)
        update = UpdateTime.BACKWARD if home and open_.update and not plan.clips_gradients else plan.update
        for policy in policies:
            yield replace(plan, chunks=chunks, activations=policy, update=update)
