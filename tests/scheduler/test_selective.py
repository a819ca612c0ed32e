"""What selective recomputation keeps, what it runs again, and the bytes that this is said to take."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import Block
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from outgrow.parallel.units import find_units
from outgrow.runtime.recompute import Recomputed
from outgrow.scheduler.memory_levels import Keeping, levels_under
from outgrow.scheduler.memory_profile import measure_memory
from outgrow.scheduler.selective import is_kept, selective_contexts

aten = torch.ops.aten


class Operators(TorchDispatchMode):
    """Counts what really runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not aten.detach.default:  # what is kept is detached
            self.counts[func.overloadpacket._qualified_op_name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def gradients(function: Callable[..., torch.Tensor], *inputs: torch.Tensor, context_fn: Any = None) -> list[Any]:
    torch.manual_seed(3)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    if context_fn is None:
        output = function(*leaves)
    else:
        output = checkpoint(function, *leaves, use_reentrant=False, context_fn=context_fn)
    (output**2).sum().backward()
    return [leaf.grad for leaf in leaves]


def same_bits(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> None:
    plain = gradients(function, *inputs)
    again = gradients(function, *inputs, context_fn=selective_contexts)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


X, W = torch.linspace(-1, 1, 32 * 16).view(32, 16), torch.linspace(1, -1, 16 * 16).view(16, 16)


def test_products_and_attention_run_once_and_the_rest_twice() -> None:
    block, x = Block(16, 2, 0.0), torch.ones(2, 8, 16, requires_grad=True)
    found = {}
    for mode in ("keep", "whole", "selective"):
        with Operators() as operators:
            if mode == "keep":
                output = block(x)
            else:
                with Recomputed(block, is_selective=mode == "selective"):
                    output = block(x)
            forward = Counter(operators.counts)
            output.sum().backward()
        found[mode] = forward, operators.counts - forward
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert found["keep"][0] == found["selective"][0], "a forward runs as it is"
    products = ("addmm", "mm", attention)
    ran = {mode: [counts[1][name] for name in products] for mode, counts in found.items()}
    assert ran["whole"][0] > ran["keep"][0] == 0
    assert ran["whole"][2] == 1
    assert ran["selective"] == ran["keep"], "a backward has products of its own, and no others"
    assert found["selective"][1]["gelu"] == found["whole"][1]["gelu"] == 1
    assert found["selective"][1]["native_layer_norm"] == 2


def test_an_output_that_is_changed_in_place_is_made_again() -> None:
    same_bits(lambda x, w: torch.relu_(x @ w).sin(), X, W)
    same_bits(lambda x, w: ((x @ w).mul_(2) @ w).exp_().sin(), X, W)


def test_an_output_that_is_changed_after_the_unit_is_made_again() -> None:
    def changed_later(context_fn: Any) -> Any:
        x = X.clone().requires_grad_()

        def unit(x: torch.Tensor) -> torch.Tensor:
            inner = x @ W
            unit.output = inner  # pyright: ignore[reportFunctionMemberAccess]
            return inner.sin()

        output = checkpoint(unit, x, use_reentrant=False, context_fn=context_fn) if context_fn else unit(x)
        if context_fn:
            with torch.no_grad():
                unit.output.zero_()  # pyright: ignore[reportFunctionMemberAccess]
        (output**2).sum().backward()
        return x.grad

    assert torch.equal(changed_later(selective_contexts), changed_later(None))


def test_a_second_backward_finds_what_it_needs() -> None:
    x = X.clone().requires_grad_()
    output = checkpoint(lambda x: (x @ W).sin() @ W, x, use_reentrant=False, context_fn=selective_contexts)
    loss = (output**2).sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, x)[0])


def test_random_numbers_after_attention_that_drops_weights_are_the_same() -> None:
    def function(q: torch.Tensor) -> torch.Tensor:
        heads = q.view(1, 2, 16, 16)
        return F.dropout(F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.3).sin(), 0.5)

    same_bits(function, X)
    operator = aten._scaled_dot_product_flash_attention_for_cpu.default
    assert is_kept(operator, (X, X, X))
    assert is_kept(operator, (X, X, X, 0.0))
    assert not is_kept(operator, (X, X, X, 0.3))


@pytest.mark.parametrize(
    ("operator", "kept"),
    [(aten.mm, True), (aten.addmm, True), (aten.convolution, True), (aten.bmm, False), (aten.gelu, False)],
)
def test_which_operators_are_kept(operator: Any, kept: bool) -> None:
    assert is_kept(operator.default, (X, W)) == kept


def test_nothing_is_held_after_the_backward() -> None:
    keeping, giving_back = selective_contexts()
    gradients(lambda x, w: (x @ w).sin() @ w, X, W, context_fn=lambda: (keeping, giving_back))
    assert keeping._kept == []  # pyright: ignore[reportAttributeAccessIssue]


class Written(nn.Module):
    """Changes a product in place."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(16, 64), nn.ReLU(inplace=True), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(x)))


MODELS = {
    "blocks": lambda: (nn.Sequential(*[Block(32, 2, 0.0) for _ in range(4)]), torch.ones(64, 32, 32)),
    "written": lambda: (nn.Sequential(*[Written() for _ in range(4)]), torch.ones(4096, 16)),
    "product at the end": lambda: (
        nn.Sequential(*[nn.Sequential(nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 32)) for _ in range(5)]),
        torch.ones(4096, 32),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_allocator_gives_out_no_more_than_the_levels_say(name: str) -> None:
    torch.manual_seed(1)
    model, batch = MODELS[name]()
    units = find_units(model, [str(number) for number in range(len(model))])

    def loss(output: torch.Tensor, _: Any) -> torch.Tensor:
        return output.square().mean()

    memory = measure_memory(model, units, lambda m, b: m(b), loss, batch)
    wrapped = [Recomputed(unit.module, unit.name, is_selective=True).install() for unit in units]
    peaks = []
    for _ in range(2):  # the first one sets libraries up
        model.zero_grad()
        peaks.append(allocated(lambda: loss(model(batch), None).backward()))
    for each in wrapped:
        each.remove()
    levels = {keeping: levels_under(memory, [keeping] * len(units)) for keeping in Keeping}
    tops = {keeping: max(found.summing_top_bytes) for keeping, found in levels.items()}
    gradient_bytes = sum(parameter.nbytes for parameter in model.parameters())
    assert peaks[-1] <= tops[Keeping.SELECTIVE] + gradient_bytes
    assert tops[Keeping.SELECTIVE] <= 1.1 * peaks[-1]
    assert tops[Keeping.RECOMPUTE] <= tops[Keeping.SELECTIVE]


def allocated(work: Callable[[], Any]) -> int:
    """The most bytes that the allocator had given out at once, above those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    now = most = 0
    events = [each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]"]
    for event in sorted(events, key=lambda each: each.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
