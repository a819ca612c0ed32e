"""Opening what a plan needs: the disk tier, the model's state in its homes, units that recompute or move activations.

Owns these steps between a plan and the first action. Does not own the plan (`planning.py`) nor the parts themselves.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..memory.budget import Memory
from ..memory.chunk import ChunkLayout
from ..memory.tiers import Tiers
from ..parallel.actions import Kind
from ..parallel.units import Unit
from ..scheduler.plan import Activations, Plan
from ..scheduler.program import Lane, Program
from ..scheduler.twin import Shapes
from .adopting import Fill
from .disk_tier import DiskTier
from .model_state import ModelState
from .moving import MovingActivations
from .offload import optim_layouts, state_extents
from .optimizer import PiecewiseOptimizer
from .recompute import Recomputed

if TYPE_CHECKING:
    from ..parallel.collectives import Transport
    from ..parallel.mail import Mail
    from ..parallel.mesh import Mesh
    from .filling import Filler
    from .passage import Passage
    from .pipeline_words import PipelineWords
    from .pipelining import Pipeline

__all__ = [
    "fill_with",
    "lay_out",
    "open_mail",
    "open_moves",
    "open_pipeline",
    "open_state",
    "open_tier",
    "recompute_units",
]


def open_tier(
    memory: Memory, run_name: str, rank: int, extents: dict[str, int], tiers: Tiers | None = None
) -> DiskTier:
    """The disk tier in the folder of `memory`. Raises as `DiskTier`."""
    folder = memory.disk_folder
    assert folder is not None
    host = None if tiers is None else tiers.host
    return DiskTier(folder, run_name, rank, extents, memory.disk_limit_bytes, host=host)


def open_pipeline(
    words: "PipelineWords",
    mesh: "Mesh",
    transport: str | None,
    model: nn.Module,
    units: Sequence[Unit],
    passage: "Passage",
    shapes: Shapes,
) -> "Pipeline | None":
    """What a rank of a pipeline has beside other engines; None where there is none."""
    if words.num_ranks == 1:
        return None
    from .pipelining import Pipeline

    return Pipeline(words, mesh, open_mail(mesh, transport), model, units, passage, shapes)


def open_mail(mesh: "Mesh", transport: str | None) -> "Mail":
    """The mail of this rank's pipeline. Collective.

    Raises:
        ValueError: shared memory was asked for where ranks cannot share it.
    """
    from ..parallel.mail import SharedMail
    from ..parallel.message_mail import MessageMail

    assert mesh.pipeline_group is not None
    if transport == "gloo":
        return MessageMail(mesh.pipeline_group)
    try:
        return SharedMail(mesh.pipeline_group)
    except OSError as error:
        if transport is not None:
            raise ValueError(f"transport={transport!r}: {error}; use transport='gloo'") from None
        return MessageMail(mesh.pipeline_group)


def lay_out(program: Program, tier: DiskTier | None, tiers: Tiers | None, takes_pages: bool = False) -> None:
    """Make the arenas that a program's buffers lie in.

    Args:
        takes_pages: where there is one memory, not from their first uses on but at once.
    """
    if tiers is not None:
        tiers.host.lay_out(program.places("host"))
        tiers.device.lay_out(program.places("device"))
    elif tier is not None:
        tier.lay_out(program, takes_pages)


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
    tiers: Tiers | None = None,
    rank: int = 0,
) -> tuple[ModelState, DiskTier | None]:
    """Put the model's state where the plan has its home. What was opened is closed where that fails.

    Args:
        rank: among all ranks, for the names of files.
        make: the state, given as `ModelState` is.
    """
    optims = optim_layouts(layouts, plan, optimizer.slots, original_dtypes)
    extents = state_extents(layouts, plan, optims)
    if tiers is not None:
        _move_buffers(model, tiers.device.device)
    tier = open_tier(memory, run_name, rank, extents, tiers) if extents else None
    try:
        state = make(model, layouts, plan, optimizer, transport, clip_grad_norm, tier, optims, fill, tiers)
    except BaseException:
        if tier is not None:
            tier.close()
        raise
    return state, tier


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    """A model's buffers (running statistics) to where its units compute; shared ones stay shared."""
    moved: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                module._buffers[name] = moved.setdefault(id(buffer), buffer.to(device))


def recompute_units(units: Sequence[Unit], plan: Plan) -> list[Recomputed]:
    """Wrap the units that are recomputed."""
    return [
        Recomputed(unit.module, unit.name, plan.activations_of(index) is Activations.SELECTIVE).install()
        for index, unit in enumerate(units)
        if plan.activations_of(index).is_recomputed
    ]


def open_moves(
    program: Program,
    state: ModelState,
    tier: DiskTier | None,
    tiers: Tiers | None = None,
    shown: Callable[[torch.Tensor], object] | None = None,
) -> MovingActivations:
    """Make room for the activations that the program moves, those on the lane `write` on disk.

    Args:
        shown: as in `MovingActivations`.
    """
    on_disk = {i.action.index for i in program.instructions if i.action.kind is Kind.SAVE and i.lane is Lane.WRITE}
    moves = {
        (action.index, action.micro_batch): str(action).split()[1]
        for action in program.actions(Kind.SAVE)
        if action.index is not None and action.micro_batch is not None
    }
    sizes = {buffer.name: buffer.num_bytes for buffer in program.buffers}
    if tier is not None:
        tier.add_activations({name: sizes[name] for (run, _), name in moves.items() if run in on_disk})
    return MovingActivations(state, moves, tier, {run for run, _ in moves} & on_disk, tiers, shown)
