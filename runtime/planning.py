"""From a model and its first batch to a plan that fits, and the program of it; before anything is moved.

Owns the traced pass, the profile where memory is tight, and the one decision for all ranks. Does not own the order in
which plans are tried (`scheduler/fit.py`) nor carrying a plan out (`runtime/engine.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..memory.allocator import return_freed_blocks
from ..memory.budget import Memory
from ..memory.chunk import ChunkLayout
from ..memory.errors import DoesNotFit
from ..parallel.units import Unit
from ..scheduler.assessment import Assessment, Open
from ..scheduler.device_ledger import device_ledger
from ..scheduler.fit import choose
from ..scheduler.ledger import HostFigures, Ledger, host_ledger
from ..scheduler.memory_profile import MemoryProfile, measure_memory
from ..scheduler.passes import compile_program
from ..scheduler.plan import Activations, Home, Plan
from ..scheduler.program import Program, StepShape
from ..scheduler.trace import Trace
from ..scheduler.verify import verify
from .constraints import offloaded
from .device_figures import separate_figures
from .host_figures import host_figures, process_bytes
from .offload import optim_layouts
from .optimizer import PiecewiseOptimizer
from .step_shape import step_shape

if TYPE_CHECKING:
    from ..parallel.collectives import Transport

__all__ = ["Planned", "Planner"]

Forward = Callable[[nn.Module, Any], Any]
Loss = Callable[[Any, Any], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Planned:
    """What will be run.

    Attributes:
        held: chunks used outside of units.
        ledger: the host's fullest moment as it was predicted; None where memory is ample and nothing was predicted.
        device: likewise the device's, where it has memory of its own.
    """

    plan: Plan
    program: Program
    held: tuple[int, ...]
    ledger: Ledger | None
    device: Ledger | None = None


@dataclass(frozen=True)
class Planner:
    """What does not change from plan to plan.

    Attributes:
        layouts: the chunks.
        original_dtypes: of the model's parameters, as it was given.
        is_ample: whether the budget takes all of the state twice over.
        transport: None on one rank.
    """

    model: nn.Module
    units: Sequence[Unit]
    layouts: Sequence[ChunkLayout]
    original_dtypes: Mapping[str, torch.dtype]
    optimizer: PiecewiseOptimizer
    memory: Memory
    is_ample: bool
    transport: "Transport | None"

    def plan(self, plan: Plan, open_: Open, trace: Trace, forward: Forward, loss: Loss, part: Any) -> Planned:
        """The plan that fits, and its program. Collective.

        Args:
            plan: with what is fixed.
            open_: what is not.
            trace: of the model.
            forward, loss: as a micro-batch goes through them.
            part: a micro-batch.

        Raises:
            DoesNotFit: on every rank, where none fits.
            InvalidProgram: what was compiled cannot run: a mistake of this project.
        """
        moves = Activations.OFFLOAD_DISK in plan.activations
        profile = self._profile(forward, loss, part) if moves or not self.is_ample else None
        batch_bytes = sum(leaf.nbytes for leaf in tree_leaves(part) if isinstance(leaf, torch.Tensor))

        def shape_of(plan: Plan) -> StepShape:
            everything = replace(plan, chunks=tuple(offloaded(c, Home.DISK, Home.DISK) for c in plan.chunks))
            optims = optim_layouts(self.layouts, everything, self.optimizer.slots, self.original_dtypes)
            return step_shape(trace, self.units, self.layouts, plan, optims, profile, batch_bytes)

        if self.is_ample:
            shape = shape_of(plan)
            program = compile_program(shape, plan)
            verify(program, shape, plan)
            return Planned(plan, program, shape.held, None)
        assert profile is not None
        found = self._choose(plan, open_, profile, shape_of, batch_bytes)
        shape = shape_of(found.plan)
        verify(found.program, shape, found.plan)
        return Planned(found.plan, found.program, shape.held, found.ledger, found.device)

    def _choose(
        self,
        plan: Plan,
        open_: Open,
        profile: MemoryProfile,
        shape_of: Callable[[Plan], StepShape],
        batch_bytes: int,
    ) -> Assessment:
        return_freed_blocks()  # what the profile left
        process = process_bytes(list(self.model.parameters()))
        budget = self.memory.host_bytes
        assert budget is not None
        device = self.memory.device_bytes
        if self.transport is not None:
            rows = self.transport.gather_rows([float(process), float(budget), float(device or 0)])
            process, budget = int(rows[:, 0].max()), int(rows[:, 1].min())
            device = None if device is None else int(rows[:, 2].min())
        name = "single" if self.transport is None else self.transport.name

        def assess(plan: Plan) -> Assessment:
            shape = shape_of(plan)
            program = compile_program(shape, plan)
            figures_of = host_figures if plan.unified else separate_figures
            found = figures_of(self.layouts, plan, self.optimizer, self.original_dtypes, name, process)
            if isinstance(found, HostFigures):
                return Assessment(plan, program, host_ledger(program, shape, plan, profile, found))
            buffers = sum(buffer.nbytes for buffer in self.model.buffers())
            return Assessment(
                plan,
                program,
                host_ledger(program, shape, plan, profile, found[0]),
                device_ledger(program, shape, plan, profile, found[1], batch_bytes + buffers),
            )

        if self.transport is None:
            return choose(plan, open_, len(self.units), budget, assess, device)
        decided: Plan | DoesNotFit | None = None
        if self.transport.rank == 0:
            try:
                decided = choose(plan, open_, len(self.units), budget, assess, device).plan
            except DoesNotFit as error:
                decided = error
        decided = self.transport.broadcast_object(decided)
        if isinstance(decided, DoesNotFit):
            raise decided
        assert decided is not None
        return assess(decided)

    def _profile(self, forward: Forward, loss: Loss, part: Any) -> MemoryProfile:
        """What a micro-batch takes, measured without computing."""
        shapes = {item.name: (item.shape, layout.dtype) for layout in self.layouts for item in layout.fields}
        return measure_memory(self.model, self.units, forward, loss, part, shapes)
