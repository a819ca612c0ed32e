"""Seconds of units: alike ones are timed once, the model is left alone, and all of a step is in them."""

import pytest
import torch
from torch import nn

from outgrow.parallel.units import find_units
from outgrow.scheduler import unit_times
from outgrow.scheduler.trace import trace_model
from outgrow.scheduler.unit_times import measure_seconds


class Model(nn.Module):
    def __init__(self, width: int = 64, depth: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(depth))
        self.wide = nn.Sequential(nn.Linear(width, 4 * width), nn.Linear(4 * width, width))
        self.head = nn.Linear(width, 32)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.wide(x))


BATCH = (torch.zeros(8, 16, dtype=torch.long), torch.zeros(8, 16, dtype=torch.long))


def loss(output: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), batch[1].flatten())


def measured(model: nn.Module, shapes: dict | None = None):
    units = find_units(model)
    trace = trace_model(model, units, lambda m, b: m(b[0]), BATCH, shapes)
    return units, measure_seconds(model, units, trace, lambda m, b: m(b[0]), loss, BATCH, shapes)


def test_units_alike_are_timed_once_and_nothing_of_the_model_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []
    real = unit_times._time_unit
    monkeypatch.setattr(unit_times, "_time_unit", lambda *args: timed.append(args) or real(*args))
    model = Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    units, found = measured(model)
    assert len(found.units) == len(units) == 9
    assert len(timed) == 5, "embedding, block, two wide ones, head"
    assert len({id(found.units[index]) for index in range(1, 6)}) == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    for unit in found.units:
        assert unit.forward_s > 0
        assert unit.backward_s > 0
        assert 0 <= unit.weight_s <= unit.backward_s
    assert found.loss_s > 0
    assert found.loss_backward_s > 0


def test_a_model_without_memory_is_timed_by_its_shapes() -> None:
    with torch.device("meta"):
        model = Model()
    _, found = measured(model)
    assert all(unit.forward_s > 0 for unit in found.units)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_frozen_units_that_no_gradient_reaches_have_no_backward() -> None:
    model = Model()
    for parameter in (*model.embed.parameters(), *model.blocks[0].parameters()):
        parameter.requires_grad_(False)
    _, found = measured(model)
    assert found.units[0].backward_s == found.units[1].backward_s == 0
    assert found.units[1].recompute_s == 0
    assert found.units[2].backward_s > 0
