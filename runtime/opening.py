"""Opening what a plan needs: the disk tier, the model's state in its homes, units that recompute or move activations.

Owns these steps between a plan and the first action. Does not own the plan (`planning.py`) nor the parts themselves.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..memory.budget import Memory
from ..memory.chunk import ChunkLayout
from ..parallel.actions import Kind
from ..parallel.units import Unit
from ..scheduler.plan import Activations, Plan
from ..scheduler.program import Program
from .adopting import Fill
from .disk_tier import DiskTier
from .model_state import ModelState
from .moving import MovingActivations
from .offload import optim_layouts, state_extents
from .optimizer import PiecewiseOptimizer
from .recompute import Recomputed

if TYPE_CHECKING:
    from ..parallel.collectives import Transport
    from .filling import Filler

__all__ = ["fill_with", "open_moves", "open_state", "open_tier", "recompute_units"]


def open_tier(memory: Memory, run_name: str, rank: int, extents: dict[str, int]) -> DiskTier:
    """The disk tier in the folder of `memory`. Raises as `DiskTier`."""
    folder = memory.disk_folder
    assert folder is not None
    return DiskTier(folder, run_name, rank, extents, memory.disk_limit_bytes)


def fill_with(filler: "Filler | None", model: nn.Module, units: Sequence[Unit]) -> Fill | None:
    """The filler as a function of a unit's name."""
    if filler is None:
        return None
    modules = {unit.name: unit.module for unit in units}

    def fill(unit: str, tensors: Mapping[str, torch.Tensor]) -> None:
        filler.fill(unit, modules.get(unit, model), tensors)

    return fill


def open_state(
    model: nn.Module,
    layouts: Sequence[ChunkLayout],
    plan: Plan,
    optimizer: PiecewiseOptimizer,
    transport: "Transport | None",
    clip_grad_norm: float | None,
    original_dtypes: Mapping[str, torch.dtype],
    memory: Memory,
    run_name: str,
    fill: Fill | None,
    make: Callable[..., ModelState] = ModelState,
) -> tuple[ModelState, DiskTier | None]:
    """Put the model's state where the plan has its home. What was opened is closed where that fails.

    Args:
        make: the state, given as `ModelState` is.
    """
    optims = optim_layouts(layouts, plan, optimizer.slots, original_dtypes)
    extents = state_extents(layouts, plan, optims)
    rank = 0 if transport is None else transport.rank
    tier = open_tier(memory, run_name, rank, extents) if extents else None
    try:
        state = make(model, layouts, plan, optimizer, transport, clip_grad_norm, tier, optims, fill)
    except BaseException:
        if tier is not None:
            tier.close()
        raise
    return state, tier


def recompute_units(units: Sequence[Unit], plan: Plan) -> list[Recomputed]:
    """Wrap the units that are recomputed."""
    return [
        Recomputed(unit.module, unit.name).install()
        for index, unit in enumerate(units)
        if plan.activations_of(index) is Activations.RECOMPUTE
    ]


def open_moves(program: Program, state: ModelState, tier: DiskTier) -> MovingActivations:
    """Make room on disk for the activations that the program moves."""
    moves = {
        (action.index, action.micro_batch): str(action).split()[1]
        for action in program.actions(Kind.SAVE)
        if action.index is not None and action.micro_batch is not None
    }
    sizes = {buffer.name: buffer.num_bytes for buffer in program.buffers}
    tier.add_activations({name: sizes[name] for name in moves.values()})
    return MovingActivations(state, tier, moves)
