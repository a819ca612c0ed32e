"""A step of a plan, played before it runs: from measured units and machine to a timeline.

Owns putting these together for one plan. Does not own the figures (`profiling.py`), what an action takes
(`scheduler/cost.py`) nor the clock (`scheduler/simulate.py`).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..memory.chunk import ChunkLayout
from ..scheduler.assessment import Assessment
from ..scheduler.cost import Costs, TimeProfile
from ..scheduler.memory_profile import MemoryProfile
from ..scheduler.pieces import without_faults
from ..scheduler.plan import Plan
from ..scheduler.program import StepShape
from ..scheduler.simulate import Simulated, simulate
from .profiling import Profiled

if TYPE_CHECKING:
    from ..parallel.collectives import Transport

__all__ = ["simulated"]


def simulated(
    found: Assessment,
    shape: StepShape,
    layouts: Sequence[ChunkLayout],
    profiled: Profiled,
    memory: MemoryProfile | None,
    transport: "Transport | None",
) -> Simulated:
    """A step of an assessed plan.

    Args:
        shape: of its step.
        memory: what units take; needed for a plan that keeps freed blocks.
        transport: None on one rank.
    """
    plan = found.plan
    num_elems = [
        layout.num_elems // (plan.world_size if decision.optimizer_sharded else 1) * layout.trainable
        for layout, decision in zip(layouts, plan.chunks, strict=True)
    ]
    is_here = transport is not None and transport.name == "shared-memory"
    costs = Costs(
        shape,
        plan,
        _times(plan, profiled, memory),
        profiled.hardware,
        num_elems,
        shares_parameters=is_here,
        ranks_here=transport.size if transport is not None and is_here else 1,
    )
    return simulate(found.program, costs, costs.capacity)


def _times(plan: Plan, profiled: Profiled, memory: MemoryProfile | None) -> TimeProfile:
    """Of units, measured where freed blocks were given back, for a plan that keeps them: without page faults."""
    if not plan.keeps_freed:
        return profiled.times
    assert memory is not None
    return without_faults(profiled.times, memory, profiled.hardware.fault_s_per_byte)
