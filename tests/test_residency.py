"""Invariant 1 on one rank: wherever state lies, whenever it moves and is updated, the bits are the same."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CASES, DROPPING
from residency import OPTIMIZERS, covering, engine_of, every_pair_meets, in_memory, layout, outcome, places, unequal
from torch import nn

from outgrow import Engine, Memory

FACTORS: dict[str, tuple[Any, ...]] = {
    "name": tuple(CASES),
    "optimizer": tuple(OPTIMIZERS),
    "precision": ("float32", "bf16"),
    "turns": ((1, None), (3, "sequential"), (3, "by-unit")),
    "updates": ("after", "backward", "clipped"),
    "offload": ("all", "optimizer", "none"),
    "activations": ("keep", "recompute", "offload:host", "offload:disk"),
    "prefetch": (0, 1, 2, 3),
    "cache_bytes": (0, 1 << 14, 1 << 30),
}
ROWS = covering(FACTORS)


pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_rows_cover_every_pair() -> None:
    assert every_pair_meets(FACTORS, ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(map(str, row.values())))
def test_the_bits_are_those_of_training_in_memory(row: dict[str, Any], tmp_path: Path) -> None:
    reference = in_memory(**layout(row))
    assert outcome(folder=str(tmp_path), **layout(row), **places(row)).differ(reference) == []
    assert list(tmp_path.iterdir()) == [], "the file is gone"


EVERYTHING = {"offload": "all", "update": "backward"}
LEAN = {**EVERYTHING, "micro_batches": 3, "order": "by-unit"}


def test_the_bytes_that_are_read_are_told_beside_the_fewest(tmp_path: Path) -> None:
    batch = DROPPING["gpt"].batch(0, 6)
    found = {}
    for cache_bytes in (0, 1 << 30):
        with engine_of("gpt", "adamw", str(tmp_path), cache_bytes=cache_bytes, **EVERYTHING) as engine:
            assert engine.state_reads() == (0, 0)
            for _ in range(2):
                engine.step(batch)
            found[cache_bytes] = engine.state_reads()
            spans = engine.timeline.spans
            assert found[cache_bytes][0] == sum(span.num_bytes for span in spans if span.action.startswith("READ"))
    tight, ample = found[0], found[1 << 30]
    assert tight[0] >= tight[1] > ample[1]
    assert tight[0] > ample[0] >= ample[1]


def test_a_learning_rate_schedule_goes_on(tmp_path: Path) -> None:
    schedule = functools.partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 / (1 + step))
    reference = outcome("gpt-tied", "groups", None, lr_scheduler=schedule, micro_batches=3)
    assert reference.rates == [1e-2, 1e-2 * (1 / 2), 1e-2 * (1 / 3)]
    assert outcome("gpt-tied", "groups", str(tmp_path), lr_scheduler=schedule, **LEAN).differ(reference) == []


@pytest.mark.parametrize("order", ["sequential", "by-unit"])
@pytest.mark.parametrize("name", ["gpt", "conv", "tied-frozen"])
def test_smaller_and_empty_micro_batches(name: str, order: str, tmp_path: Path) -> None:
    batches = [CASES[name].batch(step, samples) for step, samples in enumerate((7, 2, 6, 1))]
    reference = outcome(name, "adamw", None, batches, micro_batches=3)
    lean = LEAN | {"order": order}
    assert outcome(name, "adamw", str(tmp_path), batches, **lean).differ(reference) == []


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("arguments", [EVERYTHING, LEAN, {"offload": "optimizer"}], ids=["all", "lean", "optimizer"])
def test_looking_at_the_weights_between_steps_changes_nothing(
    arguments: dict[str, Any], precision: str, tmp_path: Path
) -> None:
    case = DROPPING["gpt-tied"]
    micro_batches = arguments.get("micro_batches", 1)
    with engine_of("gpt-tied", "adamw", None, micro_batches=micro_batches, precision=precision) as engine:
        weights = []
        for step in range(4):
            engine.step(case.batch(step, 6))
            weights.append(engine.state_dict())
    disk, files = tmp_path / "disk", tmp_path / "weights"
    disk.mkdir()
    files.mkdir()
    with engine_of("gpt-tied", "adamw", str(disk), precision=precision, **arguments) as engine:
        for step in range(4):
            engine.step(case.batch(step, 6))
            if step == 0:
                assert unequal(engine.state_dict(), weights[0]) == []
                assert unequal(engine.state_dict(), weights[0]) == [], "and once more"
            elif step == 1:
                with engine.gathered() as model:
                    places = [parameter.data_ptr() for parameter in model.parameters()]
                    assert all(parameter.numel() for parameter in model.parameters())
                    assert len(set(places)) == len(places)
                    now = {key: value.float() for key, value in model.state_dict().items()}
                low = {key: value.bfloat16().float() for key, value in weights[1].items()}
                assert unequal(now, weights[1] if precision == "float32" else low) == []
            elif step == 2:
                engine.export(files / "weights.safetensors")
        assert unequal(engine.state_dict(), weights[3]) == []
    from safetensors.torch import load_file

    saved = load_file(files / "weights.safetensors")
    assert unequal(saved, {key: weights[2][key] for key in saved}) == []
    assert set(weights[2]) - set(saved) <= {"head.weight", "tok.weight"}, "tied weights are saved once"


class Broken(Exception):
    pass


def break_once(engine: Engine, where: str, pattern: str) -> None:
    """The user's model fails in the next forward or backward of one of its modules, in its last micro-batch."""
    module = engine.model.get_submodule(pattern)
    left = [engine.plan.micro_batches]

    def forward(_module: Any, _args: Any, output: torch.Tensor) -> None:
        left[0] -= 1
        if left[0] == 0:
            handle.remove()
            if where == "forward":
                raise Broken

            def backward(_grad: torch.Tensor) -> None:
                raise Broken

            output.register_hook(backward)

    handle = module.register_forward_hook(forward)


@pytest.mark.parametrize(
    ("where", "arguments"),
    [
        ("forward", EVERYTHING),
        ("forward", LEAN),
        ("forward", {"offload": "all", "micro_batches": 3, "order": "sequential", "update": "backward"}),
        ("forward", {"offload": "all", "update": "after"}),
        ("backward", {"offload": "all", "update": "after"}),
        ("backward", {"offload": "optimizer", "update": "after"}),
        ("backward", {"offload": "all", "update": "after", "micro_batches": 3, "order": "by-unit"}),
        ("backward", {"offload": "all", "micro_batches": 3, "clip_grad_norm": 0.5, "precision": "bf16"}),
        ("backward", {"offload": "none"}),
    ],
)
@pytest.mark.parametrize("name", ["gpt", "tied-frozen"])
def test_a_failing_model_leaves_the_weights_of_the_step_before(
    where: str, arguments: dict[str, Any], name: str, tmp_path: Path
) -> None:
    case = CASES[name]
    same = {key: arguments[key] for key in ("micro_batches", "clip_grad_norm", "precision") if key in arguments}
    reference = outcome(name, "adamw", None, [case.batch(step, 6) for step in range(3)], case=case, **same)
    with engine_of(name, "adamw", str(tmp_path), case=case, prefetch=2, **arguments) as engine:
        losses = []
        for step in range(3):
            if step:
                break_once(engine, where, "blocks.1" if name == "gpt" else "layers.2")
                with pytest.raises(Broken):
                    engine.step(case.batch(9, 6))
            if step == 2:
                break_once(engine, "forward", "blocks.2" if name == "gpt" else "layers.0")
                with pytest.raises(Broken):  # twice in a row
                    engine.step(case.batch(9, 6))
            losses.append(engine.step(case.batch(step, 6)).loss)
        assert losses == reference.losses
        assert unequal(engine.state_dict(), dict(reference.weights)) == []


class Detached(nn.Module):
    """`shift` is used between units, and no gradient reaches the first unit where a micro-batch says so."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.shift = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layers[0](x)
        if x.device.type != "meta" and bool((x[0, 0] < 0).item()):
            y = y.detach()
        return self.layers[1](torch.tanh(y * self.shift))


@pytest.mark.parametrize("signs", [(1, 1, 1), (1, -1, 1), (-1, 1, -1), (-1, -1, -1)])
def test_gradients_made_between_units_are_not_lost_where_none_reaches_the_first(
    signs: tuple[int, ...], tmp_path: Path
) -> None:
    x = torch.rand(6, 8, generator=torch.Generator().manual_seed(4)) + 0.1
    target = torch.zeros(6, dtype=torch.long)
    rows = torch.tensor(signs).repeat_interleave(2)[:, None]
    outcomes = []
    for order, folder in (("sequential", None), ("by-unit", None), ("by-unit", str(tmp_path))):
        torch.manual_seed(2)
        engine = Engine(
            Detached(),
            loss=torch.nn.functional.cross_entropy,
            optimizer=OPTIMIZERS["momentum"],
            precision="bf16",
            micro_batches=3,
            order=order,
            memory=Memory(disk=folder),
            offload="all" if folder else "none",
        )
        losses = [engine.step((batch, target)).loss for batch in (x, x * rows, x * rows, x)]
        outcomes.append((losses, engine.state_dict()))
        engine.close()
    for losses, weights in outcomes[1:]:
        assert losses == outcomes[0][0]
        assert unequal(weights, outcomes[0][1]) == []
