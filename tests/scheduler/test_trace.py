"""The traced pass: order, parameters, and a model that is left as it was."""

import pytest
import torch
from models import CASES
from torch import nn

from outgrow.parallel.units import Unit, find_units
from outgrow.scheduler.trace import Trace, trace_model


def forward(model: nn.Module, batch: object) -> object:
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def traced(model: nn.Module, batch: object, given: list[str] | None = None) -> tuple[list[str], Trace]:
    units = find_units(model, given)
    trace = trace_model(model, units, forward, batch)
    return [units[call.unit].name for call in trace.calls], trace


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


class Choosing(nn.Module):
    """Its control flow looks at values, it counts its calls in a buffer, and it drops out."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        x = self.norm(self.drop(x))
        return self.left(x) if x.sum().item() > 1e6 else self.right(x)


class Calls(nn.Module):
    """Units out of their order of registration, one of them twice, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.unused = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(self.c(self.a(x))))


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_units_are_recorded_in_the_order_in_which_they_run_without_computing(case):
    model = case.model()
    expected = [unit.name for unit in find_units(model)]
    if case.name == "tied-frozen":
        expected.remove("never")
    if case.name == "encoder-decoder":
        expected.insert(0, "embed")  # of the source, then of the target
    before, random_state = snapshot(model), torch.get_rng_state()
    names, trace = traced(model, case.batch(0, 2)[:-1])
    assert names == expected
    assert trace.on_meta
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, call in zip(names, trace.calls, strict=True):
        mine = {first for first, value in model.named_parameters() if is_under(own, name, value)}
        assert call.parameters == mine


def is_under(own: dict[str, nn.Parameter], unit: str, value: nn.Parameter) -> bool:
    return any(other is value for full, other in own.items() if full.startswith(unit + "."))


def test_parameters_used_between_units_are_noted_apart():
    _, trace = traced(CASES["gpt"].model(), CASES["gpt"].batch(0, 2)[:-1])
    assert trace.between == {"pos"}


def test_tied_weights_are_used_by_both_units():
    names, trace = traced(CASES["gpt-tied"].model(), CASES["gpt-tied"].batch(0, 2)[:-1])
    assert trace.calls[names.index("tok")].parameters == {"tok.weight"}
    assert trace.calls[names.index("head")].parameters == {"tok.weight"}


def test_a_weight_of_another_unit_is_noted_where_it_is_used():
    class Borrowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.lender = [self.a]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    model = Borrowing()
    own = model.b.forward
    model.b.forward = lambda x: own(x) @ model.b.lender[0].weight  # pyright: ignore
    names, trace = traced(model, torch.zeros(2, 4))
    assert names == ["a", "b"]
    assert trace.calls[1].parameters == {"a.weight", "b.weight", "b.bias"}


def test_a_unit_called_twice_is_recorded_twice_and_one_not_called_not_at_all():
    names, _ = traced(Calls(), torch.zeros(2, 4))
    assert names == ["a", "c", "a", "b"]


def test_what_no_gradient_flows_back_into_is_known():
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])
    model[0].requires_grad_(False)
    _, trace = traced(model, torch.zeros(2, 4))
    assert [call.has_backward for call in trace.calls] == [False, True, True]
    model[1].requires_grad_(False)
    model[0].requires_grad_(True)
    _, trace = traced(model, torch.zeros(2, 4))
    assert [call.has_backward for call in trace.calls] == [True, True, True], "gradients pass through frozen units"


def test_dropout_and_running_statistics_leave_no_trace():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    before, random_state = snapshot(model), torch.get_rng_state()
    _, trace = traced(model, torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))
    assert trace.on_meta
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_a_model_that_looks_at_values_runs_for_real_and_is_left_as_it_was():
    torch.manual_seed(3)
    model = Choosing()
    before, random_state = snapshot(model), torch.get_rng_state()
    names, trace = traced(model, torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))
    assert not trace.on_meta
    assert names == ["norm", "right"]
    assert trace.calls[1].parameters == {"right.weight", "right.bias"}
    assert all(call.has_backward for call in trace.calls), "unknown without gradients, so taken for granted"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_models_own_error_is_the_users_to_see_and_leaves_the_model_as_it_was():
    model = Choosing()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"mat1 and mat2|running_mean|expected"):
        traced(model, torch.randn(8, 5, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_units_that_are_given_need_no_parameters():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    names, trace = traced(model, torch.zeros(2, 4), ["0", "1"])
    assert names == ["0", "1"]
    assert trace.calls[1].parameters == frozenset()
    assert trace.between == {"2.weight", "2.bias"}


def test_a_whole_model_can_be_the_unit():
    model = nn.Linear(4, 2)
    names, trace = traced(model, torch.zeros(2, 4))
    assert names == ["<model>"]
    assert trace.calls[0].parameters == {"weight", "bias"}
    assert find_units(model) == (Unit("<model>", model),)
