"""What the tests of the activation store share: buffers, and a function that saves what it is given."""

from typing import Any

import torch

from outgrow.memory.activations import ActivationStore
from outgrow.memory.direct_io import AlignedBuffer


def staging_of(num_bytes: int) -> torch.Tensor:
    return AlignedBuffer(num_bytes).tensor() if num_bytes else torch.empty(0, dtype=torch.uint8)


def away_and_back(store: ActivationStore, run: int = 0, part: int = 0) -> torch.Tensor:
    """SAVE into one buffer, LOAD from another; the first one is used for something else."""
    needed = store.bytes_needed(run, part)
    staging, other = staging_of(needed), staging_of(needed)
    assert store.save(run, part, staging) == needed
    other.copy_(staging)
    staging.fill_(255)
    store.load(run, part, other)
    return other


class Keeper(torch.autograd.Function):
    """Saves what it is given and notes what it gets back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seen: list[torch.Tensor], *saved: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*saved)
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        ctx.seen.extend(tensor.clone() if tensor.is_conj() else tensor for tensor in ctx.saved_tensors)
        assert all(not tensor.requires_grad for tensor in ctx.seen)
        return (*gradients, None, *[None] * len(ctx.saved_tensors))


def through(store: ActivationStore, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """What backward gets for tensors that were saved, after they were away and came back. Views of the buffer."""
    x = torch.zeros(2, requires_grad=True)
    seen: list[torch.Tensor] = []
    with store.hooks(0, 0):
        y = Keeper.apply(x, seen, *tensors)
    away_and_back(store)
    y.sum().backward()
    return seen
