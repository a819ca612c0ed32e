"""The activation store: what autograd saved goes away and comes back, bit for bit, or says why not."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from saving import away_and_back, staging_of
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from outgrow.memory.activations import ActivationStatistics, ActivationStore
from outgrow.memory.errors import DoesNotFit, OutgrowError


def test_originals_are_gone_after_save_and_the_copies_after_release() -> None:
    block = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 64), nn.Tanh())
    store = ActivationStore()
    storages: list[StorageWeakRef] = []

    def note(tensor: torch.Tensor) -> None:
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            storages.append(StorageWeakRef(tensor.untyped_storage()))

    watching = ActivationStore(elsewhere=note)
    for owner in (store, watching):
        with owner.hooks(0, 0):
            y = block(torch.randn(32, 64))
        if owner is store:
            # input, after linear, after GELU, after norm, the output; mean and deviation are small
            assert store.bytes_needed(0, 0) == 32 * (64 + 3 * 256 + 64) * 4
            assert store.statistics() == ActivationStatistics(1, 32 * (64 + 3 * 256 + 64) * 4, 0, 0)
    y = y.sum()
    alive = [storage for storage in storages if not storage.expired()]
    large = 5  # the same five
    assert len({storage.cdata for storage in alive}) == large + 2
    staging = staging_of(watching.bytes_needed(0, 0))
    watching.save(0, 0, staging)
    assert len({storage.cdata for storage in alive if not storage.expired()}) == 2
    assert watching.statistics().open_bytes == 0
    assert watching.statistics().away_bytes == staging.numel()
    watching.load(0, 0, staging)
    assert watching.statistics().here_bytes == staging.numel()
    y.backward()
    watching.release(0, 0)
    assert watching.statistics() == ActivationStatistics(0, 0, 0, 0)


def test_a_graph_that_is_dropped_takes_its_tensors_along() -> None:
    gc.disable()  # no cycles: going out of scope is enough
    try:
        store = ActivationStore()
        with store.hooks(0, 0):
            y = torch.randn(1000, requires_grad=True).exp().tanh()
        storage = StorageWeakRef(y.untyped_storage())
        assert store.bytes_needed(0, 0) == 4032 + 4000
        del y
        assert storage.expired()
        assert store.bytes_needed(0, 0) == 0
    finally:
        gc.enable()


# ---- in-place changes


def test_a_change_before_save_is_noticed_in_backward_as_autograd_does() -> None:
    x = torch.randn(1000, requires_grad=True)
    y = x.exp()
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation") as plain:
        y.sum().backward()
    store = ActivationStore()
    with store.hooks(0, 0):
        y = x.exp()
        y.add_(1)
    away_and_back(store)
    with pytest.raises(
        RuntimeError, match=r"modified by an inplace operation.*is at version 1; expected version 0"
    ) as ours:
        y.sum().backward()
    assert type(ours.value) is type(plain.value)


@pytest.mark.parametrize("when", ["open", "away", "here"])
def test_a_change_at_any_time_is_noticed(when: str) -> None:
    store = ActivationStore()
    with store.hooks(0, 0):
        y = torch.randn(1000, requires_grad=True).tanh()
    if when == "open":
        y.mul_(2)
    else:
        staging = staging_of(store.bytes_needed(0, 0))
        store.save(0, 0, staging)
        if when == "away":
            y.mul_(2)
        store.load(0, 0, staging)
        if when == "here":
            y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_change_of_what_stays_is_noticed_too() -> None:
    store = ActivationStore()
    with store.hooks(0, 0):
        y = torch.randn(4, requires_grad=True).tanh()
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_change_before_the_tensor_was_saved_and_one_of_its_copy_do_no_harm() -> None:
    store = ActivationStore()
    x = torch.randn(1000, requires_grad=True)
    with store.hooks(0, 0):
        y = (x * 1).mul_(2).tanh_()
    (expected,) = torch.autograd.grad((x * 1).mul_(2).tanh_().sum(), x)
    away_and_back(store)
    y.detach().clone().zero_()
    y.sum().backward()
    assert torch.equal(x.grad, expected)


# ---- autograd


def test_two_backward_passes_find_the_same() -> None:
    store = ActivationStore()
    x = torch.randn(1000, requires_grad=True)
    with store.hooks(0, 0):
        y = x.exp().tanh().sum()
    away_and_back(store)
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (second,) = torch.autograd.grad(y, x)
    (plain,) = torch.autograd.grad(x.exp().tanh().sum(), x)
    assert torch.equal(first, plain)
    assert torch.equal(second, plain)


def test_a_gradient_of_a_gradient() -> None:
    """Within the unit (a gradient penalty) and from outside."""

    def penalty(x: torch.Tensor) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(x.tanh().exp().sum(), x, create_graph=True)
        return (gradient**2).sum()

    x = torch.randn(1000, requires_grad=True)
    (plain,) = torch.autograd.grad(penalty(x), x)
    store = ActivationStore()
    with store.hooks(0, 0):
        y = penalty(x)
    away_and_back(store)
    (ours,) = torch.autograd.grad(y, x)
    assert torch.equal(ours, plain)


def test_an_output_and_an_input_that_live_on() -> None:
    store = ActivationStore()
    x = torch.randn(1000, requires_grad=True)
    middle = x * 3
    with store.hooks(0, 0):
        y = middle.tanh()
    with store.hooks(1, 0):
        z = y.exp()
    kept = y.detach().clone()
    away_and_back(store, 1, 0)
    away_and_back(store, 0, 0)
    assert torch.equal(y, kept)
    ((z + y) * middle).sum().backward()
    again = x.detach().clone().requires_grad_()
    middle = again * 3
    y = middle.tanh()
    ((y.exp() + y) * middle).sum().backward()
    assert torch.equal(x.grad, again.grad)
    store.release(1, 0)
    store.release(0, 0)


def test_addresses_that_are_used_again_are_not_mixed_up() -> None:
    store = ActivationStore()
    x = torch.randn(1000, requires_grad=True)
    with store.hooks(0, 0):
        total = x.new_zeros(())
        for factor in range(50):  # intermediate results that nobody saved are freed, and their memory is used again
            total = total + (x * factor + 1 - 1).tanh().sum()
    assert store.bytes_needed(0, 0) == 50 * (4000 + 32) - 32
    away_and_back(store)
    total.backward()
    again = x.detach().clone().requires_grad_()
    sum((again * factor + 1 - 1).tanh().sum() for factor in range(50)).backward()
    assert torch.equal(x.grad, again.grad)


def test_a_checkpoint_inside_of_a_unit_has_its_inputs_moved() -> None:
    layers = nn.ModuleList([nn.Linear(40, 40) for _ in range(3)])

    def forward(x: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            x = torch.utils.checkpoint.checkpoint(lambda x, layer=layer: layer(x).tanh().exp(), x, use_reentrant=False)
        return x

    x = torch.randn(30, 40, requires_grad=True)
    forward(x).sum().backward()
    plain = [x.grad, *[parameter.grad for parameter in layers.parameters()]]
    for tensor in (x, *layers.parameters()):
        tensor.grad = None
    store = ActivationStore()
    with store.hooks(0, 0):
        y = forward(x).sum()
    assert store.bytes_needed(0, 0) == 2 * 30 * 40 * 4  # x is a leaf; sum saves nothing
    away_and_back(store)
    y.backward()
    store.release(0, 0)
    ours = [x.grad, *[parameter.grad for parameter in layers.parameters()]]
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))


def test_backward_in_another_thread_than_forward_and_moves() -> None:
    store = ActivationStore()
    x = torch.randn(1000, requires_grad=True)
    with store.hooks(0, 0):
        y = x.exp().tanh().sum()
    for work in (lambda: away_and_back(store), y.backward):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    store.release(0, 0)
    (plain,) = torch.autograd.grad(x.exp().tanh().sum(), x)
    assert torch.equal(x.grad, plain)


def test_a_lane_saves_and_loads_while_others_compute() -> None:
    """SAVE of a unit runs beside the forwards that follow, LOAD beside the backwards before."""

    def unit(x: torch.Tensor) -> torch.Tensor:
        return x + (x * 1.5).sin().exp().tanh()

    x = torch.randn(200, 100, requires_grad=True)
    plain = y = x
    for _ in range(40):
        plain = unit(plain)
    plain.sum().backward()
    expected, x.grad = x.grad, None

    store = ActivationStore()
    away: list[torch.Tensor] = []
    outputs = []

    def save(run: int) -> None:
        staging = staging_of(store.bytes_needed(run, 0))
        store.save(run, 0, staging)
        away.append(staging)

    with ThreadPoolExecutor(1) as lane:
        saves = []
        for run in range(40):
            y = y.detach().requires_grad_() if run else x
            with store.hooks(run, 0):
                out = unit(y)
            outputs.append((y, out))
            saves.append(lane.submit(save, run))
            y = out
        loads = [lane.submit(lambda run=run: store.load(run, 0, away[run])) for run in reversed(range(40))]
        gradient = torch.ones_like(y)
        for run, future in zip(reversed(range(40)), loads, strict=True):
            future.result()
            start, out = outputs.pop()
            out.backward(gradient)
            gradient = start.grad
            store.release(run, 0)
        assert all(future.result() is None for future in saves)
    assert torch.equal(x.grad, expected)
    assert store.statistics() == ActivationStatistics(0, 0, 0, 0)


# ---- mistakes


def test_a_buffer_that_is_too_small_changes_nothing() -> None:
    store = ActivationStore()
    x = torch.randn(1000, requires_grad=True)
    with store.hooks(7, 2):
        y = x.tanh()
    with pytest.raises(
        DoesNotFit, match=r"SAVE a7\.2: .*unit run 7 .*micro-batch 2 has 4,000 bytes.* 3,999, 1 too few"
    ):
        store.save(7, 2, staging_of(3999))
    assert store.save(7, 2, staging_of(4000)) == 4000
    del y


def test_backward_before_load_and_after_release_are_our_bugs() -> None:
    store = ActivationStore()
    x = torch.randn(1000, requires_grad=True)
    with store.hooks(7, 0):
        y = x.tanh().sum()
    staging = staging_of(4000)
    store.save(7, 0, staging)
    with pytest.raises(AssertionError, match=r"backward needs a7\.0 before LOAD a7\.0"):
        y.backward(retain_graph=True)
    store.load(7, 0, staging)
    y.backward(retain_graph=True)
    store.release(7, 0)
    with pytest.raises(AssertionError, match=r"a7\.0, which was released"):
        y.backward()


def test_actions_out_of_order_are_our_bugs() -> None:
    store = ActivationStore()
    x = torch.randn(1000, requires_grad=True)
    assert not store.holds(0, 0)
    with pytest.raises(AssertionError, match=r"no a0\.0"):
        store.save(0, 0, staging_of(64))
    with store.hooks(0, 0):
        y = x.tanh()
    with pytest.raises(AssertionError, match=r"a0\.0 was not released"):
        store.hooks(0, 0)
    with pytest.raises(AssertionError, match=r"LOAD a0\.0"):
        store.load(0, 0, staging_of(4000))
    store.save(0, 0, staging_of(4000))
    with pytest.raises(AssertionError, match=r"SAVE a0\.0"):
        store.save(0, 0, staging_of(4000))
    with pytest.raises(AssertionError, match=r"LOAD a0\.0: 100 of 4000 bytes"):
        store.load(0, 0, staging_of(100))
    assert store.holds(0, 0)
    store.release(0, 0)
    assert not store.holds(0, 0)
    with pytest.raises(AssertionError, match=r"no a0\.0"):
        store.release(0, 0)
    del y


@pytest.mark.parametrize(
    "buffer",
    [torch.zeros(64), torch.zeros(8, 8, dtype=torch.uint8), torch.zeros(99, dtype=torch.uint8)[1:],
     torch.zeros(99, dtype=torch.uint8)[::2]],
)  # fmt: skip
def test_buffers_are_flat_aligned_bytes(buffer: torch.Tensor) -> None:
    store = ActivationStore()
    with store.hooks(0, 0), pytest.raises(AssertionError, match="a staging buffer"):
        store.save(0, 0, buffer)


def test_a_gradient_that_is_a_saved_tensor_is_noticed_before_its_memory_changes() -> None:
    class GradientInForward(torch.autograd.Function):
        """As some fused losses do it: forward computes the gradient, backward returns what forward saved."""

        @staticmethod
        def forward(ctx: Any, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x * 2)
            return (weight * x * 2).sum()

        @staticmethod
        def backward(ctx: Any, *_: torch.Tensor) -> Any:
            return ctx.saved_tensors[0], None

    weight = torch.randn(1000, requires_grad=True)
    x = torch.randn(1000)
    store = ActivationStore()
    with store.hooks(7, 0):
        y = GradientInForward.apply(weight, x)
    away_and_back(store, 7, 0)
    y.backward()
    with pytest.raises(OutgrowError, match=r"unit run 7 on micro-batch 0.*a7\.0.*returns a saved tensor as a gradient"):
        store.release(7, 0)
    assert torch.equal(weight.grad, x * 2)


def test_clear_forgets_everything_after_a_failed_step() -> None:
    store = ActivationStore()
    x = torch.randn(1000, requires_grad=True)
    outputs = []
    for run in range(3):
        with store.hooks(run, 0):
            outputs.append(x.tanh())
    away_and_back(store, 1)
    store.save(2, 0, staging_of(4000))
    store.clear()
    assert store.statistics() == ActivationStatistics(0, 0, 0, 0)
    with store.hooks(0, 0):
        y = x.tanh()
    assert store.bytes_needed(0, 0) == 4000
    del y
