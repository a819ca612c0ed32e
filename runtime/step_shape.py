"""From what a trace found and how chunks lie to the shape of a step, which programs are compiled from.

Owns that one translation. Does not own the trace (`scheduler/trace.py`) nor layouts and plan.
"""

from collections.abc import Sequence

from ..memory.chunk import ALIGN_BYTES, ChunkLayout
from ..memory.direct_io import round_up
from ..parallel.units import Unit
from ..scheduler.memory_profile import MemoryProfile
from ..scheduler.plan import Plan
from ..scheduler.program import ChunkUse, StepShape, UnitUse
from ..scheduler.trace import Trace
from .chunk_state import OptimLayout

__all__ = ["saved_bytes", "step_shape"]


def step_shape(
    trace: Trace,
    units: Sequence[Unit],
    layouts: Sequence[ChunkLayout],
    plan: Plan,
    optims: Sequence[OptimLayout | None],
    profile: MemoryProfile | None = None,
    batch_bytes: int = 0,
) -> StepShape:
    """The chain of unit runs, the chunks that each uses, and what is used outside of all of them.

    Args:
        optims: per chunk, where its optimizer slots lie on disk, or None.
        profile: for the sizes of buffers of activations.
        batch_bytes: of a micro-batch, which units may save too.
    """
    chunk_of = {item.name: layout.index for layout in layouts for item in layout.fields}
    uses = tuple(
        UnitUse(
            units[call.unit].name,
            tuple(sorted({chunk_of[name] for name in call.parameters})),
            call.has_backward,
            call.unit,
            0 if profile is None else saved_bytes(profile, run) + round_up(batch_bytes),
        )
        for run, call in enumerate(trace.calls)
    )
    used = {chunk for use in uses for chunk in use.chunks}
    outside = {layout.index for layout in layouts} - used
    held = tuple(sorted(outside | {chunk_of[name] for name in trace.between}))
    chunks = tuple(
        ChunkUse(
            layout.num_bytes,
            layout.trainable,
            round_up(layout.num_bytes // (plan.world_size if decision.optimizer_sharded else 1)),
            0 if optim is None else optim.num_bytes,
        )
        for layout, decision, optim in zip(layouts, plan.chunks, optims, strict=True)
    )
    return StepShape(uses, chunks, held)


def saved_bytes(profile: MemoryProfile, run: int) -> int:
    """Of a buffer for everything that a unit run saves, also what others save too, each storage with room to align."""
    saved = [life.num_bytes for life in profile.storages if run in life.saved_by]
    return round_up(sum(saved) + ALIGN_BYTES * (len(saved) + 1))
