"""Memory that kernels take for themselves while they run, which no tensor shows."""

from typing import Any

import torch

__all__ = ["workspace_bytes"]


def workspace_bytes(operator: Any, arguments: Any, results: list[torch.Tensor]) -> int:
    return 0
