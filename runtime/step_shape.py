"""From what a trace found and how chunks lie to the shape of a step, which programs are compiled from.

Owns that one translation. Does not own the trace (`scheduler/trace.py`) nor the chunks (`runtime/model_state.py`).
"""

from collections.abc import Sequence

from ..memory.direct_io import round_up
from ..parallel.units import Unit
from ..scheduler.program import ChunkUse, StepShape, UnitUse
from ..scheduler.trace import Trace
from .chunk_state import ChunkState

__all__ = ["step_shape"]


def step_shape(trace: Trace, units: Sequence[Unit], states: Sequence[ChunkState]) -> StepShape:
    """The chain of unit runs, the chunks that each uses, and what is used outside of all of them."""
    chunk_of = {item.name: state.layout.index for state in states for item in state.layout.fields}
    uses = tuple(
        UnitUse(
            units[call.unit].name,
            tuple(sorted({chunk_of[name] for name in call.parameters})),
            call.has_backward,
            call.unit,
        )
        for call in trace.calls
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
