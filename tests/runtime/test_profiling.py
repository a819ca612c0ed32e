"""Seconds before the first step: measured within the memory that is left, kept for runs that have none, agreed."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from outgrow.parallel.units import find_units, named_trainable
from outgrow.runtime import probing, profiling
from outgrow.runtime.optimizer import PiecewiseOptimizer
from outgrow.runtime.profiling import NotProfiled, Profiler
from outgrow.scheduler.memory_profile import measure_memory
from outgrow.scheduler.trace import trace_model

X = torch.ones(4, 32)
AMPLE = 1 << 40


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "_ELEMS", 1 << 16)
    monkeypatch.setattr(probing, "_DISK_BYTES", 1 << 20)


class Chain(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def loss(output: torch.Tensor, _batch: torch.Tensor) -> torch.Tensor:
    return output.square().mean()


def measured(folder: Path, left_bytes: int | None, model: nn.Module | None = None, gives_back: bool = False):
    model = model or Chain()
    units = find_units(model)

    def forward(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch)

    trace = trace_model(model, units, forward, X)
    memory = measure_memory(model, units, forward, loss, X)
    optimizer = PiecewiseOptimizer(None, dict(named_trainable(model)))
    profiler = Profiler(model, units, forward, loss, {}, lambda _module: None, optimizer, folder=folder)
    return profiler.measure(trace, X, memory, left_bytes, gives_back)


def test_all_is_measured_and_kept(tmp_path: Path) -> None:
    found = measured(tmp_path, AMPLE)
    assert len(found.times.units) == 3
    assert all(unit.forward_s > 0 and unit.backward_s > 0 for unit in found.times.units)
    assert found.hardware.update_elems_per_s > 0
    names = sorted(path.name.split("-")[0] for path in tmp_path.iterdir())
    assert names == ["hardware", "units"]


def test_without_room_what_was_kept_serves(tmp_path: Path) -> None:
    with pytest.raises(NotProfiled, match=r"measuring this machine takes 136 MiB, and 0 MiB of the budget are left"):
        measured(tmp_path, 0)
    first = measured(tmp_path, AMPLE)
    again = measured(tmp_path, 0)
    assert again.times.units == first.times.units
    assert measured(tmp_path, AMPLE).times.units != first.times.units, "with room it is measured anew"


def test_page_faults_are_those_that_units_have_just_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(tmp_path, AMPLE, gives_back=True)
    monkeypatch.setattr(profiling, "fault_figures", lambda: (0.25, 0.5))

    def faults(left_bytes: int, gives_back: bool) -> tuple[float, float]:
        hardware = measured(tmp_path, left_bytes, None, gives_back).hardware
        return hardware.fault_s_per_byte, hardware.huge_fault_s_per_byte

    kept = faults(AMPLE, gives_back=False)
    assert max(kept) < 0.25, "of the machine, as they were kept"
    assert faults(AMPLE, gives_back=True) == (0.25, 0.5)
    assert faults(0, gives_back=True) == kept, "measuring takes memory"


def test_another_unit_is_not_taken_for_a_known_one(tmp_path: Path) -> None:
    measured(tmp_path, AMPLE)
    wider = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(3)))
    with pytest.raises(NotProfiled, match="no room to run unit"):
        measured(tmp_path, 0, wider)


def test_a_broken_file_is_measured_over(tmp_path: Path) -> None:
    measured(tmp_path, AMPLE)
    (units,) = tmp_path.glob("units-*.json")
    units.write_text('{"x": "y"')
    assert len(measured(tmp_path, AMPLE).times.units) == 3
    assert all(len(numbers) == 6 for numbers in json.loads(units.read_text()).values())


def test_a_unit_that_refuses_made_up_inputs_is_the_reason(tmp_path: Path) -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(32, 32), _Refusing()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers[1](self.layers[0](x))

    with pytest.raises(NotProfiled, match="could not be timed: ValueError: only ones"):
        measured(tmp_path, AMPLE, Picky())


class _Refusing(nn.Linear):
    def __init__(self) -> None:
        super().__init__(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(x) is torch.Tensor and not x.is_meta and x.flatten()[0] != 1:
            raise ValueError("only ones")
        return super().forward(x)
