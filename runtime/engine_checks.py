"""What an engine refuses before it moves anything.

Owns the checks of its arguments and of the budget. Does not own those of a run (`runtime/config.py`).
"""

from collections.abc import Sequence

import torch
from torch import nn

from ..memory.budget import Memory, format_bytes
from ..memory.chunk import ChunkLayout
from ..memory.errors import DoesNotFit
from ..parallel.units import named_trainable
from ..scheduler.plan import Plan
from .host_figures import process_bytes

__all__ = ["check_arguments", "check_fit"]


def check_arguments(model: nn.Module, micro_batches: int | str, clip_grad_norm: float | None) -> None:
    """Raise ValueError for arguments that cannot be, whatever the machine."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, it is {type(model).__name__}")
    if not named_trainable(model):
        raise ValueError(
            f"this {type(model).__name__} has no trainable parameter: every requires_grad is False, or none"
        )
    if isinstance(micro_batches, bool) or not isinstance(micro_batches, int) or micro_batches < 1:
        raise ValueError(f"micro_batches={micro_batches!r}: a positive number, or 'auto'")
    if clip_grad_norm is not None and not clip_grad_norm > 0:
        raise ValueError(f"clip_grad_norm={clip_grad_norm!r}: a positive number, or None")
    places: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        if parameter.numel() and parameter.device.type != "meta":
            other = places.setdefault(parameter.untyped_storage().data_ptr(), name)
            if other != name and parameter.data_ptr() == dict(model.named_parameters())[other].data_ptr():
                raise ValueError(
                    f"the parameters {other} and {name} are two objects on the same memory; tie weights by assigning "
                    "the same Parameter to both modules"
                )


def check_fit(model: nn.Module, layouts: Sequence[ChunkLayout], plan: Plan, memory: Memory) -> bool:
    """Raise DoesNotFit where state alone, without activations, exceeds the budget and there is no disk for it; else
    whether the budget is ample: whether all the state and the process take at most half of it."""
    budget = memory.host_bytes
    if budget is None:
        return True
    ranks, needed = plan.world_size, 0
    for layout, decision in zip(layouts, plan.chunks, strict=True):
        elems = layout.num_elems
        needed += layout.num_bytes // (ranks if decision.parameters_sharded else 1)
        if layout.trainable:
            shards = ranks if decision.optimizer_sharded else 1
            needed += elems * 4 // (ranks if decision.gradients_sharded else 1)
            needed += 8 * elems // shards + (4 * elems // shards if layout.dtype is not torch.float32 else 0)
    base = process_bytes(list(model.parameters()))
    if base + needed > budget and memory.disk is None:
        raise DoesNotFit(
            f"the model's state needs {format_bytes(needed)} on each rank (zero={plan.zero}, {ranks} "
            f"ranks, two optimizer slots) beside {format_bytes(base)} of the process itself; the host budget is "
            f"{format_bytes(budget)}, so {format_bytes(base + needed - budget)} are missing before any activation. "
            f"Give a disk (Memory(disk='/a/folder')), more memory, more workers with zero=3, or a smaller model."
        )
    return base + needed <= budget / 2
