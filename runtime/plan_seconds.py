"""A step of a plan, played before it runs: from measured units and machine to a timeline.

Owns putting these together for one plan. Does not own the figures (`profiling.py`), what an action takes
(`scheduler/cost.py`) nor the clock (`scheduler/simulate.py`).
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..memory.chunk import ChunkLayout
from ..scheduler.assessment import Assessment
from ..scheduler.cost import Costs, TimeProfile
from ..scheduler.memory_profile import MemoryProfile
from ..scheduler.pieces import without_faults
from ..scheduler.plan import Plan
from ..scheduler.program import Instruction, StepShape
from ..scheduler.simulate import Simulated, Work, simulate, simulated_seconds
from .profiling import Profiled

if TYPE_CHECKING:
    from ..parallel.collectives import Transport

__all__ = ["seconds_of", "simulated"]


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
    costs = _costs(found.plan, shape, layouts, profiled, memory, transport)
    return simulate(found.program, _remembered(costs), costs.capacity)


def seconds_of(
    found: Assessment,
    shape: StepShape,
    layouts: Sequence[ChunkLayout],
    profiled: Profiled,
    memory: MemoryProfile | None,
    transport: "Transport | None",
) -> float:
    """`simulated(...).seconds`, in less time."""
    costs = _costs(found.plan, shape, layouts, profiled, memory, transport)
    return simulated_seconds(found.program, _remembered(costs), costs.capacity)


def _costs(
    plan: Plan,
    shape: StepShape,
    layouts: Sequence[ChunkLayout],
    profiled: Profiled,
    memory: MemoryProfile | None,
    transport: "Transport | None",
) -> Costs:
    num_elems = [
        layout.num_elems // (plan.world_size if decision.optimizer_sharded else 1) * layout.trainable
        for layout, decision in zip(layouts, plan.chunks, strict=True)
    ]
    is_here = transport is not None and transport.name == "shared-memory"
    return Costs(
        shape,
        plan,
        _times(plan, profiled, memory),
        profiled.hardware,
        num_elems,
        shares_parameters=is_here,
        ranks_here=transport.size if transport is not None and is_here else 1,
    )


def _remembered(costs: Costs) -> Callable[[Instruction], Work]:
    """Every micro-batch's action costs the same."""
    known: dict[tuple[object, ...], Work] = {}

    def cost(instruction: Instruction) -> Work:
        action = instruction.action
        key = action.kind, action.index, action.slot, instruction.lane, instruction.num_bytes
        if key not in known:
            known[key] = costs(instruction)
        return known[key]

    return cost


def _times(plan: Plan, profiled: Profiled, memory: MemoryProfile | None) -> TimeProfile:
    """Of units, measured where freed blocks were given back, for a plan that keeps them: without page faults."""
    if not plan.keeps_freed:
        return profiled.times
    assert memory is not None
    return without_faults(profiled.times, memory, profiled.hardware.fault_s_per_byte)
