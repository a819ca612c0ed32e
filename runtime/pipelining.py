"""A pipeline on this rank: from the caller's words to stages, state and programs, and a step of them.

Owns the order of these things. Does not own choosing (`scheduler/stage_choice.py`), programs
(`scheduler/pipeline_program.py`), passes (`stage_pass.py`) nor the rest of a step (`engine.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_leaves

from ..memory.chunk import ChunkLayout
from ..memory.timeline import Timeline
from ..parallel.actions import Action
from ..parallel.mail import Mail
from ..parallel.mesh import Mesh
from ..parallel.stage_chunks import holders_of, stage_chunks
from ..parallel.units import Unit
from ..scheduler.dataflow import Flow, check_borders, may_begin, trace_flow
from ..scheduler.memory_profile import MemoryProfile, measure_memory
from ..scheduler.pipeline_check import validate
from ..scheduler.pipeline_data import Schedule
from ..scheduler.pipeline_program import Stages, compile_stages
from ..scheduler.plan import Activations, PipelinePlan, Plan
from ..scheduler.program import Program, StepShape
from ..scheduler.rank_check import check_ranks
from ..scheduler.stage_choice import UnitSeconds, choose_stages, schedule_of
from ..scheduler.stage_memory import StageMemory
from ..scheduler.trace import Trace
from ..scheduler.twin import Shapes
from ..scheduler.verify import verify
from .batch import num_samples
from .chunk_state import OptimLayout
from .executor import Executor
from .model_state import ModelState
from .passage import Passage
from .pipeline_words import PipelineWords
from .stage_pass import MicroBatch, StagePasses
from .stage_planning import FIXED, Limits, StageFigures, checked, fit_stages
from .stage_seconds import ElemSeconds, elem_seconds, hosts_of, play_step, unit_seconds
from .stage_state import StageParts
from .step_shape import step_shape
from .unit_costs import UnitTimer
from .unit_hooks import UnitHooks

__all__ = ["Pipeline"]


class Pipeline:
    """The stages of one rank, from the first batch on.

    Args:
        shapes: of all parameters of the model.
        micro_batches: of a full batch.
    """

    def __init__(
        self,
        words: PipelineWords,
        mesh: Mesh,
        mail: Mail,
        model: nn.Module,
        units: Sequence[Unit],
        passage: Passage,
        shapes: Shapes,
    ) -> None:
        self.mail = mail
        self._words = words
        self._mesh = mesh
        self._model = model
        self._units = units
        self._passage = passage
        self._shapes = shapes
        self._flows: dict[Any, Flow] = {}
        self._schedules: dict[int, tuple[Schedule, Program]] = {}
        self._passes: StagePasses | None = None
        self._trace: Trace | None = None
        self._layouts: Sequence[ChunkLayout] = ()
        self._compiled: Any = None
        self.stages: Stages | None = None
        self.runs: Sequence[UnitSeconds] = ()  # as they were timed for the choice

    # ---- before the first step

    def choose(self, trace: Trace, part: Any, plan: Plan, limits: Limits | None, has_disk: bool) -> Plan:
        """The plan with its stages and their schedule. Collective.

        Args:
            limits: where memory is limited.
            has_disk: whether the copies of activations that a schedule has can be made.

        Raises:
            ValueError: a model that cannot be cut so; says why.
            DoesNotFit: no plan fits into the limits.
        """
        flow, self._trace = self._flow(part), trace
        names = [self._units[call.unit].name for call in trace.calls]
        starts = self._given_starts(names)
        if self._words.given is not None:
            self._check_given(self._words.given, plan, trace, flow, part, limits)
            return replace(plan, pipeline=self._words.given)
        allowed = [may_begin(flow, names, run) for run in range(len(names))]
        self.runs, hosts = unit_seconds(self._timer(part), self._mesh), hosts_of(self._mesh)
        name, ranks = self._words.schedule or "1f1b", self._mesh.num_pipeline

        def cut(memory: StageMemory | None) -> PipelinePlan:
            return choose_stages(
                name, ranks, plan.micro_batches, self.runs, self._words.chunks, starts, allowed, memory, hosts
            )

        copies = has_disk and name.startswith("pipeoffload")
        if limits is None:
            chosen = cut(None)
        else:
            limits = replace(limits, process_bytes=self.most(limits.process_bytes))
            figures = StageFigures(trace, flow, self._profile(part), self._shapes, limits)
            plan, chosen = fit_stages(plan, len(self._units), figures, cut, copies)
        check_borders(flow, names, chosen.starts)
        return replace(plan, pipeline=replace(chosen, copies_to_disk=copies))

    def _check_given(
        self, given: PipelinePlan, plan: Plan, trace: Trace, flow: Flow, part: Any, limits: Limits | None
    ) -> None:
        """Raise where a plan is of another model, or does not fit. Collective."""
        if given.starts[-1] >= len(trace.calls):
            raise ValueError(f"the plan cuts at unit run {given.starts[-1]}, and this model has {len(trace.calls)}")
        check_borders(flow, [self._units[call.unit].name for call in trace.calls], given.starts)
        if limits is None:
            return
        limits = replace(limits, process_bytes=self.most(limits.process_bytes), open=FIXED)
        figures = StageFigures(trace, flow, self._profile(part), self._shapes, limits)
        order = schedule_of(given, plan.micro_batches)
        fit_stages(plan, len(self._units), figures, lambda memory: checked(given, order, memory), given.copies_to_disk)

    def most(self, num_bytes: int) -> int:
        """Of all ranks."""
        rows: list[Any] = [None] * self._mesh.num_ranks
        dist.all_gather_object(rows, num_bytes)
        return max(rows)

    def _timer(self, part: Any) -> UnitTimer:
        assert self._trace is not None
        flow = self._flow(part)
        return UnitTimer(self._units, self._trace, flow, self._passage, self._model, self._shapes, part)

    def _given_starts(self, names: Sequence[str]) -> list[int] | None:
        if self._words.stages is None:
            return None
        starts = []
        for name in self._words.stages:
            if name not in names:
                raise ValueError(f"stages: {name!r} is no unit that this model runs; it runs {', '.join(names)}")
            starts.append(names.index(name))
        return starts if starts and starts[0] == 0 else [0, *starts]

    def layouts(
        self, trace: Trace, plan: PipelinePlan, part: Any, dtypes: Mapping[str, torch.dtype]
    ) -> tuple[tuple[ChunkLayout, ...], StageParts]:
        """This rank's chunks, and who has what."""
        flow = self._flow(part)
        with_gradient = tuple(
            start > 0 and any(spec.requires_grad for spec in flow.outputs[start - 1].specs) for start in plan.starts
        )
        self.stages = Stages(plan.starts, len(trace.calls), plan.placement, with_gradient)
        used = []
        for stage in range(len(plan.starts)):
            names: set[str] = set()
            for run in self.stages.runs(stage):
                names |= trace.calls[run].parameters | flow.parameters[run]
            used.append(frozenset(names | (flow.parameters[-1] if stage == len(plan.starts) - 1 else set())))
        holders = holders_of(self._model, used, plan.placement)
        rank = self._mesh.pipeline_rank
        layouts, peers = stage_chunks(self._model, self._units, holders, rank, self._mesh.num_data, dict(dtypes))
        self._layouts = layouts
        parts = StageParts(self.mail, peers, self._plain_shapes(), self._buffers_of(trace, rank))
        return layouts, parts

    def _plain_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {name: (tuple(shape), dtype) for name, (shape, dtype) in self._shapes.items()}

    def _buffers_of(self, trace: Trace, rank: int) -> frozenset[str]:
        assert self.stages is not None
        local = {trace.calls[run].unit for stage in self.stages.on(rank) for run in self.stages.runs(stage)}
        everywhere = [unit for index, unit in enumerate(self._units) if index in {c.unit for c in trace.calls}]
        inside = {
            f"{unit.name}.{name}"
            for unit in everywhere
            for name, _ in unit.module.named_buffers(remove_duplicate=False)
        }
        own = {
            f"{self._units[index].name}.{name}"
            for index in local
            for name, _ in self._units[index].module.named_buffers(remove_duplicate=False)
        }
        outside = {name for name, _ in self._model.named_buffers(remove_duplicate=False)} - inside
        return frozenset(own | (outside if rank == 0 else set()))

    def open(
        self,
        trace: Trace,
        plan: Plan,
        layouts: Sequence[ChunkLayout],
        peers: Mapping[int, tuple[int, ...]],
        hooks: UnitHooks,
        executor: Executor,
        part: Any,
        optims: Sequence[OptimLayout | None],
    ) -> StepShape:
        """Make ready for steps.

        Args:
            optims: as in `step_shape`.
        """
        assert self.stages is not None
        assert plan.pipeline is not None
        has_backward = [call.has_backward for call in trace.calls]
        shape = self._shape(trace, plan, layouts, part, optims)
        self._compiled = (shape, plan, sorted(peers))
        self._schedules = {}
        splits = any(a.kind.name == "W" for order in schedule_of(plan.pipeline, 2).orders for a in order)
        self._passes = StagePasses(
            self._passage, self._units, hooks, executor, self.stages, self.mail, splits, has_backward,
            self._own_chunks(shape),
        )  # fmt: skip
        self._passes.install()
        return shape

    def _own_chunks(self, shape: StepShape) -> list[dict[int, list[int]]]:
        """For each stage, the chunks that no other stage of this rank uses, by the unit run that the backward pass
        comes to first."""
        assert self.stages is not None
        used = [
            {chunk for run in self.stages.runs(stage) for chunk in shape.uses(run)}
            for stage in range(len(self.stages.starts))
        ]
        result: list[dict[int, list[int]]] = []
        for stage, chunks in enumerate(used):
            left = chunks.difference(*(other for other in used if other is not chunks))
            first: dict[int, list[int]] = {}
            for run in reversed(self.stages.runs(stage)):
                if shape.units[run].has_backward:
                    first[run] = sorted(left.intersection(shape.uses(run)))
                    left = left.difference(first[run])
            result.append(first)
        return result

    def _shape(
        self,
        trace: Trace,
        plan: Plan,
        layouts: Sequence[ChunkLayout],
        part: Any,
        optims: Sequence[OptimLayout | None],
    ) -> StepShape:
        assert self.stages is not None
        held = {item.name for layout in layouts for item in layout.fields}
        local = {run for stage in self.stages.on(self._mesh.pipeline_rank) for run in self.stages.runs(stage)}
        calls = tuple(
            replace(call, parameters=call.parameters & held if run in local else frozenset())
            for run, call in enumerate(trace.calls)
        )
        own = replace(trace, calls=calls, between=trace.between & held)
        profile = None
        if plan.pipeline is not None and (plan.pipeline.copies_to_disk or Activations.OFFLOAD_DISK in plan.activations):
            profile = self._profile(part)
        tensors = [leaf for leaf in tree_leaves(part) if isinstance(leaf, torch.Tensor)]
        shape = step_shape(own, self._units, layouts, plan, optims, profile, sum(leaf.nbytes for leaf in tensors))
        flow = self._flow(part)
        border = tuple(0 if not start else flow.outputs[start - 1].num_bytes for start in self.stages.starts)
        return replace(shape, starts=self.stages.starts, border_bytes=border)

    def _profile(self, part: Any) -> MemoryProfile:
        """What a micro-batch takes, measured without computing."""
        passage = self._passage
        return measure_memory(self._model, self._units, passage.forward, passage.call_loss, part, self._shapes)

    # ---- a step

    def program(self, micro_batches: int) -> Program:
        """For so many micro-batches: a last batch may have fewer."""
        return self._scheduled(micro_batches)[1]

    def _scheduled(self, micro_batches: int) -> tuple[Schedule, Program]:
        assert self.stages is not None
        if micro_batches not in self._schedules:
            shape, plan, tied = self._compiled
            assert plan.pipeline is not None
            schedule = schedule_of(plan.pipeline, micro_batches)
            validate(schedule)
            rank = self._mesh.pipeline_rank
            others = range(self._mesh.num_pipeline)
            programs = {
                other: compile_stages(shape, plan, schedule, self.stages, other, tied if other == rank else ())
                for other in others
            }
            verify(programs[rank], shape, replace(plan, micro_batches=micro_batches))
            check_ranks([programs[other] for other in others], [[other] for other in others])
            self._schedules[micro_batches] = schedule, programs[rank]
        return self._schedules[micro_batches]

    def predict(
        self, part: Any, micro_batches: int, alone: Callable[[nn.Parameter], torch.optim.Optimizer]
    ) -> Timeline | None:
        """This rank's part of a step whose ranks end together, from units that are timed now. Collective.

        Args:
            part: a micro-batch.
            alone: makes the optimizer of one parameter.

        Returns:
            None where a step does what is not timed here: moves to disk, exchanges between data ranks.
        """
        programs, elems = self._all_programs(micro_batches)
        kinds = {instruction.action.kind for program in programs for instruction in program.instructions}
        runs = unit_seconds(self._timer(part), self._mesh, kinds)
        played = play_step(programs, runs, hosts_of(self._mesh), elem_seconds(alone), elems)
        return None if played is None else played[self._mesh.pipeline_rank]

    def foresee(self, micro_batches: int, runs: Sequence[UnitSeconds], elem_s: ElemSeconds) -> Timeline | None:
        """As `predict`, from units that were timed before. Collective."""
        programs, elems = self._all_programs(micro_batches)
        played = play_step(programs, runs, hosts_of(self._mesh), elem_s, elems)
        return None if played is None else played[self._mesh.pipeline_rank]

    def _all_programs(self, micro_batches: int) -> tuple[list[Program], list[list[int]]]:
        """Of this rank's pipeline, with the elements of their chunks. Collective."""
        num_elems = [layout.num_elems * layout.trainable for layout in self._layouts]
        rows: list[Any] = [None] * self._mesh.num_ranks
        dist.all_gather_object(rows, (self.program(micro_batches).text(), num_elems))
        texts, elems = zip(*rows[self._mesh.data_rank :: self._mesh.num_data], strict=True)
        return [Program.parse(text) for text in texts], list(elems)

    def micro_batches(self, micro: Sequence[Any], samples: int) -> list[MicroBatch]:
        """The parts of a rank's batch, with what flows through the stages in each."""
        return [
            MicroBatch(None, 0.0, None)
            if part is None
            else MicroBatch(part, num_samples(part) / samples, self._flow(part))
            for part in micro
        ]

    def begin(self, attempt: int, step: int, micro: Sequence[MicroBatch], state: ModelState) -> None:
        """A step begins, before anything of it is sent or received: lanes set off before the model does.

        Args:
            attempt: counts steps, those that failed too, alike on all ranks.
        """
        self.mail.begin(attempt)
        self.passes.begin(step, micro, state)

    def run(self, micro: Sequence[MicroBatch], state: ModelState) -> None:
        """All stage-level actions of this rank. `losses` has what came out."""
        assert self._passes is not None
        schedule, _ = self._scheduled(len(micro))
        for action in schedule.orders[self._mesh.pipeline_rank]:
            self._passes.run(action)
            state.micro_loss = sum(self.losses[number] * micro[number].weight for number in sorted(self.losses))
        self._passes.end()

    @property
    def passes(self) -> StagePasses:
        assert self._passes is not None
        return self._passes

    @property
    def losses(self) -> dict[int, float]:
        return self.passes.losses

    def send(self, action: Action) -> None:
        """SEND_F and SEND_B."""
        self.passes.send(action)

    def receive(self, action: Action) -> None:
        """RECV_F and RECV_B."""
        self.passes.receive(action)

    def forget(self) -> None:
        """What a step that failed has left."""
        if self._passes is not None:
            self._passes.forget()

    def close(self) -> None:
        """May be repeated."""
        if self._passes is not None:
            self._passes.remove()
        self.mail.close()

    def _flow(self, part: Any) -> Flow:
        key = tuple(
            (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else repr(type(leaf))
            for leaf in tree_leaves(part)
        )
        if key not in self._flows:
            self._flows[key] = trace_flow(self._model, self._units, self._passage.forward, part, self._shapes)
        return self._flows[key]
