"""Plans compiled, with what they take: each once, as far as memory for that reaches.

Owns what is remembered of plans that were looked at: searches with other budgets come to the same ones again. Does not
own what a plan takes (`scheduler/ledger.py`, `host_figures.py`) nor which plans are looked at.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from ..parallel.units import Unit
from ..scheduler.assessment import Assessment, offloaded
from ..scheduler.device_ledger import device_ledger
from ..scheduler.ledger import HostFigures, host_ledger
from ..scheduler.memory_profile import MemoryProfile
from ..scheduler.passes import compile_program
from ..scheduler.plan import Home, Plan
from ..scheduler.program import Program, StepShape
from ..scheduler.trace import Trace
from .device_figures import separate_figures
from .host_figures import RankState, host_figures
from .offload import optim_layouts
from .step_shape import step_shape

__all__ = ["Assessor"]

_Thing = TypeVar("_Thing")
_NUM_KEPT = 128  # as many as one search looks at


class Assessor:
    """Assesses the plans of one model with one batch on one rank.

    Args:
        memory: what a micro-batch takes; None: nobody will ask for more than the shape of a step.
        batch_bytes: of a micro-batch.
        buffer_bytes: of the model's buffers.
    """

    def __init__(
        self,
        rank: RankState,
        trace: Trace,
        units: Sequence[Unit],
        memory: MemoryProfile | None,
        batch_bytes: int,
        buffer_bytes: int,
    ) -> None:
        self._rank, self._trace, self._units, self._memory = rank, trace, units, memory
        self._batch_bytes, self._buffer_bytes = batch_bytes, buffer_bytes
        self._shapes: dict[tuple[object, ...], StepShape] = {}
        self._programs: dict[Plan, Program] = {}
        self._assessed: dict[Plan, Assessment] = {}

    def shape_of(self, plan: Plan) -> StepShape:
        """It depends on what ranks share alone, wherever that lies."""
        key = plan.world_size, tuple(chunk.optimizer_sharded for chunk in plan.chunks)
        if key not in self._shapes:
            rank = self._rank
            everything = replace(plan, chunks=tuple(offloaded(c, Home.DISK, Home.DISK) for c in plan.chunks))
            optims = optim_layouts(rank.layouts, everything, rank.optimizer.slots, rank.original_dtypes)
            self._shapes[key] = step_shape(
                self._trace, self._units, rank.layouts, plan, optims, self._memory, self._batch_bytes
            )
        return self._shapes[key]

    def assess(self, plan: Plan) -> Assessment:
        """Compile a plan and add up its bytes."""
        found = self._assessed.pop(plan, None) or self._assess(plan)
        return _kept(self._assessed, plan, found)

    def _assess(self, plan: Plan) -> Assessment:
        assert self._memory is not None
        shape, program, profile = self.shape_of(plan), self._program(plan), self._memory
        found = (host_figures if plan.unified else separate_figures)(self._rank, plan)
        if isinstance(found, HostFigures):
            return Assessment(plan, program, host_ledger(program, shape, plan, profile, found))
        inputs_bytes = self._batch_bytes + self._buffer_bytes
        return Assessment(
            plan,
            program,
            host_ledger(program, shape, plan, profile, found[0]),
            device_ledger(program, shape, plan, profile, found[1], inputs_bytes),
        )

    def _program(self, plan: Plan) -> Program:
        """Whether freed blocks are kept is no matter of the program."""
        alike = replace(plan, keeps_freed=False)
        found = self._programs.pop(alike, None) or compile_program(self.shape_of(plan), alike)
        return _kept(self._programs, alike, found)


def _kept(things: dict[Plan, _Thing], plan: Plan, thing: _Thing) -> _Thing:
    """Remember it as the latest, and forget the one that nobody asked for longest."""
    things[plan] = thing
    if len(things) > _NUM_KEPT:
        del things[next(iter(things))]
    return thing
