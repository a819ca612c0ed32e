"""What an engine is before its first batch: arguments checked, units and chunks found, the parts of a step made.

Owns the constructor's work. Does not own what waits for a batch (`first_batch.py`) nor a step (`engine.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from ..memory.allocator import StepHeap, keep_freed_blocks, return_blocks_at_once
from ..memory.budget import Memory
from ..memory.heap_room import HeapRoom
from ..memory.tiers import open_tiers
from ..memory.timeline import Timeline
from ..parallel.actions import Action, Kind
from ..parallel.mesh import open_mesh
from ..parallel.units import assign_chunks, find_units, named_trainable
from ..scheduler.ledger import Ledger
from ..scheduler.plan import Plan, plan_for_zero
from ..scheduler.prediction import Prediction
from ..scheduler.program import Program
from ..scheduler.trace import Trace
from .batch import Forward, Loss
from .constraints import Constraints
from .disk_tier import DiskTier
from .engine_checks import check_arguments, check_fit
from .executor import Executor, Handler
from .first_batch import FirstBatch
from .given_plan import check_alone, check_given
from .model_state import ModelState
from .moving import MovingActivations
from .opening import open_pipeline
from .optimizer import OptimizerFactory, PiecewiseOptimizer
from .passage import Passage
from .pipeline_words import PipelineWords
from .precision import cast_buffers, compute_dtypes
from .recompute import Recomputed
from .recovery import Recovery
from .turns import Turns

if TYPE_CHECKING:
    from ..parallel.collectives import Transport
    from .filling import Filler
    from .layouts import Better
    from .stage_pass import MicroBatch

__all__ = ["PreparedEngine"]


class PreparedEngine(FirstBatch):
    """The part of `Engine` that runs before the first batch; see there for the arguments."""

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: OptimizerFactory | None = None,
        lr_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        loss: Loss | None = None,
        forward: Forward | None = None,
        memory: Memory | None = None,
        micro_batches: int | str = 1,
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
        shares: Callable[[int], Any] | None = None,
    ) -> None:
        self._opens_count = micro_batches == "auto" and plan is None
        if micro_batches == "auto":
            micro_batches = 1 if plan is None else plan.micro_batches
        check_arguments(model, micro_batches, clip_grad_norm)
        assert isinstance(micro_batches, int)
        words = PipelineWords(pipeline, schedule, chunks, stages)
        words.check(activations, order)
        if plan is not None:
            check_alone(
                plan, zero=zero, offload=offload, activations=activations, order=order, update=update,
                pipeline=None if pipeline == 1 else pipeline,
            )  # fmt: skip
            if plan.pipeline is not None:
                words = PipelineWords.of(plan.pipeline)
                pipeline = words.num_ranks
        if pipeline > 1 and self._opens_count:
            raise ValueError(
                "micro_batches='auto' has no effect beside pipeline=: give a number, or leave pipeline= out"
            )
        self.model = model
        dtypes = compute_dtypes(model, precision)
        self._units = find_units(model, units)
        self._mesh = open_mesh(pipeline)
        ranks = self._mesh.num_data
        self._layouts = assign_chunks(model, self._units, ranks, dtypes)
        self._zero, self._shares = zero, shares
        self._opens_zero = zero is None and plan is None and ranks > 1
        zero = plan.zero if plan is not None else zero
        zero = zero if zero is not None else (3 if ranks > 1 else 0)
        clips = clip_grad_norm is not None
        self._has_budget = memory is not None and memory.host is not None
        self.memory = (memory or Memory()).filled(self._mesh.num_ranks)
        self._constraints = Constraints(offload, activations, order, update)
        self._constraints.check(self.memory, len(self._units), clips, 2 if self._opens_count else micro_batches)
        base = plan_for_zero(self._layouts, zero, ranks, micro_batches, precision, clips)
        base = replace(base, unified=not self.memory.is_separate)
        if plan is not None:
            check_given(plan, base, len(self._units), self.memory)
        self.plan: Plan = plan or self._constraints.applied(base, len(self._units))
        self._is_given, self._predicts = plan is not None, predict or self._opens_count
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
        self._room: HeapRoom | None = None
        if not self._is_ample or (pipeline > 1 and self._has_budget and not self.plan.keeps_freed):
            return_blocks_at_once()
        elif keep_freed_blocks():  # for the whole process: the next step uses the same memory again
            self._room = HeapRoom(self.memory.host_bytes)
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
            Kind.STEP: self._recovery.watched(self._update),
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
        self._freed_stay = False  # from step to step
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
        self.better: Better | None = None
        cast_buffers(model, precision)
        self._pipeline = open_pipeline(words, self._mesh, transport, model, self._units, self._passage, self._shapes)
        if self._pipeline is not None and ranks == 1 and self._pipeline.mail.forgets:
            self._recovery.is_together = False
        open_ = self._open
        # The state has its home, and gradients their place, by these.
        waits = (
            open_.zero
            or self._opens_count
            or shares is not None
            or (not self._is_ample and (open_.homes or open_.update))
        )
        if self._pipeline is None and not waits:
            self._open_state()
        if example is not None:
            self._compile(example)

    def _update(self, action: Action) -> None:
        """STEP. What it makes is announced: slots, with the first one, and what kernels that are not fused take."""
        assert action.index is not None
        if not self._has_stepped or not self._optimizer.is_fused:
            self._make_room((str(Kind.STEP), action.index))
        self.state.step(action)

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


def _transport(kind: str | None, group: "dist.ProcessGroup | None") -> "Transport":
    """Loaded where there are several ranks only: its compiled kernels take 100 MB of memory."""
    from ..parallel.collectives import open_transport

    return open_transport(group, kind)
