"""Small models of different makes, for benchmarks that compare plans: each takes well under a second a step.

Owns the models, their data and their losses. Does not own what is planned or measured (`member_plans.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .models import GPTConfig, build_gpt, random_batches, token_loss

__all__ = ["ZOO", "Exhibit"]


@dataclass(frozen=True)
class Exhibit:
    """A model with what it is trained on.

    Attributes:
        build: the same weights at every call.
        batch: step -> the global batch, inputs and targets.
        loss: f(output, targets).
    """

    build: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, Tensor]]
    loss: Callable[[Any, Any], Tensor]


def _gpt(config: GPTConfig) -> Exhibit:
    return Exhibit(lambda: build_gpt(config), random_batches(config), token_loss)


def _seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make()

    return build


def _pairs(inputs: tuple[int, ...], targets: tuple[int, ...]) -> Callable[[int], tuple[Tensor, Tensor]]:
    def batch(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1234 + step)
        return torch.randn(inputs, generator=generator), torch.randn(targets, generator=generator)

    return batch


def _mlp() -> nn.Module:
    """Twelve wide layers: much state, few activations, nothing but matrix products."""
    return nn.Sequential(*(nn.Sequential(nn.Linear(1280, 1280), nn.GELU()) for _ in range(12)), nn.Linear(1280, 64))


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(8, width)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.norm(self.first(x))))


class _ConvNet(nn.Module):
    """Residual convolutions: little state, large activations."""

    def __init__(self, width: int = 96, depth: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(_Residual(width) for _ in range(depth))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=(2, 3)))


ZOO: dict[str, Exhibit] = {
    "gpt": _gpt(GPTConfig(num_blocks=8, width=384, num_heads=6, num_tokens=4096, length=128, batch_size=8)),
    "wide vocabulary": _gpt(GPTConfig(num_blocks=3, width=384, num_heads=6, num_tokens=24000, length=64, batch_size=8)),
    "mlp": Exhibit(_seeded(_mlp), _pairs((512, 1280), (512, 64)), F.mse_loss),
    "convolutions": Exhibit(_seeded(_ConvNet), _pairs((16, 3, 48, 48), (16, 10)), F.mse_loss),
}
