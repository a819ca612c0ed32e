"""From what a trace found and how chunks lie to the shape of a step, which programs are compiled from.

Owns that one translation. Does not own the trace (`scheduler/trace.py`) nor the chunks (`runtime/model_state.py`).
"""

from collections.abc import Sequence

from ..memory.chunk import ALIGN_BYTES
from ..memory.direct_io import round_up
from ..parallel.units import Unit
from ..scheduler.memory_profile import MemoryProfile
from ..scheduler.program import ChunkUse, StepShape, UnitUse
from ..scheduler.trace import Trace
from .chunk_state import ChunkState

__all__ = ["saved_bytes", "step_shape"]


def step_shape(
    trace: Trace, units: Sequence[Unit], states: Sequence[ChunkState], profile: MemoryProfile | None = None
) -> StepShape:
    """The chain of unit runs, the chunks that each uses, and what is used outside of all of them.

    Args:
        profile: where activations move, for the sizes of their buffers.
    """
    chunk_of = {item.name: state.layout.index for state in states for item in state.layout.fields}
    uses = tuple(
        UnitUse(
            units[call.unit].name,
            tuple(sorted({chunk_of[name] for name in call.parameters})),
            call.has_backward,
            call.unit,
            0 if profile is None else saved_bytes(profile, run),
        )
        for run, call in enumerate(trace.calls)
    )
    used = {chunk for use in uses for chunk in use.chunks}
    outside = {state.layout.index for state in states} - used
    held = tuple(sorted(outside | {chunk_of[name] for name in trace.between}))
    chunks = tuple(
        ChunkUse(
            state.layout.num_bytes,
            state.layout.trainable,
            round_up((state.store.stop - state.store.start) * state.layout.dtype.itemsize),
            0 if state.optim is None else state.optim.num_bytes,
        )
        for state in states
    )
    return StepShape(uses, chunks, held)


def saved_bytes(profile: MemoryProfile, run: int) -> int:
    """Of a buffer for everything that a unit run saves, also what others save too, each storage with room to align."""
    saved = [life.num_bytes for life in profile.storages if run in life.saved_by]
    return round_up(sum(saved) + ALIGN_BYTES * (len(saved) + 1))
