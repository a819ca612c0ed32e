import torch
from torch import nn

from outgrow.parallel.units import find_units
from outgrow.runtime.passage import Passage
from outgrow.runtime.unit_costs import UnitTimer
from outgrow.scheduler.dataflow import trace_flow
from outgrow.scheduler.trace import trace_model


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.embed.weight.requires_grad_(True)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


def test_units_are_measured_beside_the_model():
    torch.manual_seed(3)
    model = Chain()
    units = find_units(model, ["embed", "blocks.0", "blocks.1", "head"])
    part = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.int64)
    shapes = {name: (tuple(p.shape), torch.bfloat16) for name, p in model.named_parameters()}  # as bf16 computes
    passage = Passage(model, loss, None, torch.bfloat16, 0)
    trace = trace_model(model, units, passage.forward, part, shapes)
    flow = trace_flow(model, units, passage.forward, part, shapes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    timer = UnitTimer(units, trace, flow, passage, model, shapes, part)
    seconds = timer.seconds([timer.round() for _ in range(3)])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(seconds) == 4
    assert seconds[1] == seconds[2]  # alike: measured once
    assert all(run.forward_s > 0 and run.weight_s > 0 for run in seconds)
    assert seconds[3].forward_s > 0
