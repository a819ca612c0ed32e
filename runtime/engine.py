"""The engine: one rank's training step as a program, for loops of one's own and for `Runtime`.

Owns putting the parts together: units, chunks, plan, program, executor, and one step's life. Does not own processes,
data, files or displays.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..memory.allocator import release_kernel_buffers
from ..memory.process import peak_host_bytes, reset_peak
from ..memory.timeline import Timeline
from ..parallel.actions import Action, Kind
from ..scheduler.least_moves import least_read_bytes
from ..scheduler.plan import MicroBatchOrder
from .batch import map_tensors, num_samples, num_tokens, split_batch
from .offload import optim_layouts
from .prepared import PreparedEngine
from .step_result import Statistics, StepResult
from .step_shape import step_shape
from .weights import full_state_dict, write_weights

if TYPE_CHECKING:
    from .pipelining import Pipeline

__all__ = ["Engine", "Statistics", "StepResult"]


class Engine(PreparedEngine):
    """Trains a model step by step, its state sharded over the ranks of the process group that exists, if any.

    Args:
        model: trained in place; its parameters become views into chunks.
        optimizer: f(params) -> torch.optim.Optimizer, element-wise; None: AdamW, fused.
        lr_scheduler: f(optimizer) -> torch LRScheduler, stepped once a step.
        loss: f(output, target) -> mean over the samples it was given; None: the output itself, or its `.loss`.
        forward: f(model, batch) -> output, instead of the conventions for dicts, tuples and tensors.
        memory: the budget of this process; None: the share of the machine or cgroup that falls to a rank.
        micro_batches: parts that a rank's batch is cut into, one after the other; "auto": as many as the first batch is
            fastest with.
        clip_grad_norm: greatest global gradient norm, or None.
        precision: "float32" (as the model is) or "bf16" (float32 masters).
        zero: 0..3; None: on several ranks the fastest that fits where `predict` is given or memory is tight, else 3.
        seed: of dropout and the like.
        units: names of the modules to schedule as units; None: found.
        transport: "shared-memory" or "gloo"; None: chosen by measurement.
        offload: what lies on the disk of `memory`: "none", "optimizer" (slots and masters), "all" (parameters too);
            "host": nothing, but all of it on the host of a device with memory of its own, where "none" leaves it on
            the device; None: as much as does not fit into the budgets.
        activations: of units: "keep", "recompute", "recompute:selective" (all but matrix products and attention, whose
            outputs are kept), "offload:host", "offload:disk"; one word for all units, or one for each; None: "keep"
            where it fits.
        order: of micro-batches: "sequential" or "by-unit"; None: the leaner one where the budget asks for it.
        update: "after" or "backward" (a chunk as soon as its gradients are complete); None: "backward" where nothing
            waits for the global gradient norm and something is on disk.
        filler: gives parameters without values their first ones, unit by unit.
        run_name: names the file on the disk tier.
        pipeline: ranks that the units of the model are spread over, stage by stage; 1: every rank has all of them. The
            other ranks share each stage's state. Ranks of one pipeline are given the same samples.
        schedule: of the pipeline, e.g. "1f1b", "zb-v", "auto" (`outgrow schedule` shows them); None: "1f1b".
        chunks: stages on each rank, for interleaved schedules.
        stages: names of the units that the stages begin with; None: cut by measured seconds.
        plan: every decision about memory, as an earlier run or `outgrow plan` wrote it down: nothing is chosen then,
            and what it says again (zero, offload, activations, order, update) must be left out.
        predict: measure units and machine before the first step, for `prediction`, also where no choice depends on it.
        example: a batch as `step` gets it: where memory is tight, the plan is then made here, not at the first step.
        shares: f(data ranks) -> this rank's samples of the example's batch where so many ranks share it out: pipelines
            are then looked at too. `better` is the one that is faster than any plan of this engine, which cannot step
            then: one with `plan=better.plan` can, and `foresee(better)` gives it its prediction.

    Raises:
        ValueError: arguments that cannot be, a model without trainable parameters, an optimizer that cannot be sharded.
        DoesNotFit: the model's state alone exceeds the budget.
    """

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
            counts = [float(local), float(num_tokens(batch) if local else 0)]
            if self.transport is not None:
                counts = self.transport.gather_rows(counts).sum(dim=0).tolist()
            samples, tokens = int(counts[0]), int(counts[1])
            if samples == 0:
                raise ValueError("a step needs at least one sample; no rank was given any")
            self._compile(batch)
            micro = split_batch(batch, self.plan.micro_batches)
            if self._pipeline is not None:
                self._begin_pipeline(self._pipeline, micro, samples)
            assert self._program is not None
            self.state.begin_step()
            self._losses = {}
            # The first step makes the optimizer's slots, and touches buffers for the first time.
            if self._heap is not None and self._has_stepped:
                self._heap.begin_step()
            self._executor.begin(self._program if self._is_carried else self._program.without_carried())
            self._recovery.begin()
            self._run_micro_batches(micro, samples)
            self.timeline = self._executor.finish()
            self._recovery.end()
            self._has_stepped = True
            self._is_carried = self._program.num_carried > 0
            if self._room is not None and self._heap is None and self._tier is not None:
                self._room.end_step()
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
            self._pipeline.passes.peak_bytes if self._pipeline is not None else None,
        )

    @property
    def saved_levels(self) -> list[tuple[Action, int]]:
        """In a pipeline: every action of the last step's schedule on this rank, and the bytes that were kept for
        backward passes behind it, read off the storages (once, where they follow from shapes); empty elsewhere."""
        return [] if self._pipeline is None else list(self._pipeline.passes.levels)

    def predict_step(self, batch: Any) -> Timeline | None:
        """In a pipeline, between steps: what a step on such a batch will take here, played from units that are timed
        now, beside the model, on its ranks. Collective.

        Returns:
            None where it does what is not timed so: moves to disk, exchanges between data ranks; without a pipeline;
            and before the first step.
        """
        if self._pipeline is None or self._program is None:
            return None
        self._end_last_step()
        micro = [part for part in split_batch(batch, self.plan.micro_batches) if part is not None]
        return self._pipeline.predict(micro[0], len(micro), self._optimizer.alone)

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

    def state_reads(self) -> tuple[int, int]:
        """Bytes of state that a step reads from disk, and the fewest that any plan of the same order could in as much
        memory (`scheduler/least_moves.py`); both 0 before the first step."""
        if self._program is None or self._trace is None or self._pipeline is not None:
            return 0, 0
        optims = optim_layouts(self._layouts, self.plan, self._optimizer.slots, self._original_dtypes)
        shape = step_shape(self._trace, self._units, self._layouts, self.plan, optims)
        reads = sum(each.num_bytes for each in self._program.instructions if each.action.kind is Kind.READ)
        room = self._program.arena_bytes("host")
        return reads, least_read_bytes(self._program.actions(), shape, self.plan, room)

    def close(self) -> None:
        """End the lanes and leave the group; the model keeps its (gathered) weights, but for those on disk.

        May be repeated. Raises LaneTimeout where a transfer does not come back; what it uses stays until it does.
        """
        for recomputed in self._recomputed:
            recomputed.remove()
        self._hooks.remove()
        if self._heap is not None:
            self._heap.end_steps()
        self._executor.close()
        self._turns.close()
        if self._pipeline is not None:
            self._pipeline.close()
        self._forget(is_over=True)  # what is in the tiers' buffers goes with them
        if self._state is not None:
            self._state.leave()
        try:
            if self._tier is not None:
                self._tier.close()
                self._tier = None
        finally:
            if self._tiers is not None:
                self._tiers.close()
            if self.transport is not None and not (self._state is not None and self._state.drops_copies):
                self.transport.close()
            self.transport = None

    # ---- one step

    def _run_micro_batches(self, micro: Sequence[Any], samples: int) -> None:
        if self._pipeline is not None:
            self._run_pipeline(self._pipeline)
            return
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

    def _begin_pipeline(self, pipeline: "Pipeline", micro: Sequence[Any], samples: int) -> None:
        """A schedule of as many micro-batches as any rank of the stage has samples for."""
        count = sum(part is not None for part in micro)
        if self.transport is not None:
            count = int(self.transport.gather_rows([float(count)]).max())
        if self.plan.uses_disk:  # its buffers are those of one program: micro-batches without samples are passed over
            count = self.plan.micro_batches
        self._parts = pipeline.micro_batches(micro[:count], samples)
        self._program = pipeline.program(count)
        self._attempt += 1
        pipeline.begin(self._attempt, self._step, self._parts, self.state)

    def _run_pipeline(self, pipeline: "Pipeline") -> None:
        for number, part in enumerate(self._parts):
            if part.part is None:
                self._executor.skip_micro_batch(number)
        pipeline.run(self._parts, self.state)

    def _leave_turn(self, micro_batch: int) -> None:
        self.state.stash_gradients(self._held, micro_batch)
        release_kernel_buffers()  # else each micro-batch's thread would keep its own

    def _recover(self) -> None:
        """After a failed step: as if it had not been."""
        carried = self._program.actions()[: self._program.num_carried] if self._program and self._is_carried else []
        if self._recovery.recover(
            self._executor, self._tier, carried, lambda action: self.state.write(action), self._forget
        ):
            self._is_carried = False

    def _end_last_step(self) -> None:
        """Do what is left of the last step: its writes that were to run into the next one."""
        if self._heap is not None:
            self._heap.end_steps()
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
        weight = local / samples
        if self._tiers is not None:
            part = map_tensors(part, self._tiers.device.bring)
        # The model may use chunks outside of units before it comes to a unit.
        before = self._executor.await_next if self._held else lambda: None
        try:
            value = self._passage.run(self._hooks, self.state, self._step, number, part, weight, before)
            if self._moving is not None:
                self._moving.release_micro_batch(number)
        finally:
            self._hooks.end()
        self._losses[number] = value * local / samples
        # Before the micro-batch's end: from then on the norm, which exchanges the loss too, may run on its lane.
        self.state.micro_loss = sum(self._losses[each] for each in sorted(self._losses))
        self._executor.complete_micro_batch(number)

    def _norm(self, action: Action) -> None:
        self._peak_slots = self.state.held_bytes()  # the fullest moment: all gradients are there
        self.state.norm(action)

    def _fail(self, error: BaseException) -> None:
        running = self._executor.running
        unit = self._hooks.name_of(running.index) if running is not None and running.index is not None else None
        self._hooks.end()
        if self._heap is not None:
            self._heap.end_steps()
        self._recovery.fail(self._step, error)
        if self._pipeline is not None:
            self._pipeline.mail.fail(f"{type(error).__name__}: {error}", self._recovery.is_lost)
        self._executor.abort(error)
        self._forget()
        if not hasattr(error, "outgrow_step"):
            error.outgrow_step = self._step  # pyright: ignore[reportAttributeAccessIssue]
            error.outgrow_rank = self.rank  # pyright: ignore[reportAttributeAccessIssue]
            if not hasattr(error, "outgrow_unit"):
                error.outgrow_unit = unit  # pyright: ignore[reportAttributeAccessIssue]
            place = f" in unit {unit} ({running})" if unit else ""
            error.add_note(f"rank {self.rank}, step {self._step}{place}")
        self._step -= not self._recovery.is_lost  # it will be done again, or something else instead of it

    def _forget(self, is_over: bool = False) -> None:
        """What a failed step had in memory. Before its program began that is nothing from disk: what lies in buffers is
        the last step's, on its way to the disk."""
        if self._state is not None:
            self._state.forget_gradients()
            if is_over or self._recovery.has_begun:
                self._state.forget_buffers()
        if self._moving is not None:
            self._moving.clear()
        if self._pipeline is not None:
            self._pipeline.forget()
