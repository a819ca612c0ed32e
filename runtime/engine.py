"""The engine: one rank's training step as a program, for loops of one's own and for `Runtime`.

Owns putting the parts together: units, chunks, plan, program, executor, and one step's life. Does not own processes,
data, files or displays.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from ..memory.allocator import keep_freed_blocks, release_kernel_buffers, return_blocks_at_once
from ..memory.budget import Memory
from ..memory.errors import NotFinite
from ..memory.process import peak_host_bytes, reset_peak
from ..memory.timeline import Timeline
from ..parallel.actions import Action, Kind
from ..parallel.units import ROOT, Unit, assign_chunks, find_units, named_trainable
from ..scheduler.ledger import Ledger
from ..scheduler.plan import Activations, Home, MicroBatchOrder, Plan, plan_for_zero
from ..scheduler.program import Program
from ..scheduler.trace import Trace, trace_model
from .batch import Forward, Loss, call_loss, call_model, cast_floats, num_samples, num_tokens, split_batch
from .constraints import Constraints, offloaded
from .disk_tier import DiskTier
from .engine_checks import check_arguments, check_fit
from .executor import Executor
from .model_state import ModelState
from .moving import MovingActivations
from .offload import optim_layouts, state_extents
from .optimizer import OptimizerFactory, PiecewiseOptimizer
from .planning import Planner
from .precision import cast_buffers, compute_dtypes
from .recompute import Recomputed
from .recovery import Recovery
from .saved_tensors import saved_by_place
from .step_result import Statistics, StepResult
from .turns import Turns
from .unit_hooks import UnitHooks
from .weights import full_state_dict, write_weights

if TYPE_CHECKING:
    from ..parallel.collectives import Transport
    from .filling import Filler

__all__ = ["Engine", "Statistics", "StepResult"]


class Engine:
    """Trains a model step by step, its state sharded over the ranks of the process group that exists, if any.

    Args:
        model: trained in place; its parameters become views into chunks.
        optimizer: f(params) -> torch.optim.Optimizer, element-wise; None: AdamW, fused.
        lr_scheduler: f(optimizer) -> torch LRScheduler, stepped once a step.
        loss: f(output, target) -> mean over the samples it was given; None: the output itself, or its `.loss`.
        forward: f(model, batch) -> output, instead of the conventions for dicts, tuples and tensors.
        memory: the budget of this process; None: the share of the machine or cgroup that falls to a rank.
        micro_batches: parts that a rank's batch is cut into, one after the other.
        clip_grad_norm: greatest global gradient norm, or None.
        precision: "float32" (as the model is) or "bf16" (float32 masters).
        zero: 0..3; None: 3 on several ranks, else 0.
        seed: of dropout and the like.
        units: names of the modules to schedule as units; None: found.
        transport: "shared-memory" or "gloo"; None: chosen by measurement.
        offload: what lies on the disk of `memory`: "none", "optimizer" (slots and masters), "all" (parameters too);
            None: as much as does not fit into the budget.
        activations: of units: "keep", "recompute", "offload:host", "offload:disk"; one word for all units, or one for
            each; None: "keep" where it fits.
        order: of micro-batches: "sequential" or "by-unit"; None: the leaner one where the budget asks for it.
        update: "after" or "backward" (a chunk as soon as its gradients are complete); None: "backward" where nothing
            waits for the global gradient norm and something is on disk.
        filler: gives parameters without values their first ones, unit by unit.
        run_name: names the file on the disk tier.
        example: a batch as `step` gets it: where memory is tight, the plan is then made here, not at the first step.

    Raises:
        ValueError: arguments that cannot be, a model without trainable parameters, an optimizer that cannot be sharded.
        DoesNotFit: the model's state alone exceeds the budget.
    """

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
    ) -> None:
        check_arguments(model, micro_batches, clip_grad_norm)
        self.model = model
        self._loss = loss
        self._custom_forward = forward
        self._dtype = torch.bfloat16 if precision == "bf16" else None
        dtypes = compute_dtypes(model, precision)
        self._units = find_units(model, units)
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self._layouts = assign_chunks(model, self._units, ranks, dtypes)
        zero = zero if zero is not None else (3 if ranks > 1 else 0)
        clips = clip_grad_norm is not None
        self.memory = memory or Memory.detect(ranks)
        self._constraints = Constraints(offload, activations, order, update)
        self._constraints.check(self.memory, len(self._units), clips, micro_batches)
        plan = plan_for_zero(self._layouts, zero, ranks, micro_batches, precision, clips)
        self.plan: Plan = self._constraints.applied(plan, len(self._units))
        self._optimizer = PiecewiseOptimizer(optimizer, dict(named_trainable(model)))
        self.transport = _transport(transport) if ranks > 1 else None
        self._original_dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        self._is_ample = check_fit(model, self._layouts, self.plan, self.memory)
        if not self._is_ample:
            return_blocks_at_once()
        elif self.memory.disk is None:
            keep_freed_blocks()  # for the whole process: the next step uses the same memory again
        self._clip_grad_norm = clip_grad_norm
        self._filler = filler
        self._make_lr_scheduler = lr_scheduler
        self.lr_scheduler: Any = None
        self._run_name = run_name
        self._tier: DiskTier | None = None
        self._state: ModelState | None = None
        self._recovery = Recovery(self.rank, ranks)
        self._executor = Executor(
            {
                Kind.GATHER: lambda action: self.state.gather(action),
                Kind.DROP: lambda action: self.state.drop(action),
                Kind.REDUCE: lambda action: self.state.reduce(action),
                Kind.NORM: self._norm,
                Kind.STEP: self._recovery.watched(lambda action: self.state.step(action)),
                Kind.READ: lambda action: self.state.read(action),
                Kind.WRITE: lambda action: self.state.write(action),
                Kind.SAVE: lambda action: self._moving.save(action) if self._moving else None,
                Kind.LOAD: lambda action: self._moving.load(action) if self._moving else None,
            }
        )
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
        self._is_carried = False  # whether the last step's writes are still to be done
        self._losses: dict[int, float] = {}  # micro-batch -> its part of this rank's loss
        self._peak_slots: dict[str, int] = {}
        self._step = 0
        self.timeline = Timeline(())
        self.predicted: Ledger | None = None
        cast_buffers(model, precision)
        if self._is_ample or not self._constraints.open(self.memory).homes:
            self._open_state()
        elif example is not None:
            self._compile(split_batch(example, micro_batches))

    @property
    def state(self) -> ModelState:
        """The model's state on this rank. Where it waits for the first batch to be planned: all of it on disk."""
        if self._state is None:
            everything = tuple(offloaded(chunk, Home.DISK, Home.DISK) for chunk in self.plan.chunks)
            self.plan = replace(self.plan, chunks=everything)
            self._open_state()
        assert self._state is not None
        return self._state

    @property
    def rank(self) -> int:
        return self.transport.rank if self.transport is not None else 0

    @property
    def world_size(self) -> int:
        return self.plan.world_size

    @property
    def transport_name(self) -> str:
        """`single`, `shared-memory` or `gloo`."""
        return self.transport.name if self.transport is not None else "single"

    @property
    def program(self) -> Program | None:
        """What a step runs; None before the first one."""
        return self._program

    def step(self, batch: Any) -> StepResult:
        """Forward, backward, reduce, clip, update on this rank's samples of the global batch. Collective.

        Args:
            batch: this rank's samples; None where a small last batch leaves it none.

        Raises:
            NotFinite: the loss is NaN or infinite; names the step and the first unit whose output was not finite.
            OutOfOrder: the model runs its units in another order than in the first step.
            StoreError: the disk tier failed.
            StateLost: an earlier step failed half-way; one that failed before any update can be done again.
            Whatever the model raises, with a note that says in which unit.
        """
        started = time.perf_counter()
        reset_peak()
        self._recover()
        self._step += 1
        random_state = torch.get_rng_state()
        try:
            local = num_samples(batch)
            micro = split_batch(batch, self.plan.micro_batches)
            counts = [float(local), float(num_tokens(batch) if local else 0)]
            if self.transport is not None:
                counts = self.transport.gather_rows(counts).sum(dim=0).tolist()
            samples, tokens = int(counts[0]), int(counts[1])
            if samples == 0:
                raise ValueError("a step needs at least one sample; no rank was given any")
            self._compile(micro)
            assert self._program is not None
            self.state.begin_step()
            self._losses = {}
            self._executor.begin(self._program if self._is_carried else self._program.without_carried())
            self._recovery.begin()
            self._run_micro_batches(micro, samples)
            self.timeline = self._executor.finish()
            self._recovery.end()
            self._is_carried = self._program.num_carried > 0
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            torch.set_rng_state(random_state)
        lr = self._optimizer.lr
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        return StepResult(
            self._step,
            self.state.loss,
            self.state.grad_norm,
            lr,
            samples,
            tokens,
            time.perf_counter() - started,
            {"host": peak_host_bytes(self.state.shared_bytes)},
            Timeline(self.timeline.spans, self.timeline.peak_bytes, self.rank),
        )

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Full weights and buffers on the host, by the model's own names, tied ones under each. Collective."""
        self._end_last_step()
        return full_state_dict(self.model, self.state, self._original_dtypes)

    def export(self, path: Path | str) -> None:
        """Write the full weights to a safetensors file, on rank 0. Collective."""
        self._end_last_step()
        write_weights(path if self.rank == 0 else None, self.model, self.state, self._original_dtypes)

    @contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        """The model with all its weights in place, for evaluation between steps. Collective."""
        self._end_last_step()
        try:
            self.state.gather_all()
            yield self.model
        finally:
            self.state.drop_all()

    def statistics(self) -> Statistics:
        """Bytes of model state on this rank, now and at the last step's fullest moment."""
        return Statistics(self.state.held_bytes(), dict(self._peak_slots))

    def close(self) -> None:
        """End the lanes and leave the group; the model keeps its (gathered) weights, but for those on disk.

        May be repeated. Raises LaneTimeout where a transfer does not come back; what it uses stays until it does.
        """
        for recomputed in self._recomputed:
            recomputed.remove()
        self._hooks.remove()
        self._executor.close()
        self._forget()  # what is in the tier's buffers goes with them
        try:
            if self._tier is not None:
                self._tier.close()
                self._tier = None
        finally:
            if self.transport is not None and not self.state.drops_copies:
                self.transport.close()
            self.transport = None

    # ---- one step

    def _run_micro_batches(self, micro: Sequence[Any], samples: int) -> None:
        for number, part in enumerate(micro):
            if part is None:
                self._executor.skip_micro_batch(number)
            elif self.plan.order is MicroBatchOrder.SEQUENTIAL:
                self._run_micro_batch(number, part, num_samples(part), samples)
        if self.plan.order is MicroBatchOrder.BY_UNIT:
            self._turns.run(
                [
                    (number, partial(self._run_micro_batch, number, part, num_samples(part), samples))
                    for number, part in enumerate(micro)
                    if part is not None
                ]
            )

    def _leave_turn(self, micro_batch: int) -> None:
        self.state.stash_gradients(self._held, micro_batch)
        if not self._is_ample:
            release_kernel_buffers()  # else each micro-batch's thread would keep its own

    def _recover(self) -> None:
        """After a failed step: as if it had not been."""
        carried = self._program.actions()[: self._program.num_carried] if self._program and self._is_carried else []
        if self._recovery.recover(self._executor, self._tier, carried, self.state.write, self._forget):
            self._is_carried = False

    def _end_last_step(self) -> None:
        """Do what is left of the last step: its writes that were to run into the next one."""
        self._recover()
        if not self._is_carried:
            return
        assert self._program is not None
        try:
            self._executor.begin(self._program.only_carried())
            self._recovery.begin()
            self._executor.finish()
            self._recovery.end()
        except BaseException as error:
            self._executor.abort(error)
            self._recovery.fail(self._step, error)
            raise
        self._is_carried = False

    def _run_micro_batch(self, number: int, part: Any, local: int, samples: int) -> None:
        try:
            self._take_through(number, part, local, samples)
        finally:
            self._hooks.end()
        # Before the micro-batch's end: from then on the norm, which exchanges the loss too, may run on its lane.
        self.state.micro_loss = sum(self._losses[each] for each in sorted(self._losses))
        self._executor.complete_micro_batch(number)

    def _take_through(self, number: int, part: Any, local: int, samples: int) -> None:
        """A micro-batch's way through the model and back."""
        self._hooks.begin_forward(self._step, number)
        if self._held:
            self._executor.await_next()  # the model may use these chunks before it comes to a unit
        with self._saved_tensors():
            output = self._forward(self.model, part)
            loss = self._call_loss(output, part)
        weight = local / samples
        value = loss.item()
        if not math.isfinite(value):
            raise self._not_finite(value, number)
        del output
        if not loss.requires_grad:
            raise ValueError("the loss does not depend on any trainable parameter: nothing can be trained")
        self._hooks.begin_backward()
        loss.backward(None if weight == 1 else torch.tensor(weight, dtype=loss.dtype))
        del loss
        self._hooks.end_backward()
        if self._moving is not None:
            self._moving.release_micro_batch(number)
        self._losses[number] = value * local / samples

    def _forward(self, model: nn.Module, part: Any) -> Any:
        if self._dtype is not None:
            part = cast_floats(part, self._dtype)
        if self._custom_forward is not None:
            return self._custom_forward(model, part)
        return call_model(model, part, self._loss is not None)

    def _call_loss(self, output: Any, part: Any) -> torch.Tensor:
        return call_loss(self._loss, output if self._dtype is None else cast_floats(output, torch.float32), part)

    def _saved_tensors(self) -> Any:
        return saved_by_place(self.state) if self.state.drops_copies else nullcontext()

    def _norm(self, action: Action) -> None:
        self._peak_slots = self.state.held_bytes()  # the fullest moment: all gradients are there
        self.state.norm(action)

    def _not_finite(self, value: float, number: int) -> NotFinite:
        unit = self._hooks.first_not_finite()
        where = f"the first unit whose output was not finite is {unit}" if unit else "every unit's output was finite"
        error = NotFinite(
            f"step {self._step}, rank {self.rank}, micro-batch {number}: the loss is {value}; {where}. The weights are "
            "those after the step before. A smaller learning rate, clip_grad_norm, or a look at this batch may help."
        )
        error.outgrow_unit = unit  # pyright: ignore[reportAttributeAccessIssue]
        return error

    def _fail(self, error: BaseException) -> None:
        running = self._executor.running
        unit = self._hooks.name_of(running.index) if running is not None and running.index is not None else None
        self._hooks.end()
        self._executor.abort(error)
        self._forget()
        self._recovery.fail(self._step, error)
        if not hasattr(error, "outgrow_step"):
            error.outgrow_step = self._step  # pyright: ignore[reportAttributeAccessIssue]
            error.outgrow_rank = self.rank  # pyright: ignore[reportAttributeAccessIssue]
            if not hasattr(error, "outgrow_unit"):
                error.outgrow_unit = unit  # pyright: ignore[reportAttributeAccessIssue]
            place = f" in unit {unit} ({running})" if unit else ""
            error.add_note(f"rank {self.rank}, step {self._step}{place}")
        self._step -= not self._recovery.is_lost  # it will be done again, or something else instead of it

    def _forget(self) -> None:
        """What a failed step had in memory."""
        if self._state is not None:
            self._state.forget_gradients()
        if self._moving is not None:
            self._moving.clear()

    # ---- before the first step

    def _open_state(self) -> None:
        """Put the model's state where the plan has its home."""
        optims = optim_layouts(self._layouts, self.plan, self._optimizer.slots, self._original_dtypes)
        extents = state_extents(self._layouts, self.plan, optims)
        if extents:
            self._tier = self._open_tier(extents)
        fill = None
        if self._filler is not None:
            modules = {unit.name: unit.module for unit in self._units}
            filler, model = self._filler, self.model
            fill = lambda unit, tensors: filler.fill(unit, modules.get(unit, model), tensors)  # noqa: E731
        try:
            self._state = ModelState(
                self.model,
                self._layouts,
                self.plan,
                self._optimizer,
                self.transport,
                self._clip_grad_norm,
                self._tier,
                optims,
                fill,
            )
        except BaseException:
            if self._tier is not None:
                self._tier.close()
            raise
        if self._make_lr_scheduler is not None:
            self.lr_scheduler = self._make_lr_scheduler(self._optimizer.optimizer)
        self._state.drop_all()

    def _open_tier(self, extents: dict[str, int]) -> DiskTier:
        folder = self.memory.disk_folder
        assert folder is not None
        return DiskTier(folder, self._run_name, self.rank, extents, self.memory.disk_limit_bytes)

    def _compile(self, micro: Sequence[Any]) -> None:
        """Record the order of units, find the plan that fits, and compile its program, once."""
        if self._program is not None:
            return
        part = next((part for part in micro if part is not None), None)
        if part is None:
            raise ValueError("the first step's batch leaves a rank without samples: use a larger batch or fewer ranks")
        open_ = self._constraints.open(self.memory)
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
        )
        open_ = replace(open_, homes=open_.homes and self._state is None)
        planned = planner.plan(self.plan, open_, self._trace, self._forward, self._call_loss, part)
        self.plan, self._program, self._held = planned.plan, planned.program, planned.held
        self.predicted = planned.ledger
        if self._state is None:
            self._open_state()
        self._prepare_activations(self._program)
        if self._tier is not None:
            self._tier.lay_out(self._program)

    def _record(self, part: Any) -> Trace:
        shapes = {item.name: (item.shape, layout.dtype) for layout in self._layouts for item in layout.fields}
        return trace_model(self.model, self._units, self._forward, part, shapes)

    def _prepare_activations(self, program: Program) -> None:
        """Wrap the units that are recomputed, and make room on disk for what is moved."""
        for index, unit in enumerate(self._units):
            if self.plan.activations_of(index) is Activations.RECOMPUTE:
                self._recomputed.append(Recomputed(unit.module, unit.name).install())
        moves = {
            (action.index, action.micro_batch): str(action).split()[1]
            for action in program.actions(Kind.SAVE)
            if action.index is not None and action.micro_batch is not None
        }
        if not moves:
            return
        if self._tier is None:
            self._tier = self._open_tier({})
        sizes = {buffer.name: buffer.num_bytes for buffer in program.buffers}
        self._tier.add_activations({name: sizes[name] for name in moves.values()})
        self._moving = self._hooks.moving = MovingActivations(self.state, self._tier, moves)

    def _install_hooks(self) -> UnitHooks:
        return UnitHooks(
            self._units, self._executor, (self._seed, self.rank), self._input_dtype, self._turns.advance_to
        )

    def _input_dtype(self, module: nn.Module) -> torch.dtype | None:
        """In bf16, a unit's floating inputs come in the dtype of its parameters."""
        if self._dtype is None:
            return None
        dtypes = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
        dtypes.discard(torch.float32)  # modules with running statistics take what the others compute with
        return dtypes.pop() if len(dtypes) == 1 else self._dtype


def _transport(kind: str | None) -> "Transport":
    """Loaded where there are several ranks only: its compiled kernels take 100 MB of memory."""
    from ..parallel.collectives import open_transport

    return open_transport(kind=kind)
