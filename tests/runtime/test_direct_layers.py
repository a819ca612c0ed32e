import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from outgrow.runtime.direct_layers import DirectLayers
from outgrow.runtime.split_backward import Deferred, run_backward


class Small(nn.Module):
    """Tokens to logits; notes how many function modes look at its functions."""

    def __init__(self, head: Callable[["Small", torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4, padding_idx=1)
        self.inner = nn.Linear(4, 4)
        self.head = head
        self.modes: list[int] = []

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.modes.append(torch._C._len_torch_function_stack())
        return self.head(self, self.inner(self.embed(tokens)))


def again(model: Small, x: torch.Tensor) -> torch.Tensor:
    return checkpoint(model.inner, x, use_reentrant=False)


def tied(model: Small, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, model.embed.weight)


@pytest.mark.parametrize(("head", "modes", "each"), [(again, [1, 0, 0], 3), (tied, [1, 1, 1], 3)])
def test_layers_defer_and_only_other_code_needs_a_mode(head: Callable[..., torch.Tensor], modes: list[int], each: int):
    torch.manual_seed(0)
    model = Small(head)
    plain = copy.deepcopy(model)
    layers, tokens = DirectLayers(model), torch.tensor([[0, 1, 4], [2, 2, 3]])
    layers.install()
    for _ in range(3):
        deferred = Deferred()
        with layers.deferring(deferred, "this stage"):
            out = model(tokens)
        with layers.deferring(deferred, "this stage"):
            run_backward([out], [torch.ones_like(out)])
        assert len(deferred) == each  # nothing of it was added by autograd
        deferred.finish()
        out = plain(tokens)
        out.backward(torch.ones_like(out))
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-6)
    assert model.modes == modes


def test_without_deferral_and_after_it_layers_are_their_own():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    layers, x = DirectLayers(model), torch.ones(2, 3)
    layers.install()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.zero_()
    deferred = Deferred()
    with layers.deferring(deferred):
        assert not torch.equal(model(x), other(x))  # a copy computes with its own weights
        with torch.no_grad():
            assert model(x).grad_fn is None
    out = model(x)
    out.sum().backward()
    assert len(deferred) == 0
    assert model[0].weight.grad is not None
    layers.remove()
    layers.remove()
    assert all("forward" not in module.__dict__ for module in model.modules())
