"""Which dtype the model computes with, and what keeps its own.

Owns the rules of `precision="float32"` (everything as the model has it) and `precision="bf16"`: floating parameters and
inputs in bfloat16, masters, gradients' sums and optimizer slots in float32, outputs in float32 for the loss. Modules
that keep running statistics (BatchNorm) stay in float32: their averages would stop moving in bfloat16's 8 bits.
"""

from collections.abc import Iterator

import torch
from torch import nn

__all__ = ["PRECISIONS", "cast_buffers", "compute_dtypes"]

PRECISIONS = ("float32", "bf16")


def compute_dtypes(model: nn.Module, precision: str) -> dict[str, torch.dtype]:
    """Parameter name -> dtype to compute with, for the parameters whose dtype changes.

    Raises:
        ValueError: a precision that does not exist.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}: there is {' and '.join(map(repr, PRECISIONS))}")
    if precision == "float32":
        return {}
    kept = {id(p) for module in _statistics_modules(model) for p in module.parameters(recurse=False)}
    return {
        name: torch.bfloat16
        for name, parameter in model.named_parameters()
        if parameter.dtype is torch.float32 and id(parameter) not in kept
    }


def cast_buffers(model: nn.Module, precision: str) -> None:
    """Give floating buffers the compute dtype, those of modules with running statistics excepted."""
    if precision == "float32":
        return
    kept = {id(b) for module in _statistics_modules(model) for b in module.buffers(recurse=False)}
    for buffer in model.buffers():
        if buffer.dtype is torch.float32 and id(buffer) not in kept:
            buffer.data = buffer.data.to(torch.bfloat16)


def _statistics_modules(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if any(name.startswith("running_") for name, _ in module.named_buffers(recurse=False)):
            yield module
