"""A step of a plan, played before it runs: from measured units and machine to a timeline.

Owns putting these together for one plan. Does not own the figures (`profiling.py`), what an action takes
(`scheduler/cost.py`) nor the clock (`scheduler/simulate.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..memory.chunk import ChunkLayout
from ..scheduler.assessment import Assessment
from ..scheduler.cost import Costs, TimeProfile
from ..scheduler.memory_profile import MemoryProfile
from ..scheduler.pieces import with_faults
from ..scheduler.program import Instruction, StepShape
from ..scheduler.simulate import Simulated, Work, simulate, simulated_seconds
from .profiling import Profiled

if TYPE_CHECKING:
    from ..parallel.collectives import Transport

__all__ = ["StepSeconds", "remembered"]


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """Plays steps of one model's plans.

    Attributes:
        memory: what units take.
        transport: None on one rank.
        freed_stay: whether freed blocks stay the process's from step to step, also where a plan has no bound for them:
            no block is a fresh one then.
    """

    layouts: Sequence[ChunkLayout]
    profiled: Profiled
    memory: MemoryProfile | None
    transport: "Transport | None"
    freed_stay: bool = False

    def simulated(self, found: Assessment, shape: StepShape) -> Simulated:
        """A step of an assessed plan, whose shape is given."""
        costs = self._costs(found, shape)
        return simulate(found.program, remembered(costs), costs.capacity)

    def of(self, found: Assessment, shape: StepShape) -> float:
        """`simulated(...).seconds`, in less time."""
        costs = self._costs(found, shape)
        return simulated_seconds(found.program, remembered(costs), costs.capacity)

    def _costs(self, found: Assessment, shape: StepShape) -> Costs:
        plan = found.plan
        num_elems = [
            layout.num_elems // (plan.world_size if decision.optimizer_sharded else 1) * layout.trainable
            for layout, decision in zip(self.layouts, plan.chunks, strict=True)
        ]
        is_here = self.transport is not None and self.transport.name == "shared-memory"
        return Costs(
            shape,
            plan,
            self._times(found),
            self.profiled.hardware,
            num_elems,
            shares_parameters=is_here,
            ranks_here=self.transport.size if self.transport is not None and is_here else 1,
        )

    def _times(self, found: Assessment) -> TimeProfile:
        """Of units, with the page faults of the plan."""
        profiled = self.profiled
        assert self.memory is not None
        shares = found.ledger.fresh_shares if found.plan.keeps_freed else {} if self.freed_stay else None
        return with_faults(profiled.times, self.memory, profiled.hardware.fault_seconds, shares, profiled.has_faults)


def remembered(costs: Costs) -> Callable[[Instruction], Work]:
    """The same costs, worked out once for all micro-batches but the first: the others add to its gradients."""
    known: dict[tuple[object, ...], Work] = {}

    def cost(instruction: Instruction) -> Work:
        action = instruction.action
        is_first = not action.micro_batch
        key = action.kind, action.index, action.slot, is_first, instruction.lane, instruction.num_bytes
        if key not in known:
            known[key] = costs(instruction)
        return known[key]

    return cost
