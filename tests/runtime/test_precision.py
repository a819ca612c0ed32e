"""Which parameters and buffers change their dtype in bf16, and which do not."""

import pytest
import torch
from models import CASES
from torch import nn

from outgrow.runtime.precision import PRECISIONS, cast_buffers, compute_dtypes


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.layer_norm = nn.LayerNorm(3)
        self.wide = nn.Linear(3, 3).to(torch.float64)
        self.narrow = nn.Linear(3, 3).to(torch.bfloat16)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("table", torch.linspace(0, 1, 5))
        self.register_buffer("ids", torch.arange(5))


def test_float32_changes_nothing():
    model = Mixed()
    before = {name: (value.dtype, value.clone()) for name, value in model.state_dict().items()}
    assert compute_dtypes(model, "float32") == {}
    cast_buffers(model, "float32")
    assert all(
        value.dtype is before[name][0] and torch.equal(value, before[name][1])
        for name, value in model.state_dict().items()
    )


def test_in_bf16_float32_parameters_change_but_for_those_beside_running_statistics():
    model = Mixed()
    expected = {f"{module}.{name}" for module in ("linear", "layer_norm", "frozen") for name in ("weight", "bias")}
    found = compute_dtypes(model, "bf16")
    assert set(found) == expected
    assert set(found.values()) == {torch.bfloat16}
    assert model.linear.weight.dtype is torch.float32, "it only says what would change"


def test_tied_parameters_go_by_their_first_name():
    assert "head.weight" not in compute_dtypes(CASES["gpt-tied"].model(), "bf16")
    assert compute_dtypes(CASES["gpt-tied"].model(), "bf16")["tok.weight"] is torch.bfloat16


def test_buffers_are_cast_but_for_running_statistics_and_integers():
    model = Mixed()
    model.norm.running_mean.fill_(1 / 3)
    cast_buffers(model, "bf16")
    assert model.table.dtype is torch.bfloat16
    assert torch.equal(model.table, torch.linspace(0, 1, 5).bfloat16())
    assert model.ids.dtype is torch.int64
    assert model.norm.running_mean.dtype is torch.float32
    assert model.norm.running_mean.tolist() == torch.full((3,), 1 / 3).tolist()
    assert model.norm.num_batches_tracked.dtype is torch.int64


@pytest.mark.parametrize("precision", ["fp16", "bfloat16", "", None])
def test_other_precisions_are_refused(precision):
    with pytest.raises(ValueError, match="there is 'float32' and 'bf16'"):
        compute_dtypes(Mixed(), precision)
    assert PRECISIONS == ("float32", "bf16")
