"""What an engine is before its first step: arguments checked, the plan that fits, the state where it has its home.

Owns the constructor's work and the first batch's: units, chunks, plan, program. Does not own a step (`engine.py`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from ..memory.allocator import StepHeap, keep_freed_blocks, return_blocks_at_once
from ..memory.budget import Memory
from ..memory.tiers import open_tiers
from ..memory.timeline import Timeline
from ..parallel.actions import Action, Kind
from ..parallel.mesh import open_mesh
from ..parallel.units import ROOT, Unit, assign_chunks, find_units, named_trainable
from ..scheduler.assessment import Open
from ..scheduler.ledger import Ledger
from ..scheduler.plan import Activations, Home, Plan, plan_for_zero
from ..scheduler.prediction import Prediction
from ..scheduler.program import Program
from ..scheduler.trace import Phase, Trace, trace_model
from .batch import Forward, Loss, split_batch
from .constraints import Constraints, offloaded
from .disk_tier import DiskTier
from .engine_checks import check_arguments, check_fit
from .executor import Executor, Handler
from .given_plan import check_alone, check_given
from .host_figures import RESERVE_BYTES
from .model_state import ModelState
from .moving import MovingActivations
from .offload import optim_layouts
from .opening import fill_with, lay_out, open_moves, open_pipeline, open_state, open_tier, recompute_units
from .optimizer import OptimizerFactory, PiecewiseOptimizer
from .passage import Passage
from .pipeline_words import PipelineWords
from .planning import Planner
from .precision import cast_buffers, compute_dtypes
from .recompute import Recomputed
from .recovery import Recovery
from .turns import Turns
from .unit_hooks import UnitHooks

if TYPE_CHECKING:
    from ..parallel.collectives import Transport
    from .filling import Filler
    from .pipelining import Pipeline
    from .stage_pass import MicroBatch

__all__ = ["PreparedEngine"]


class PreparedEngine(ABC):
    """The part of `Engine` that runs before the first step; see there for the arguments."""

    _explores = False

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: OptimizerFactory | None = None,
        lr_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        loss: Loss | None = None,
        forward: Forward | None = None,
        memory: Memory | None = None,
        micro_batches: int = 1,
        clip_grad_norm: float | None = None,
        precision: str = "float32",
        zero: int | None = None,
        seed: int = 0,
        units: Sequence[str] | None = None,
        transport: str | None = None,
        offload: str | None = None,
        activations: str | Sequence[str] | None = None,
        order: str | None = None,
        update: str | None = None,
        filler: "Filler | None" = None,
        run_name: str = "run",
        example: Any = None,
        pipeline: int = 1,
        schedule: str | None = None,
        chunks: int | None = None,
        stages: Sequence[str] | None = None,
        plan: Plan | None = None,
        predict: bool = False,
    ) -> None:
        check_arguments(model, micro_batches, clip_grad_norm)
        words = PipelineWords(pipeline, schedule, chunks, stages)
        words.check(activations, order)
        self.model = model
        dtypes = compute_dtypes(model, precision)
        self._units = find_units(model, units)
        self._mesh = open_mesh(pipeline)
        ranks = self._mesh.num_data
        self._layouts = assign_chunks(model, self._units, ranks, dtypes)
        if plan is not None:
            check_alone(plan, zero=zero, offload=offload, activations=activations, order=order, update=update)
            zero = plan.zero
        zero = zero if zero is not None else (3 if ranks > 1 else 0)
        clips = clip_grad_norm is not None
        self._has_budget = memory is not None and memory.host is not None
        self.memory = (memory or Memory()).filled(self._mesh.num_ranks)
        self._constraints = Constraints(offload, activations, order, update)
        self._constraints.check(self.memory, len(self._units), clips, micro_batches)
        base = plan_for_zero(self._layouts, zero, ranks, micro_batches, precision, clips)
        base = replace(base, unified=not self.memory.is_separate)
        if plan is not None:
            check_given(plan, base, len(self._units), self.memory, pipeline)
        self.plan: Plan = plan or self._constraints.applied(base, len(self._units))
        self._is_given, self._predicts = plan is not None, predict
        self._optimizer = PiecewiseOptimizer(optimizer, dict(named_trainable(model)))
        self.transport = _transport(transport, self._mesh.data_group) if ranks > 1 else None
        dtype = torch.bfloat16 if precision == "bf16" else None
        self._passage = Passage(model, loss, forward, dtype, self.rank)
        self._original_dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        if pipeline > 1 and self.memory.is_separate:
            raise ValueError("a stage of a pipeline computes in one memory: leave Memory(device=) out, or pipeline=")
        if self._mesh.num_ranks > 1 and self.memory.is_separate and torch.cuda.is_available():
            raise ValueError("several ranks exchange host memory only: on a CUDA device, train on one rank")
        self._tiers = open_tiers() if self.memory.is_separate else None
        # A rank of a pipeline has a part of the model, which is known when the first batch is.
        self._is_ample = pipeline > 1 or (
            self._tiers is None and self._all_ranks(check_fit(model, self._layouts, self.plan, self.memory))
        )
        if not self._is_ample or (pipeline > 1 and self._has_budget):
            return_blocks_at_once()
        else:
            keep_freed_blocks()  # for the whole process: the next step uses the same memory again
        self._clip_grad_norm = clip_grad_norm
        self._filler = filler
        self._make_lr_scheduler = lr_scheduler
        self.lr_scheduler: Any = None
        self._run_name = run_name
        self._tier: DiskTier | None = None
        self._state: ModelState | None = None
        self._recovery = Recovery(self.rank, self._mesh.num_ranks)
        handlers: dict[Kind, Handler] = {
            Kind.GATHER: lambda action: self.state.gather(action),
            Kind.DROP: lambda action: self.state.drop(action),
            Kind.REDUCE: lambda action: self.state.reduce(action),
            Kind.NORM: self._norm,
            Kind.STEP: self._recovery.watched(lambda action: self.state.step(action)),
            Kind.UP: lambda action: self.state.up(action),
            Kind.DOWN: lambda action: self.state.down(action),
            Kind.READ: lambda action: self.state.read(action),
            Kind.WRITE: lambda action: self.state.write(action),
            Kind.SAVE: lambda action: self._moving.save(action) if self._moving else None,
            Kind.LOAD: lambda action: self._moving.load(action) if self._moving else None,
        }
        for kind in (Kind.SEND_F, Kind.SEND_B):
            handlers[kind] = lambda action: self._pipeline.send(action) if self._pipeline else None
        for kind in (Kind.RECV_F, Kind.RECV_B):
            handlers[kind] = lambda action: self._pipeline.receive(action) if self._pipeline else None
        self._executor = Executor(handlers, computed=lambda: self._tiers.device.computed() if self._tiers else None)
        self._moving: MovingActivations | None = None
        self._recomputed: list[Recomputed] = []
        self._seed = seed
        self._held: tuple[int, ...] = ()  # chunks used outside of units
        self._turns = Turns(
            self._executor,
            self._leave_turn,
            lambda number: self.state.restore_gradients(self._held, number),
        )
        self._hooks = self._install_hooks()
        self._trace: Trace | None = None
        self._program: Program | None = None
        self._heap: StepHeap | None = None  # where blocks that are freed stay the process's
        self._has_stepped = False
        self._is_carried = False  # whether the last step's writes are still to be done
        self._losses: dict[int, float] = {}  # micro-batch -> its part of this rank's loss
        self._peak_slots: dict[str, int] = {}
        self._step = 0
        self._attempt = 0
        self._parts: Sequence[MicroBatch] = ()
        self.timeline = Timeline(())
        self.predicted: Ledger | None = None
        self.predicted_device: Ledger | None = None
        self.prediction: Prediction | None = None
        self.prediction_note = ""
        cast_buffers(model, precision)
        self._pipeline = open_pipeline(words, self._mesh, transport, model, self._units, self._passage, self._shapes)
        if self._pipeline is not None and ranks == 1 and self._pipeline.mail.forgets:
            self._recovery.is_together = False
        waits = self._open.homes or self._open.update  # the state has its home, and gradients their place, by these
        if self._pipeline is None and (self._is_ample or not waits):
            self._open_state()
        if example is not None:
            self._compile(split_batch(example, micro_batches))

    @property
    def state(self) -> ModelState:
        """The model's state on this rank. Where it waits for the first batch to be planned: all of it on the farthest
        tier."""
        if self._state is None and self._pipeline is not None:
            raise ValueError("the stages of a pipeline are known after the first step: ask then, or give example=")
        if self._state is None:
            if self._open.homes:
                farthest = Home.HOST if self.memory.disk is None else Home.DISK
                everything = tuple(offloaded(chunk, farthest, farthest) for chunk in self.plan.chunks)
                self.plan = replace(self.plan, chunks=everything)
            self._open_state()
        assert self._state is not None
        return self._state

    @property
    def rank(self) -> int:
        return self._mesh.rank

    @property
    def world_size(self) -> int:
        return self._mesh.num_ranks

    @property
    def transport_name(self) -> str:
        """`single`, `shared-memory` or `gloo`."""
        return self.transport.name if self.transport is not None else "single"

    @property
    def program(self) -> Program | None:
        """What a step runs; None before the first one."""
        return self._program

    @property
    def unit_names(self) -> tuple[str, ...]:
        """Names of the unit runs, as `F12.0` counts them; none before the first step."""
        calls = self._trace.calls if self._trace is not None else ()
        return tuple(self._units[call.unit].name for call in calls)

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
            self.rank,
        )
        if self._make_lr_scheduler is not None:
            self.lr_scheduler = self._make_lr_scheduler(self._optimizer.optimizer)
        self._state.drop_all()

    def _compile(self, micro: Sequence[Any]) -> None:
        """Record the order of units, find the plan that fits, and compile its program, once."""
        if self._program is not None:
            return
        part = next((part for part in micro if part is not None), None)
        if part is None:
            raise ValueError("the first step's batch leaves a rank without samples: use a larger batch or fewer ranks")
        if self._pipeline is not None:
            self._compile_pipeline(self._pipeline, part)
            return
        self._choose(part)
        self._carry_out()

    def _choose(self, part: Any) -> None:
        """The plan and its program, for a micro-batch."""
        drops_copies = self._state is not None and self._state.drops_copies
        with self.gathered() if drops_copies else nullcontext():  # in case the model has to run for real
            self._trace = self._record(part)
            if not self._trace.calls:  # the model uses its modules' weights, but never calls the modules
                self._hooks.remove()
                self._units = (Unit(ROOT, self.model),)
                self._hooks = self._install_hooks()
                self._trace = self._record(part)
        self._hooks.follow(self._trace)
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
        open_ = self._open if self._state is None else replace(self._open, homes=False, update=False)
        planned = planner.plan(self.plan, open_, self._trace, part, self._predicts, self._explores)
        self.prediction, self.prediction_note = planned.prediction, planned.note
        self.plan, self._program, self._held = planned.plan, planned.program, planned.held
        self.predicted, self.predicted_device = planned.ledger, planned.device

    def _carry_out(self) -> None:
        """Make what the program works with."""
        assert self._program is not None
        if self.plan.keeps_freed:
            assert self.predicted is not None
            self._heap = StepHeap(self.predicted.peak_bytes, RESERVE_BYTES // 2)  # no more than was predicted
        if self._state is None:
            self._open_state()
        self.state.keep_between_steps(self._program.kept)
        self._recomputed = recompute_units(self._units, self.plan)
        if self._program.actions(Kind.SAVE):
            if Activations.OFFLOAD_DISK in self.plan.activations:
                self._tier = self._tier or open_tier(self.memory, self._run_name, self.rank, {}, self._tiers)
            self._moving = self._hooks.moving = open_moves(self._program, self.state, self._tier, self._tiers)
        lay_out(self._program, self._tier, self._tiers)

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
        chosen = self.plan.pipeline
        assert chosen is not None
        dtypes = {item.name: layout.dtype for layout in self._layouts for item in layout.fields}
        self._layouts, parts = pipeline.layouts(self._trace, chosen, part, dtypes)
        decision = self.plan.chunks[0]
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
        self.state.keep_between_steps(self._program.kept)
        if self._program.actions(Kind.SAVE):
            self._tier = self._tier or open_tier(self.memory, self._run_name, self.rank, {})
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
        return self._constraints.open(self.memory)

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


def _transport(kind: str | None, group: "dist.ProcessGroup | None") -> "Transport":
    """Loaded where there are several ranks only: its compiled kernels take 100 MB of memory."""
    from ..parallel.collectives import open_transport

    return open_transport(group, kind)
