"""From a model and its first batch to a plan that fits, and the program of it; before anything is moved.

Owns the traced pass, the profiles of bytes and seconds, and the one decision for all ranks. Does not own the space of
plans (`scheduler/search.py`; `scheduler/fit.py`, where nothing is known of seconds) nor carrying a plan out
(`runtime/engine.py`).
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..memory.allocator import (
    num_heaps,
    release_kernel_buffers,
    return_blocks_at_once,
    return_freed_blocks,
    uses_first_heap,
)
from ..memory.budget import Memory
from ..memory.chunk import ALIGN_BYTES, ChunkLayout
from ..memory.errors import DoesNotFit
from ..memory.process import read_process_memory
from ..parallel.units import Unit
from ..scheduler.assessment import Assessment, Budgets, Open, describe, refusal
from ..scheduler.fit import choose
from ..scheduler.memory_profile import MemoryProfile, measure_memory
from ..scheduler.passes import compile_program
from ..scheduler.pieces import choose_for_units
from ..scheduler.plan import Activations, MicroBatchOrder, Plan
from ..scheduler.prediction import Fate, Prediction
from ..scheduler.program import StepShape
from ..scheduler.search import Candidate, search
from ..scheduler.simulate import Simulated
from ..scheduler.spare import without_bounds
from ..scheduler.trace import Trace
from ..scheduler.twin import Shapes
from ..scheduler.verify import verify
from .assessing import Assessor
from .host_figures import RankState, process_bytes
from .optimizer import PiecewiseOptimizer
from .passage import Passage
from .plan_seconds import StepSeconds
from .planned import Planned
from .profiling import NotProfiled, Profiled, Profiler

if TYPE_CHECKING:
    from ..parallel.collectives import Transport

__all__ = ["Planner"]

_AMPLE = 0.75  # of the budget, for a plan that keeps freed blocks
_STAYS = 0.2  # of what a step's tensors take at the most: freed blocks that may stay on top, in ample memory
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Planner:
    """What does not change from plan to plan.

    Attributes:
        layouts: the chunks.
        original_dtypes: of the model's parameters, as it was given.
        is_ample: whether the budget takes all of the state twice over.
        transport: None on one rank.
        passage: how a micro-batch goes through the model.
        shapes: true shapes and dtypes of parameters.
    """

    model: nn.Module
    units: Sequence[Unit]
    layouts: Sequence[ChunkLayout]
    original_dtypes: Mapping[str, torch.dtype]
    optimizer: PiecewiseOptimizer
    memory: Memory
    is_ample: bool
    transport: "Transport | None"
    passage: Passage
    shapes: Shapes

    def plan(
        self, plan: Plan, open_: Open, trace: Trace, part: Any, predicts: bool = False, explores: bool = False
    ) -> Planned:
        """The plan that fits and is the fastest of those, and its program. Collective.

        Args:
            plan: with what is fixed.
            open_: what is not.
            trace: of the model.
            part: a micro-batch.
            predicts: measure seconds also where nothing is to be chosen by them.
            explores: also say what more memory and a faster disk would buy.

        Raises:
            DoesNotFit: on every rank, where none fits.
            InvalidProgram: what was compiled cannot run: a mistake of this project.
        """
        return _Planning(self, trace, part).run(plan, open_, predicts, explores)


@dataclass(frozen=True, slots=True)
class _Decided:
    """A decision, with what it was made from."""

    plan: Plan
    open_: Open
    found: Assessment
    fates: Sequence[Fate]
    note: str


class _Planning:
    """One model with one batch."""

    def __init__(self, planner: Planner, trace: Trace, part: Any) -> None:
        self.planner, self.trace, self.part = planner, trace, part
        self.transport = planner.transport
        leaves = [leaf for leaf in tree_leaves(part) if isinstance(leaf, torch.Tensor)]
        self.batch_bytes = sum(leaf.nbytes + ALIGN_BYTES for leaf in leaves)  # brought to where it was within a line
        self.memory: MemoryProfile | None = None
        self.process = 0
        self.budgets = Budgets(0)
        self.profiled: Profiled | None = None
        self._took_s: dict[str, float] = {}
        self._freed_stay = False
        self._freed_share = 0.0

    def run(self, plan: Plan, open_: Open, predicts: bool, explores: bool) -> Planned:
        several, clips, is_ample = plan.micro_batches > 1, plan.clips_gradients, self.planner.is_ample
        open_ = replace(open_, order=open_.order and several, update=open_.update and not clips)
        is_asked = predicts or explores
        if Activations.OFFLOAD_DISK in plan.activations or is_asked or not is_ample:
            with self._clock("tracing the model"):
                self.memory = self._memory_profile()
        if is_ample and not is_asked:
            plan = without_bounds(plan, open_, self.shape_of(plan))
            shape = self.shape_of(plan)
            program = compile_program(shape, plan)
            verify(program, shape, plan)
            return Planned(plan, program, shape.held, None)
        self._count_process()
        if is_ample:
            self._freed_share = _STAYS
            for each in dict.fromkeys((without_bounds(plan, open_, self.shape_of(plan)), plan)):
                found = self.assess(replace(each, keeps_freed=plan.unified))
                if found.ledger.peak_bytes > self.budgets.host * _AMPLE:
                    continue
                self._freed_stay = True
                note = self._measure_seconds(plan, open_, gives_back=False) if predicts else ""
                with self._clock("searching"):
                    found, fates = self._among_ample(found, open_)
                return self._planned(_Decided(plan, open_, found, fates, note), explores, is_ample)
            self._freed_share = 0.0
            del self._assessor  # made for that share
        return_blocks_at_once()  # before anything is measured: a heap that has grown does not shrink
        return self._planned(self._tight(plan, open_, predicts), explores)

    def _among_ample(self, found: Assessment, open_: Open) -> tuple[Assessment, Sequence[Fate]]:
        """Of the plans that keep everything in memory, and freed blocks too: how ranks share the state."""
        if self.profiled is None or not open_.zero:
            return found, ()
        budgets = self.budgets
        self.budgets = replace(budgets, host=int(budgets.host * _AMPLE))
        try:
            return self._decide(found.plan, Open(False, False, False, False, disk=False, zero=True))
        finally:
            self.budgets = budgets

    def _planned(self, decided: "_Decided", explores: bool, is_ample: bool = False) -> Planned:
        found = decided.found
        shape = self.shape_of(found.plan)
        verify(found.program, shape, found.plan)
        prediction = None
        if self.profiled is not None:
            prediction = self._prediction(found, shape, decided.fates)
            if explores and decided.open_.is_any:
                with self._clock("asking what more would buy"):
                    what_if = tuple(self._what_if(decided.plan, decided.open_, prediction.seconds))
                prediction = replace(prediction, what_if=what_if)
            prediction = replace(prediction, took_s=dict(self._took_s))
        return Planned(
            found.plan, found.program, shape.held, found.ledger, found.device, prediction, decided.note, is_ample
        )

    def _tight(self, plan: Plan, open_: Open, predicts: bool) -> "_Decided":
        """The best plan that keeps freed blocks, which saves page faults and takes memory; or that does not, where that
        is faster or the other does not fit."""
        modes = self._modes(plan, open_)
        note = self._measure_seconds(plan, open_, gives_back=True) if predicts or open_.is_any else ""
        best: _Decided | None = None
        for number, (plan_, open__) in enumerate(modes):
            try:
                with self._clock("searching"):
                    found, fates = self._decide(plan_, open__)
            except DoesNotFit:
                if best is None and number == len(modes) - 1:
                    raise  # the leanest way's refusal says what is missing
                continue
            if best is None or self.seconds_of(found) < self.seconds_of(best.found):
                best = _Decided(plan_, open__, found, fates, note)
            if self.profiled is None or not (found.plan.activations or found.plan.uses_disk):
                break  # nothing that could be compared, or bettered
        assert best is not None
        return best

    def _modes(self, plan: Plan, open_: Open) -> list[tuple[Plan, Open]]:
        """With freed blocks kept, where that can be proved to fit, and given back at once.

        It can be where updates make no temporaries and no messages are exchanged (nobody knows what libraries make for
        those), in the first heap; micro-batches that take turns, and exchanges, have threads of their own, which must
        not have heaps of their own.
        """
        one_heap, by_unit = num_heaps() == 1, plan.order is MicroBatchOrder.BY_UNIT
        is_given = not open_.is_any and not open_.may_adapt
        transport = self.transport
        is_provable = plan.unified and self.planner.optimizer.is_fused
        if transport is None:
            has_heap = one_heap or (uses_first_heap() and not by_unit)
        else:  # all ranks go the same way
            one_heap = has_heap = bool(transport.gather_rows([float(one_heap)]).min())
            is_provable = is_provable and transport.name == "shared-memory"
        if is_given or not is_provable or not has_heap:
            return [(plan, open_)]
        kept = replace(plan, keeps_freed=True), replace(open_, order=open_.order and one_heap)
        return [kept, (plan, open_)]

    def _prediction(self, found: Assessment, shape: StepShape, fates: Sequence[Fate]) -> Prediction:
        ledgers, budgets = {"host": found.ledger}, {"host": self.budgets.host}
        if found.device is not None:
            ledgers["device"] = found.device
            budgets["device"] = self.budgets.device or 0
        return Prediction.of(found.program, shape, self.simulated(found), ledgers, budgets, fates)

    def _what_if(self, plan: Plan, open_: Open, seconds: float) -> Iterator[Fate]:
        """The plans that there would be with more: of memory, or of the disk's bandwidth."""
        before = self.budgets, self.profiled
        profiled = self.profiled
        assert profiled is not None
        more = [("1 GiB more host memory", replace(self.budgets, host=self.budgets.host + (1 << 30)), profiled)]
        if profiled.hardware.disk is not None:
            twice = replace(profiled.hardware, disk=profiled.hardware.disk.scaled(2.0))
            more.append(("twice the disk bandwidth", self.budgets, replace(profiled, hardware=twice)))
        for name, self.budgets, self.profiled in more:
            found, _ = self._decide(plan, open_)
            new_s = self.seconds_of(found)
            gain = f"faster by {100 * max(0.0, 1 - new_s / seconds):.0f}%"
            yield Fate(f"{name}: {describe(found.plan)}", new_s, found.ledger.peak_bytes, gain)
        self.budgets, self.profiled = before

    @contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        began_s = perf_counter()
        try:
            yield
        finally:
            self._took_s[name] = self._took_s.get(name, 0.0) + perf_counter() - began_s

    # ---- figures

    def _memory_profile(self) -> MemoryProfile:
        """What a micro-batch takes, measured without computing."""
        planner, passage = self.planner, self.planner.passage
        return measure_memory(
            planner.model, planner.units, passage.forward, passage.call_loss, self.part, planner.shapes
        )

    def _count_process(self) -> None:
        """The fullest process and the smallest budgets of all ranks."""
        return_freed_blocks()  # what the profile left
        self.process = process_bytes(list(self.planner.model.parameters()))
        budget, device = self.planner.memory.host_bytes, self.planner.memory.device_bytes
        assert budget is not None
        if self.transport is not None:
            rows = self.transport.gather_rows([float(self.process), float(budget), float(device or 0)])
            self.process, budget = int(rows[:, 0].max()), int(rows[:, 1].min())
            device = None if device is None else int(rows[:, 2].min())
        self.budgets = Budgets(budget, device)

    def _measure_seconds(self, plan: Plan, open_: Open, gives_back: bool) -> str:
        """Within what is left of the budget, in a process that keeps freed blocks from step to step or gives them back.
        Returns why it could not be done, or nothing."""
        if self.planner.memory.is_separate and torch.cuda.is_available():
            return "seconds are measured on the host only, and units compute on a CUDA device"
        left_bytes = self.budgets.host - read_process_memory().resident_bytes
        try:
            with self._clock("measuring seconds"):
                takes_turns = plan.micro_batches > 1 and (open_.order or plan.order is MicroBatchOrder.BY_UNIT)
                profiler = replace(self._profiler(), takes_turns=takes_turns)
                self.profiled = profiler.measure(self.trace, self.part, self.memory, left_bytes, gives_back)
        except NotProfiled as error:
            _LOG.info("plans are compared by the bytes that they move, since %s", error)
            return str(error)
        finally:
            release_kernel_buffers()  # of threads that are over, too
            return_freed_blocks()
        return ""

    def _profiler(self) -> Profiler:
        planner, passage = self.planner, self.planner.passage
        return Profiler(
            planner.model,
            planner.units,
            passage.forward,
            passage.call_loss,
            planner.shapes,
            passage.input_dtype,
            planner.optimizer,
            None if planner.memory.disk is None else os.fspath(planner.memory.disk),
            self.transport,
        )

    # ---- plans

    @cached_property
    def _assessor(self) -> Assessor:
        """From when the bytes of a micro-batch are known, as far as they are asked for."""
        planner = self.planner
        transport = "single" if self.transport is None else self.transport.name
        rank = RankState(
            planner.layouts, planner.optimizer, planner.original_dtypes, transport, self.process, self._freed_share
        )
        buffer_bytes = sum(buffer.nbytes for buffer in planner.model.buffers())
        return Assessor(rank, self.trace, planner.units, self.memory, self.batch_bytes, buffer_bytes)

    def shape_of(self, plan: Plan) -> StepShape:
        return self._assessor.shape_of(plan)

    def assess(self, plan: Plan) -> Assessment:
        """Compile a plan and add up its bytes."""
        return self._assessor.assess(plan)

    def simulated(self, found: Assessment) -> Simulated:
        """A step of it."""
        return self._seconds.simulated(found, self.shape_of(found.plan))

    def seconds_of(self, found: Assessment) -> float:
        """Of a step of it."""
        return self._seconds.of(found, self.shape_of(found.plan))

    @property
    def _seconds(self) -> StepSeconds:
        assert self.profiled is not None
        return StepSeconds(self.planner.layouts, self.profiled, self.memory, self.transport, self._freed_stay)

    def _decide(self, plan: Plan, open_: Open) -> tuple[Assessment, Sequence[Fate]]:
        """One plan for all ranks: rank 0 looks, and says what it found."""
        if self.transport is None:
            return self._look(plan, open_)
        decided: tuple[Plan, Sequence[Fate]] | DoesNotFit | None = None
        if self.transport.rank == 0:
            try:
                found, fates = self._look(plan, open_)
                decided = found.plan, fates
            except DoesNotFit as error:
                decided = error
        decided = self.transport.broadcast_object(decided)
        if isinstance(decided, DoesNotFit):
            raise decided
        assert decided is not None
        return self.assess(decided[0]), decided[1]

    def _look(self, plan: Plan, open_: Open) -> tuple[Assessment, Sequence[Fate]]:
        num_units = len(self.planner.units)
        if not open_.is_any and not open_.may_adapt:
            found = self.assess(plan)
            if not self.budgets.fit(found):
                raise refusal(found, open_, self.budgets)
            return found, ()
        profiled, memory = self.profiled, self.memory
        if profiled is None:
            return choose(plan, open_, num_units, self.budgets.host, self.assess, self.budgets.device), ()
        assert memory is not None

        def policies(plan: Plan, room_bytes: int) -> Sequence[Activations] | None:
            disk = profiled.hardware.disk if open_.disk else None
            return choose_for_units(memory, profiled.times, num_units, room_bytes, disk)

        found = search(
            plan,
            open_,
            num_units,
            self.budgets.host,
            self.assess,
            self.seconds_of,
            policies,
            self.budgets.device,
        )
        return found.best, [_fate(each) for each in found.candidates]


def _fate(candidate: Candidate) -> Fate:
    return Fate(describe(candidate.plan), candidate.seconds, candidate.peak_bytes, candidate.fate)
