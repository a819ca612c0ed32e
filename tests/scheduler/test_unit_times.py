"""Seconds of units: alike ones are timed once, the model is left alone, and all of a step is in them."""

import pytest
import torch
from torch import nn

from outgrow.parallel.units import find_units
from outgrow.scheduler import stopwatch, unit_times
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


def test_rounds_go_on_until_the_medians_have_settled() -> None:
    def is_enough(*seconds: float) -> bool:
        return stopwatch._is_enough([[(each / 3, 2 * each / 3)] for each in seconds], sum(seconds))

    assert not is_enough(0.1, 0.1), "short, and two only"
    assert is_enough(0.1, 0.1, 0.1)
    assert not is_enough(0.01, 0.01, 0.01), "too little was looked at"
    assert is_enough(*[0.001] * 30), "that is enough of it"
    assert not is_enough(0.07, 0.085, 0.1), "not settled yet"
    assert is_enough(0.2, 0.24, 0.28), "but it was looked at for long"
    assert is_enough(2.0, 2.01), "long ones that agree"
    assert not is_enough(2.0, 2.5), "long ones that do not"
    assert is_enough(2.0, 2.5, 3.0), "no more than three of these"


def test_every_way_is_looked_at_in_every_round_and_only_the_first_short_one_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns = []
    forwards = {"whole": [0.2, 0.06, 0.07, 0.06], "inputs": [0.02, 0.03, 0.03, 0.04], "long": [1.0, 1.02]}
    forwards["often"] = [0.3] * 3

    def once(_watch: stopwatch.Stopwatch, way: str) -> tuple[float, float]:
        turns.append(way)
        return forwards[way].pop(0), 0.02

    monkeypatch.setattr(stopwatch.Stopwatch, "_once", once)
    watch = stopwatch.Stopwatch(4)
    rounds = watch.rounds(["whole", "inputs"])  # pyright: ignore[reportArgumentType]
    assert [[forward_s for forward_s, _ in each] for each in rounds] == [[0.06, 0.03], [0.07, 0.03], [0.06, 0.04]]
    assert turns == ["whole", "inputs"] * 4
    assert len(watch.rounds(["long"])) == 2  # pyright: ignore[reportArgumentType]
    assert len(watch.rounds(["often"], times_as_long=3)) == 3  # pyright: ignore[reportArgumentType]


def test_frozen_weights_are_trained_again_afterwards() -> None:
    layer = nn.Linear(4, 4)
    x = torch.ones(2, 4, requires_grad=True)
    stopwatch.Stopwatch(4)._once(stopwatch.Way(lambda: layer(x), [x], [x], list(layer.parameters())))
    assert x.grad is not None
    assert layer.weight.grad is None
    assert all(parameter.requires_grad for parameter in layer.parameters())


def test_what_recomputing_and_handing_over_add_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ways: all of it; without gradients of weights; that recomputed; that recomputed selectively."""
    seen = []

    def rounds(_watch: stopwatch.Stopwatch, ways: list[stopwatch.Way], _often: float = 1.0):
        for way in ways:
            way.run()
        seen.append(len(ways))
        return [[(1.0, 2.0), (1.0, 1.5), (1.25, 2.0), (1.125, 1.875)][: len(ways)]] * 3

    monkeypatch.setattr(stopwatch.Stopwatch, "rounds", rounds)
    _, found = measured(Model())
    embedding, block = found.units[0], found.units[1]
    assert set(seen) == {1, 4}
    assert (embedding.weight_s, embedding.recompute_s, embedding.offload_s) == (2.0, 1.0, 0.0), "nothing to compare"
    assert (block.forward_s, block.backward_s, block.weight_s) == (1.0, 2.0, 0.5)
    assert (block.recompute_s, block.selective_s, block.offload_s) == (0.75, 0.5, 0.25)
