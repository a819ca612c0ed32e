import pytest
import torch
from torch import nn

from outgrow.parallel.units import Unit
from outgrow.scheduler.dataflow import Source, check_borders, trace_flow


class Model(nn.Module):
    """Three units with code between them, a parameter of its own, and on demand a connection over the middle."""

    def __init__(self, skips: str = "") -> None:
        super().__init__()
        self.skips = skips
        self.scale = nn.Parameter(torch.ones(4))
        self.first, self.middle, self.last = Keeping(), Keeping(), Keeping()

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        a = self.first(x, mask)
        b = self.middle(a[0] * self.scale, a[1])
        extra = {"": 0, "output": a[0], "kept": self.first.kept}[self.skips]
        return self.last(b[0] + extra, mask)[0].sum()


class Keeping(nn.Module):
    """Passes its second input on, and keeps something."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.kept = torch.zeros(())

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.kept = self.layer(x)
        return torch.relu_(self.kept * 2), mask


BATCH = (torch.ones(2, 4), torch.ones(2, 4))
NAMES = ["first", "middle", "last"]


def flow_of(model: nn.Module):
    units = [Unit(name, model.get_submodule(name)) for name in NAMES]
    return trace_flow(model, units, lambda twin, batch: twin(*batch), BATCH)


def test_what_flows_is_what_units_return_and_parameters_between_them():
    flow = flow_of(Model())
    assert flow.reads == (
        frozenset(), {Source(0, True)}, {Source(1, True)}, {Source(2, True)},
    )  # fmt: skip
    assert flow.parameters == (frozenset(), {"scale"}, frozenset(), frozenset())
    out, mask = flow.outputs[0].specs
    assert (out.shape, out.requires_grad, mask.requires_grad) == ((2, 4), True, False)
    assert flow.outputs[0].num_bytes == 64
    check_borders(flow, NAMES, [0, 1, 2])


@pytest.mark.parametrize(("skips", "what"), [("output", "the output"), ("kept", "something kept inside")])
def test_what_reaches_over_a_border_is_named(skips: str, what: str):
    flow = flow_of(Model(skips))
    check_borders(flow, NAMES, [0])
    with pytest.raises(ValueError, match=f"last in stage 2 uses {what} of first in stage 0.*returns \\(middle\\)"):
        check_borders(flow, NAMES, [0, 1, 2])
    if skips == "kept":
        with pytest.raises(ValueError, match="something kept inside of first"):
            check_borders(flow, NAMES, [0, 1])


def test_a_model_that_looks_at_values_is_refused():
    class Looking(Model):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return super().forward(x, mask) if x.sum().item() > 0 else x.sum()

    with pytest.raises(ValueError, match="this Looking does not run on tensors without values"):
        flow_of(Looking())
