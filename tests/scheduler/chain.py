"""A chain of equal layers whose bytes can be added up by hand, for ledgers."""

import torch
from torch import nn

from outgrow.parallel.units import find_units
from outgrow.scheduler.memory_profile import MemoryProfile, measure_memory

__all__ = ["DEPTH", "WEIGHT_BYTES", "WIDTH", "profile_of"]

WIDTH, DEPTH = 64, 6
WEIGHT_BYTES = 4 * WIDTH * WIDTH


def profile_of(samples: int) -> MemoryProfile:
    """Of a micro-batch of so many samples."""
    blocks = (nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh(), nn.Tanh()) for _ in range(DEPTH))
    model = nn.Sequential(*blocks)
    units = find_units(model, [str(number) for number in range(DEPTH)])
    batch = torch.empty(samples, WIDTH)
    return measure_memory(model, units, lambda m, x: m(x), lambda output, _: output.square().mean(), batch)
