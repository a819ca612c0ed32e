"""The first batch of an engine: the order of units, the plan that fits, its program, the state where it has its home.

Owns what can only be done once a batch is there. Does not own the constructor (`prepared.py`), the plan (`planning.py`)
nor a step (`engine.py`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from math import inf
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..memory.allocator import StepHeap
from ..memory.budget import Memory
from ..memory.chunk import ChunkLayout
from ..memory.errors import DoesNotFit
from ..memory.process import read_process_memory
from ..memory.tiers import Tiers
from ..parallel.actions import Action, Kind
from ..parallel.mesh import Mesh
from ..parallel.units import ROOT, Unit
from ..scheduler.assessment import Open, describe
from ..scheduler.counting import choose_count, possible_counts
from ..scheduler.ledger import Ledger
from ..scheduler.plan import Activations, Home, MicroBatchOrder, Plan
from ..scheduler.prediction import Fate, Prediction
from ..scheduler.program import Program
from ..scheduler.trace import Phase, Trace, trace_model
from .batch import num_samples, split_batch
from .constraints import Constraints, offloaded
from .disk_tier import DiskTier
from .engine_checks import check_fit
from .executor import Executor
from .host_figures import RESERVE_BYTES
from .model_state import ModelState
from .moving import MovingActivations
from .offload import optim_layouts
from .opening import fill_with, lay_out, open_moves, open_state, open_tier, recompute_units
from .optimizer import PiecewiseOptimizer
from .passage import Passage
from .planned import Planned
from .planning import Planner
from .recompute import Recomputed
from .turns import Turns
from .unit_hooks import UnitHooks

if TYPE_CHECKING:
    from ..parallel.collectives import Transport
    from ..scheduler.stage_choice import UnitSeconds
    from .filling import Filler
    from .layouts import Better
    from .pipelining import Pipeline
    from .stage_seconds import ElemSeconds

__all__ = ["FirstBatch"]


class FirstBatch(ABC):
    """The part of `Engine` that runs once a batch is there. What it works with is made by `PreparedEngine`."""

    _explores = False

    model: nn.Module
    memory: Memory
    plan: Plan
    transport: "Transport | None"
    lr_scheduler: Any
    predicted: Ledger | None
    predicted_device: Ledger | None
    prediction: Prediction | None
    prediction_note: str
    _units: Sequence[Unit]
    _mesh: Mesh
    _layouts: Sequence[ChunkLayout]
    _constraints: Constraints
    _optimizer: PiecewiseOptimizer
    _passage: Passage
    _original_dtypes: Mapping[str, torch.dtype]
    _tiers: Tiers | None
    _tier: DiskTier | None
    _state: ModelState | None
    _pipeline: "Pipeline | None"
    _executor: Executor
    _turns: Turns
    _hooks: UnitHooks
    _moving: MovingActivations | None
    _recomputed: list[Recomputed]
    _trace: Trace | None
    _program: Program | None
    _heap: StepHeap | None
    _freed_stay: bool
    _held: tuple[int, ...]
    _filler: "Filler | None"
    _make_lr_scheduler: Callable[..., Any] | None
    _clip_grad_norm: float | None
    _run_name: str
    _seed: int
    _is_ample: bool
    _is_given: bool
    _predicts: bool
    _has_budget: bool
    _opens_zero: bool
    _opens_count: bool
    _zero: int | None
    _shares: Callable[[int], Any] | None
    better: "Better | None"

    @property
    def state(self) -> ModelState:
        """The model's state on this rank. Where it waits for the first batch to be planned: all of it on the farthest
        tier."""
        if self._state is None and self._pipeline is not None:
            raise ValueError("the stages of a pipeline are known after the first step: ask then, or give example=")
        if self._state is None:
            if self._open.homes and not self._is_ample:
                farthest = Home.HOST if self.memory.disk is None else Home.DISK
                everything = tuple(offloaded(chunk, farthest, farthest) for chunk in self.plan.chunks)
                self.plan = replace(self.plan, chunks=everything)
            self._open_state()
        assert self._state is not None
        return self._state

    def _open_state(self, make: Callable[..., ModelState] = ModelState) -> None:
        """Put the model's state where the plan has its home."""
        self._state, self._tier = open_state(
            self.model,
            self._layouts,
            self.plan,
            self._optimizer,
            self.transport,
            self._clip_grad_norm,
            self._original_dtypes,
            self.memory,
            self._run_name,
            fill_with(self._filler, self.model, self._units),
            make,
            self._tiers,
            self._mesh.rank,
        )
        if self._make_lr_scheduler is not None:
            self.lr_scheduler = self._make_lr_scheduler(self._optimizer.optimizer)
        self._state.drop_all()

    def _compile(self, batch: Any) -> None:
        """Record the order of units, find the plan that fits, and compile its program, once."""
        if self._program is not None:
            return
        if not num_samples(batch):
            raise ValueError("the first step's batch leaves a rank without samples: use a larger batch or fewer ranks")
        if self._pipeline is not None:
            self._compile_pipeline(self._pipeline, split_batch(batch, self.plan.micro_batches)[0])
            return
        base, refused = self.plan, None
        try:
            self._choose(batch)
        except DoesNotFit as error:
            refused = error
        if self._shares is not None:
            self._look_at_pipelines(base, self._shares, refused)
        if self.better is None and refused is not None:
            raise refused
        if self.better is None:
            self._carry_out()

    def _choose(self, batch: Any) -> None:
        """The plan and its program."""
        if self._opens_count:
            planned = self._choose_count(batch)
        else:
            planned, self._trace = self._planned(batch, self.plan.micro_batches)
        assert self._trace is not None
        self._hooks.follow(self._trace)
        self.prediction, self.prediction_note = planned.prediction, planned.note
        self.plan, self._program, self._held = planned.plan, planned.program, planned.held
        self.predicted, self.predicted_device = planned.ledger, planned.device
        self._freed_stay = planned.is_ample

    def _look_at_pipelines(self, base: Plan, shares: Callable[[int], Any], refused: DoesNotFit | None) -> None:
        """Pipelines beside the plan that was found, if any: `better` is the one that is faster. Collective.

        Nothing is compared where seconds could not be measured, where the memory that units compute in is apart, and
        where the caller said in which order a rank's micro-batches go.
        """
        known = self.prediction is not None or refused is not None
        if not known or self.transport is None or self._tiers is not None or self._constraints.order is not None:
            return
        from .layouts import PipelineSearch

        assert self.memory.host_bytes is not None
        search = PipelineSearch(
            self.model, self._units, self._passage, self._shapes, self._optimizer, self._original_dtypes, base,
            self._constraints.open(self.memory), self._zero, self._opens_count, self.memory.host_bytes,
            self._mesh.rank, self.transport, self._record, shares,
        )  # fmt: skip
        best_s = inf if self.prediction is None else self.prediction.seconds
        fates = () if self.prediction is None else self.prediction.fates
        began_s = perf_counter()
        self.better, pipelines = search.run(best_s, fates, describe(self.plan))
        took_s = {"looking at pipelines": perf_counter() - began_s}
        if self.prediction is not None:
            took_s = self.prediction.took_s | took_s
            self.prediction = replace(self.prediction, fates=pipelines, took_s=took_s)
        if self.better is not None:
            self.better = replace(self.better, took_s=took_s)

    def foresee(self, better: "Better") -> None:
        """What a step of this pipeline takes, from what it was chosen by: `prediction`. Collective."""
        assert self._pipeline is not None
        self._foresee(self._pipeline, better.runs, better.elem_s, better.fates)
        if self.prediction is not None:
            self.prediction = replace(self.prediction, took_s=better.took_s)

    def _foresee(
        self, pipeline: "Pipeline", runs: Sequence["UnitSeconds"], elem_s: "ElemSeconds", fates: tuple[Fate, ...]
    ) -> None:
        played = pipeline.foresee(self.plan.micro_batches, runs, elem_s)
        if played is None:
            self.prediction_note = "what a pipeline moves to disk or exchanges with others beside it is not foreseen"
            return
        self.prediction = Prediction(played, {}, (), self.unit_names, fates)

    def _elem_seconds(self, pipeline: "Pipeline") -> "ElemSeconds | None":
        """Of updates, where they are wanted and a budget leaves room to measure them. Collective."""
        from .stage_seconds import ELEMS_BYTES, elem_seconds

        if not self._predicts or not pipeline.runs:
            return None
        budget = self.memory.host_bytes if self._has_budget else None
        lacks = budget is not None and budget - read_process_memory().resident_bytes < ELEMS_BYTES
        return None if pipeline.most(int(lacks)) else elem_seconds(self._optimizer.alone)

    @property
    def unit_names(self) -> tuple[str, ...]:
        """Names of the unit runs, as `F12.0` counts them; none before the first step."""
        calls = self._trace.calls if self._trace is not None else ()
        return tuple(self._units[call.unit].name for call in calls)

    def _choose_count(self, batch: Any) -> Planned:
        """The best plan of any number of micro-batches, with a fate for each number. Collective."""
        by_unit = self.plan.order is MicroBatchOrder.BY_UNIT
        counts = possible_counts(num_samples(batch), 2 if by_unit else 1)
        if self.transport is not None:
            counts = self.transport.broadcast_object(counts)
        count, found = choose_count(
            counts,
            lambda count: self._planned(batch, count),
            lambda looked: None if looked[0].prediction is None else looked[0].prediction.seconds,
        )
        chosen = found[count]
        assert not isinstance(chosen, DoesNotFit)
        planned, self._trace = chosen
        others = [each if isinstance(each, DoesNotFit) else each[0] for other, each in found.items() if other != count]
        return planned.beside(list(zip((each for each in found if each != count), others, strict=True)))

    def _planned(self, batch: Any, count: int) -> tuple[Planned, Trace]:
        """The plan for so many micro-batches, and the order of units in one of them. Collective."""
        part = split_batch(batch, count)[0]
        drops_copies = self._state is not None and self._state.drops_copies
        with self.gathered() if drops_copies else nullcontext():  # in case the model has to run for real
            trace = self._record(part)
            if not trace.calls:  # the model uses its modules' weights, but never calls the modules
                self._hooks.remove()
                self._units = (Unit(ROOT, self.model),)
                self._hooks = self._install_hooks()
                trace = self._record(part)
        self._hooks.follow(trace)
        planner = Planner(
            self.model,
            self._units,
            self._layouts,
            self._original_dtypes,
            self._optimizer,
            self.memory,
            self._is_ample,
            self.transport,
            self._passage,
            self._shapes,
        )
        open_ = self._open if self._state is None else replace(self._open, homes=False, update=False, zero=False)
        plan = replace(self.plan, micro_batches=count)
        return planner.plan(plan, open_, trace, part, self._predicts, self._explores), trace

    def _carry_out(self) -> None:
        """Make what the program works with."""
        assert self._program is not None
        if self.plan.keeps_freed:
            assert self.predicted is not None
            # In ample memory what nobody announces finds room in what freed blocks may take on top.
            margin_bytes = 0 if self._freed_stay else RESERVE_BYTES // 2
            self._heap = StepHeap(self.predicted.peak_bytes, margin_bytes, self._freed_stay)
        if self._state is None:
            self._open_state()
        self.state.keep_between_steps(self._program.kept)
        if self.transport is not None and self.predicted is not None and self.plan.unified:
            self.transport.copies.limit_bytes = self.predicted.parts["gathered"]
        self._recomputed = recompute_units(self._units, self.plan)
        if self._program.actions(Kind.SAVE):
            if Activations.OFFLOAD_DISK in self.plan.activations:
                self._tier = self._tier or open_tier(self.memory, self._run_name, self._mesh.rank, {}, self._tiers)
            self._moving = self._hooks.moving = open_moves(self._program, self.state, self._tier, self._tiers)
        # Freed blocks would fill the room of pages that buffers take later.
        lay_out(self._program, self._tier, self._tiers, takes_pages=self._freed_stay)

    def _make_room(self, phase: Phase) -> None:
        if self._heap is not None and self.predicted is not None:
            self._heap.make_room(self.predicted.growth_bytes.get(phase, 0))

    def _compile_pipeline(self, pipeline: "Pipeline", part: Any) -> None:
        """The stages of this rank: choose them, take over their parameters, and let go of all others."""
        from .stage_planning import limits_of
        from .stage_state import StageState

        self._trace = self._record(part)
        self._hooks.follow(self._trace)
        limits, budget, open_ = None, self.memory.host_bytes, self._constraints.open(self.memory)
        if self._has_budget and budget is not None:
            limits = limits_of(self.model, budget, open_, self._original_dtypes, self._optimizer.slots)
        self.plan = pipeline.choose(self._trace, part, self.plan, limits, self.memory.disk is not None)
        elem_s = self._elem_seconds(pipeline)
        chosen = self.plan.pipeline
        assert chosen is not None
        dtypes = {item.name: layout.dtype for layout in self._layouts for item in layout.fields}
        self._layouts, parts = pipeline.layouts(self._trace, chosen, part, dtypes)
        homes = (Home.DISK, Home.HOST)  # of a plan that was written down, one that no other stage shares
        decision = min(self.plan.chunks, key=lambda chunk: homes.index(chunk.parameter_home))
        tied = replace(decision, parameter_home=Home.HOST)  # their gradients are summed behind their last use
        chunks = tuple(tied if layout.index in parts.peers else decision for layout in self._layouts)
        self.plan = replace(self.plan, chunks=chunks)
        if not self._has_budget:
            check_fit(self.model, self._layouts, self.plan, self.memory)
        self._open_state(partial(StageState, parts))
        self._recomputed = recompute_units(self._units, self.plan)
        optims = optim_layouts(self._layouts, self.plan, self._optimizer.slots, self._original_dtypes)
        shape = pipeline.open(
            self._trace, self.plan, self._layouts, parts.peers, self._hooks, self._executor, part, optims
        )
        self._held = shape.held
        self._program = pipeline.program(self.plan.micro_batches)
        if elem_s is not None:
            self._foresee(pipeline, pipeline.runs, elem_s, ())
        self._carry_out_stages(pipeline)

    def _carry_out_stages(self, pipeline: "Pipeline") -> None:
        """Make what the program works with."""
        assert self._program is not None
        self.state.keep_between_steps(self._program.kept)
        if self._program.actions(Kind.SAVE):
            self._tier = self._tier or open_tier(self.memory, self._run_name, self._mesh.rank, {})
            moving = open_moves(self._program, self.state, self._tier, shown=pipeline.passes.show)
            self._moving = self._hooks.moving = pipeline.passes.moving = moving
        lay_out(self._program, self._tier, None)

    def _all_ranks(self, is_so: bool) -> bool:
        """Whether it is so on every rank, which must go the same way."""
        return is_so if self.transport is None else bool(self.transport.gather_rows([float(is_so)]).min())

    @property
    def _open(self) -> Open:
        if self._is_given:
            return Open(homes=False, activations=False, order=False, update=False, may_adapt=False)
        # In ample memory stages differ in seconds alone, and nothing is chosen where these are not asked for.
        zero = self._opens_zero and (self._predicts or not self._is_ample)
        return replace(self._constraints.open(self.memory), zero=zero)

    @property
    def _shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {item.name: (item.shape, layout.dtype) for layout in self._layouts for item in layout.fields}

    def _record(self, part: Any) -> Trace:
        return trace_model(self.model, self._units, self._passage.forward, part, self._shapes)

    def _install_hooks(self) -> UnitHooks:
        return UnitHooks(
            self._units,
            self._executor,
            (self._seed, self._mesh.data_rank),
            self._passage.input_dtype,
            self._turns.advance_to,
            self._make_room,
        )

    @abstractmethod
    def _norm(self, action: Action) -> None:
        """NORM, in a step."""

    @abstractmethod
    def _leave_turn(self, micro_batch: int) -> None:
        """A micro-batch's turn ends, in a step."""

    @abstractmethod
    def gathered(self) -> AbstractContextManager[nn.Module]:
        """The model with all its weights in place."""
