"""The chunks of one pipeline rank: the parameters that its stages use.

Owns who holds which parameter, and cutting a rank's part into chunks. A parameter that several ranks hold (an
embedding tied to the head) lies in a chunk apart, laid out alike on all of them, so that its gradients can be summed.
Does not own stages (`scheduler/pipeline_program.py`) nor layouts (`memory/chunk.py`).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..memory.chunk import ChunkLayout, layout_chunk
from .units import ROOT, Unit

__all__ = ["holders_of", "stage_chunks"]


def holders_of(
    model: nn.Module, used_by_stage: Sequence[frozenset[str]], placement: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """Every parameter -> the pipeline ranks whose stages use it; what none uses is with the first.

    Args:
        used_by_stage: names of parameters.
    """
    ranks: dict[str, set[int]] = {}
    for names, rank in zip(used_by_stage, placement, strict=True):
        for name in names:
            ranks.setdefault(name, set()).add(rank)
    return {name: tuple(sorted(ranks.get(name, {0}))) for name, _ in model.named_parameters()}


def stage_chunks(
    model: nn.Module,
    units: Sequence[Unit],
    holders: Mapping[str, tuple[int, ...]],
    rank: int,
    num_shards: int,
    compute_dtypes: Mapping[str, torch.dtype] | None = None,
) -> tuple[tuple[ChunkLayout, ...], dict[int, tuple[int, ...]]]:
    """The chunks of a rank, and, for those that others hold too, all ranks that do.

    Args:
        rank: in the pipeline.
        num_shards: ranks that share a stage's state.
        compute_dtypes: as in `assign_chunks`.
    """
    owner: dict[str, str] = {}
    for unit in units:
        for name, _ in unit.module.named_parameters(prefix=unit.name, remove_duplicate=False):
            owner[name] = unit.name
    groups: dict[tuple[str, torch.dtype, bool, tuple[int, ...]], list[tuple[str, torch.Tensor]]] = {}
    for name, parameter in model.named_parameters():
        if rank in holders[name]:
            dtype = (compute_dtypes or {}).get(name, parameter.dtype)
            key = (owner.get(name, ROOT), dtype, parameter.requires_grad, holders[name])
            groups.setdefault(key, []).append((name, parameter))
    order = {unit.name: position for position, unit in enumerate(units)} | {ROOT: -1}
    layouts: list[ChunkLayout] = []
    shared: dict[int, tuple[int, ...]] = {}
    for (unit, dtype, trainable, ranks), parameters in sorted(groups.items(), key=lambda item: order[item[0][0]]):
        if len(ranks) > 1:
            shared[len(layouts)] = ranks
        layouts.append(layout_chunk(len(layouts), unit, parameters, dtype, trainable, num_shards))
    return tuple(layouts), shared
