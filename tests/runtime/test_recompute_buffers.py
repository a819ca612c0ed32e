"""Buffers of recomputed units: updated once, and seen by the recomputation as the forward saw them."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from unit_runs import leaf, same

from outgrow.memory.errors import OutgrowError
from outgrow.runtime.recompute import Recomputed


class PowerIteration(nn.Module):
    """A buffer that the forward changes and computes with, as spectral norm has it; another it replaces; a shared
    one; none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6, generator=torch.Generator().manual_seed(2)))
        self.register_buffer("u", torch.ones(6))
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("nothing", None)
        self.inner = nn.Module()
        self.inner.register_buffer("u", self.u)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.u.copy_(F.normalize(self.weight @ self.inner.u, dim=0))
            self.mean = 0.9 * self.mean + 0.1 * x.mean(dim=0)
            self.calls += 1
        u, calls = self.u.clone(), self.calls.clone()
        return torch.tanh(x * u - self.mean) @ (self.weight / (u @ self.weight @ u)) * calls


@pytest.mark.parametrize(
    "build", [lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh()), PowerIteration]
)
@pytest.mark.parametrize("parts", [1, 3])
def test_buffers_are_updated_once_and_recomputation_sees_them_as_the_forward_did(build: Any, parts: int) -> None:
    """Three forwards before the three backwards: each recomputation has buffers of its own time."""

    def step(module: nn.Module) -> list[Any]:
        losses = [(module(leaf(5, 6, seed=part)) ** 2).sum() for part in range(parts)]
        for loss in reversed(losses):
            loss.backward()
        return [*losses, *[parameter.grad for parameter in module.parameters()], *module.buffers()]

    torch.manual_seed(0)
    module = build()
    twin = copy.deepcopy(module)
    plain = step(module)
    if isinstance(twin, PowerIteration):
        assert twin.inner.u is twin.u
    objects = [buffer for name, buffer in twin.named_buffers() if name != "mean"]
    with Recomputed(twin):
        again = step(twin)
    assert same([torch.as_tensor(value) for value in again], [torch.as_tensor(value) for value in plain])
    assert all(a is b for a, b in zip(objects, [b for n, b in twin.named_buffers() if n != "mean"], strict=True))
    assert list(dict(module.named_buffers())) == list(dict(twin.named_buffers()))


def test_backward_twice_sees_the_same_buffers_twice() -> None:
    module = PowerIteration()
    x = leaf(5, 6)
    with Recomputed(module):
        loss = (module(x) ** 2).sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)
    assert module.calls == 1


def test_large_buffers_that_never_change_are_not_copied() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.ones(600, 600))
            self.changes = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.changes:
                self.mask.mul_(1)
            if x.shape[0] == 1:
                raise KeyError("mine")
            return torch.tanh(x @ self.mask)

    module = Masked()
    clones = 0

    class CountClones(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal clones
            clones += func is torch.ops.aten.clone.default
            return func(*args, **(kwargs or {}))

    with Recomputed(module, "attention"), CountClones():
        for _ in range(3):
            (module(leaf(2, 600)) ** 2).sum().backward()
        assert clones == 1  # the first forward looks
        waits = (module(leaf(2, 600)) ** 2).sum()
        module.changes = True
        with pytest.raises(OutgrowError, match=r"attention changed its buffer mask \(1,440,000 bytes\)"):
            module(leaf(2, 600))
        with pytest.raises(KeyError, match="mine"):
            module(leaf(1, 600))
        with pytest.raises(OutgrowError, match="attention cannot be recomputed: its buffer mask was changed between"):
            waits.backward()


def test_a_failing_forward_leaves_buffers_and_module_usable() -> None:
    class Fails(nn.BatchNorm1d):
        fails = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.fails:
                raise KeyError("mine")
            return super().forward(x)

    module = Fails(4)
    x = leaf(6, 4)
    with Recomputed(module):
        with pytest.raises(KeyError, match="mine"):
            module(x)
        module.fails = False
        loss = module(x).sum()
        module.fails = True
        with pytest.raises(KeyError, match="mine"):
            loss.backward()
    assert module.num_batches_tracked == 1
    module.fails = False
    module(x)
    assert module.num_batches_tracked == 2
