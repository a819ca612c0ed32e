"""A plan that is given runs as it stands, on what it was made for, and nowhere else."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import GPT
from torch import nn

from outgrow import Engine, Memory, Runtime
from outgrow.memory.errors import DoesNotFit
from outgrow.runtime.given_plan import read_plan
from outgrow.scheduler.plan import Activations, Home, MicroBatchOrder, PipelinePlan, Plan, UpdateTime

TOKENS = torch.arange(64).reshape(4, 16) % 32


def loss(output: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), batch.flatten())


def engine(**arguments: Any) -> Engine:
    torch.manual_seed(0)
    return Engine(GPT(), loss=loss, micro_batches=2, **arguments)


def weights(given: Engine) -> dict[str, torch.Tensor]:
    try:
        for _ in range(2):
            given.step(TOKENS)
        return {name: value.clone() for name, value in given.state_dict().items()}
    finally:
        given.close()


@pytest.fixture(scope="module")
def base() -> Plan:
    found = engine()
    try:
        return found.plan
    finally:
        found.close()


def test_it_runs_as_it_stands_and_gives_the_same_bits(base: Plan, tmp_path: Path) -> None:
    on_disk = tuple(
        replace(chunk, optimizer_home=Home.DISK, parameter_home=Home.DISK if number % 2 else Home.HOST)
        for number, chunk in enumerate(base.chunks)
    )
    words = (Activations.RECOMPUTE,) + (Activations.KEEP,) * (len(engine_units()) - 1)
    plan = replace(
        base, chunks=on_disk, activations=words, order=MicroBatchOrder.BY_UNIT, update=UpdateTime.BACKWARD, prefetch=2
    )
    given = engine(plan=Plan.from_json(plan.to_json()), memory=Memory(disk=str(tmp_path)))
    result = weights(given)
    assert given.plan == plan
    plain = weights(engine())
    assert all(torch.equal(result[name], value) for name, value in plain.items())


def engine_units() -> tuple[str, ...]:
    found = engine(example=TOKENS)
    try:
        return tuple(unit.name for unit in found._units)
    finally:
        found.close()


def test_one_that_does_not_fit_is_refused_with_the_numbers(base: Plan, tmp_path: Path) -> None:
    on_disk = tuple(replace(chunk, optimizer_home=Home.DISK) for chunk in base.chunks)
    with pytest.raises(DoesNotFit, match=r"no plan fits into the host budget of 64\.00 MiB.*the optimizer on disk"):
        engine(plan=replace(base, chunks=on_disk), memory=Memory(host="64MiB", disk=str(tmp_path)), example=TOKENS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"micro_batches": 3}, r"made for micro-batches: 3, and this training has 2; plan it again"),
        ({"precision": "bf16"}, "made for precision: bf16, and this training has float32"),
        ({"world_size": 2}, "made for ranks: 2"),
        ({"clips_gradients": True}, "made for clipping of gradients: True"),
        ({"activations": (Activations.KEEP,) * 2}, "decides about 2 units, and this model has"),
    ],
)
def test_one_for_something_else_is_refused(base: Plan, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        engine(plan=replace(base, **change))


def test_one_for_another_model_or_without_a_disk_is_refused(base: Plan) -> None:
    with pytest.raises(ValueError, match=f"about {len(base.chunks) - 1} chunks, and this model has {len(base.chunks)}"):
        engine(plan=replace(base, chunks=base.chunks[1:]))
    on_disk = tuple(replace(chunk, optimizer_home=Home.DISK) for chunk in base.chunks)
    with pytest.raises(ValueError, match=r"the plan puts state on disk: give memory=Memory\(disk="):
        engine(plan=replace(base, chunks=on_disk))
    stages = PipelinePlan(2, "1f1b", (0, 1), (0, 1))
    with pytest.raises(ValueError, match="pipeline=2: each pipeline takes so many ranks, and there are 1"):
        engine(plan=replace(base, pipeline=stages))


@pytest.mark.parametrize(("name", "value"), [("zero", 0), ("activations", "keep"), ("order", "by-unit")])
def test_deciding_again_is_a_mistake(base: Plan, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"and {name}= would decide it again: leave it out, or plan="):
        engine(plan=base, **{name: value})


def test_files(base: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(base.to_json())
    assert read_plan(path) == read_plan(str(path)) == read_plan(base) == base
    path.write_text("{}")
    refusals: list[tuple[Callable[[], object], str]] = [
        (lambda: read_plan(path), "holds no plan that can be run"),
        (lambda: Runtime(plan=tmp_path / "none.json"), "there is no plan at"),
        (lambda: Runtime(plan=3), "the path of a plan.json, got 3"),  # pyright: ignore[reportArgumentType]
    ]
    for call, words in refusals:
        with pytest.raises(ValueError, match=words):
            call()
