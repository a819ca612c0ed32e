"""Recomputed units: the bits of plain autograd, nothing updated twice, and a module that is as it was afterwards."""

import copy
import gc
import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import CASES
from saving import away_and_back
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from unit_runs import Home, UnitRuns, leaf, plain_bits, run, same

from outgrow.memory.activations import ActivationStore
from outgrow.runtime.recompute import Recomputed


class Counting(nn.Module):
    """Counts how often it runs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.runs = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.runs += 1
        return self.inner(*args, **kwargs)


# ---- models


@pytest.mark.parametrize("name", CASES)
def test_recomputed_units_have_the_bits_of_plain_autograd(name: str) -> None:
    for moves, together in ((False, False), (True, True)):
        plain = plain_bits(name, together=together)
        for policy in ("recompute", "recompute:selective"):
            assert plain.differ(UnitRuns(name, (policy,), moves=moves, together=together).step()) == [], policy


def test_parameters_that_move_between_forward_and_backward() -> None:
    """The same without a model around: the old place holds NaN when backward begins."""
    block = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.LayerNorm(32), nn.Dropout(0.3), nn.Linear(32, 8))
    x = leaf(4, 8)
    plain, _ = run(block, x)
    block.zero_grad()
    home = Home(block)
    torch.manual_seed(5)
    with Recomputed(block), home.hooks():
        output = block(x)
    home.move()
    (output**2).sum().backward()
    assert same([x.grad, *[parameter.grad for parameter in block.parameters()]], plain)


def test_a_weight_that_is_an_argument_is_found_where_it_lies_then() -> None:
    """Also deep in keyword arguments. Without this, a checkpoint would hold on to a dropped copy of the weight."""

    class Head(nn.Module):
        def forward(self, x: torch.Tensor, *, tied: dict[str, list[torch.Tensor]]) -> torch.Tensor:
            return F.linear(x, tied["weights"][0]).tanh() + F.linear(x, tied["weights"][1].t())

    table = nn.Embedding(8, 8)
    head = Head()
    x = leaf(4, 8)
    (head(x, tied={"weights": [table.weight, table.weight.t()]}) ** 2).sum().backward()
    expected, wanted = x.grad, table.weight.grad
    x.grad = table.weight.grad = None
    home = Home(table)
    with Recomputed(head), home.hooks():
        output = head(x, tied={"weights": [table.weight, table.weight.t()]})
    home.move()
    (output**2).sum().backward()
    assert torch.equal(x.grad, expected)
    assert torch.equal(table.weight.grad, wanted)


def test_what_a_recomputed_unit_holds_can_move_away_too() -> None:
    block = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    x = leaf(32, 64)
    plain, _ = run(block, x)
    block.zero_grad()
    store = ActivationStore()
    with Recomputed(block):
        inputs = x * 1
        with store.hooks(0, 0):
            output = block(inputs)
    assert store.bytes_needed(0, 0) == 32 * 64 * 4  # its input alone
    storage = StorageWeakRef(inputs.untyped_storage())
    away_and_back(store)
    loss = (output**2).sum()
    del inputs
    assert storage.expired()
    loss.backward()
    store.release(0, 0)
    assert same([x.grad, *[parameter.grad for parameter in block.parameters()]], plain)


# ---- memory and number of runs


def test_it_saves_nothing_but_its_inputs_and_runs_twice() -> None:
    block = Counting(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.Tanh()))
    storages: list[StorageWeakRef] = []
    for module in block.inner:
        module.register_forward_hook(lambda _m, _a, out: storages.append(StorageWeakRef(out.untyped_storage())))
    with Recomputed(block):
        output = block(leaf(32, 64))
    assert [storage.expired() for storage in storages] == [True, True, True, False]
    output.sum().backward()
    assert block.runs == 2
    gc.disable()
    try:
        del output
        assert all(storage.expired() for storage in storages)
    finally:
        gc.enable()


def test_what_was_recomputed_is_gone_when_backward_comes_to_the_unit_before() -> None:
    blocks = [nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.BatchNorm1d(256), nn.Linear(256, 64)) for _ in range(3)]
    storages: list[StorageWeakRef] = []
    alive: list[int] = []
    for block in blocks:
        Recomputed(block).install()
    gc.disable()  # going out of scope is enough
    try:
        x = torch.randn(32, 64)
        for block in blocks:
            x = block(x)
            x.register_hook(lambda _: alive.append(sum(not storage.expired() for storage in storages)))
        loss = x.sum()
        for block in blocks:
            block[1].register_forward_hook(
                lambda _m, _a, output: storages.append(StorageWeakRef(output.untyped_storage()))
            )
        loss.backward()
    finally:
        gc.enable()
    assert alive == [0, 0, 0]
    assert len(storages) == 3
    assert all(storage.expired() for storage in storages)


def test_without_gradients_it_passes_through() -> None:
    block = Counting(nn.Linear(4, 4))
    with Recomputed(block), torch.no_grad():
        block(leaf(2, 4))
    with Recomputed(block), torch.inference_mode():
        block.eval()(leaf(2, 4))
    assert block.runs == 2
    with Recomputed(block.to("meta")):
        assert block(torch.empty(2, 4, device="meta", requires_grad=True)).grad_fn is not None
    assert block.runs == 3


def test_evaluation_mode_with_gradients_is_recomputed_as_planned() -> None:
    """A frozen batch norm in training: the plan has counted on what recomputing saves."""
    block = Counting(nn.BatchNorm1d(4).eval())
    x = leaf(6, 4)
    plain, _ = run(block, x)
    with Recomputed(block):
        again, _ = run(block, x)
    assert block.runs == 3
    assert same(again, plain)


def test_inputs_that_need_no_gradient() -> None:
    block = Counting(nn.Embedding(9, 4))
    tokens = torch.arange(9)
    plain, _ = run(block, tokens)
    with Recomputed(block):
        again, _ = run(block, tokens)
    assert same(again, plain)


def test_a_frozen_unit_in_front_saves_nothing_and_runs_once() -> None:
    block = Counting(nn.Linear(300, 300).requires_grad_(False))
    x = torch.randn(5, 300)
    storage = StorageWeakRef(x.untyped_storage())
    with Recomputed(block):
        output = block(x)
    del x
    assert storage.expired()
    assert not output.requires_grad
    assert block.runs == 1


# ---- random numbers


def test_dropout_masks_are_the_same_and_later_random_numbers_are_not_touched() -> None:
    block = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 8), nn.Dropout(0.5))
    x = leaf(16, 8)
    plain, output = run(block, x)
    after = torch.get_rng_state()
    with Recomputed(block):
        again, recomputed = run(block, x)
    assert torch.equal(output, recomputed)
    assert same(again, plain)
    assert torch.equal(torch.get_rng_state(), after)


def test_a_hook_that_seeds_before_the_forward_is_not_run_again() -> None:
    block = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 8))
    seeds = iter((77, 78))
    block.register_forward_pre_hook(lambda *_: torch.manual_seed(next(seeds)) and None)
    x = leaf(16, 8)
    plain, _ = run(block, x)
    seeds = iter((77, 78))
    with Recomputed(block):
        again, _ = run(block, x)
    assert next(seeds) == 78
    assert same(again, plain)


# ---- arguments and results


def test_keyword_arguments_nested_results_and_other_values() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, pair: Any, *, scale: float, more: dict[str, Any], word: str = "no") -> dict[str, Any]:
            first, second = pair
            assert word == "yes"
            more["seen"].append(first.detach().sum())  # the caller's own list
            total = self.linear(first).tanh() * scale + more["third"].exp()
            return {"out": (total, [second * total]), "same": second, "word": word}

    module = Many()
    pair = (leaf(3, 4), leaf(3, 4, seed=2))

    def call() -> tuple[list[Any], Any, Any]:
        more = {"third": leaf(3, 4, seed=3), "seen": []}
        gradients, output = run(module, pair, scale=0.5, more=more, word="yes")
        return gradients, output, more["seen"]

    plain, output, seen = call()
    with Recomputed(module):
        again, recomputed, seen_again = call()
    assert same(again, plain)
    assert same(seen, seen_again)
    assert len(seen_again) == 1
    assert recomputed["same"] is pair[1]
    assert torch.equal(recomputed["out"][1][0], output["out"][1][0])


def test_a_unit_that_runs_several_times_in_one_forward() -> None:
    block = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.BatchNorm1d(8), nn.Tanh())

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(3):
                x = x + self.block(x)
            return x

    loop = Loop()
    state = copy.deepcopy(loop.state_dict())
    x = leaf(16, 8)
    plain, _ = run(loop, x)
    statistics = [buffer.clone() for buffer in loop.buffers()]
    loop.load_state_dict(state)
    with Recomputed(block):
        again, _ = run(loop, x)
    assert same(again, plain)
    assert same(list(loop.buffers()), statistics)


def test_a_checkpoint_in_the_model_and_units_in_units() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.GELU()) for _ in range(3)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = x + checkpoint(layer, x, use_reentrant=False)
            return x

    module = Inner()
    x = leaf(16, 8)
    plain, _ = run(module, x)
    with Recomputed(module), Recomputed(module.layers[1]):
        again, _ = run(module, x)
    assert same(again, plain)


# ---- the module


def test_forward_is_what_it_was() -> None:
    module = nn.Linear(4, 4)
    with Recomputed(module):
        assert "forward" in module.__dict__
        assert inspect.signature(module.forward) == inspect.signature(nn.Linear(4, 4).forward)
    assert "forward" not in module.__dict__
    assert module.forward.__func__ is nn.Linear.forward
    own = lambda x: x * 2  # noqa: E731
    module.forward = own
    handle = Recomputed(module).install()
    x = leaf(2, 4)
    assert torch.equal(module(x), x * 2)
    handle.remove()
    handle.remove()
    assert module.forward is own


def test_removed_before_backward() -> None:
    block = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.Tanh())
    x = leaf(16, 8)
    plain, _ = run(block, x)
    block.zero_grad()
    torch.manual_seed(5)
    with Recomputed(block):
        output = block(x)
    (output**2).sum().backward()
    assert same([x.grad, *[parameter.grad for parameter in block.parameters()]], plain)


def test_a_copy_of_a_recomputed_module_runs_its_own_forward() -> None:
    """The order of units is recorded on a copy whose tensors are on `meta`."""
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with Recomputed(module):
        twin = copy.deepcopy(module)
        twin.to("meta")
        assert twin(torch.empty(5, 4, device="meta")).is_meta
        with FakeTensorMode() as mode:
            twin._apply(lambda tensor: mode.from_tensor(torch.empty(tensor.shape, dtype=tensor.dtype)))
            twin(mode.from_tensor(torch.randn(5, 4))).sum().backward()
        other = copy.deepcopy(module)
        with torch.no_grad():
            other[0].weight.zero_()
            other[0].bias.zero_()
        other(leaf(5, 4)).sum().backward()
    assert torch.equal(other[1].running_mean, torch.zeros(4))
    assert other[1].num_batches_tracked == 1
    assert module[1].num_batches_tracked == 0
    assert module[0].weight.grad is None


def test_installed_twice_is_our_bug() -> None:
    module = nn.Linear(4, 4)
    with Recomputed(module), pytest.raises(AssertionError, match="Linear is recomputed already"):
        Recomputed(module).install()
