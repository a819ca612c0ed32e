"""Invariant 1 on two ranks: wherever each rank's part of the state lies, the bits are the same."""

import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import CASES, DROPPING
from ranks import run_ranks
from residency import OPTIMIZERS, Outcome, covering, engine_of

FACTORS: dict[str, tuple[Any, ...]] = {
    "name": tuple(CASES),
    "zero": (0, 1, 2, 3),
    "transport": ("shared-memory", "gloo"),
    "optimizer": ("adamw", "groups", "momentum", "adagrad"),
    "precision": ("float32", "bf16"),
    "turns": ((1, None), (3, "sequential"), (3, "by-unit")),
    "updates": ("after", "backward", "clipped"),
    "offload": ("all", "optimizer", "none"),
    "activations": ("keep", "recompute", "offload:host", "offload:disk"),
    "prefetch": (0, 1, 3),
    "cache_bytes": (0, 1 << 14, 1 << 30),
}
ROWS = covering(FACTORS)


def part(tensors: Any, rank: int) -> Any:
    """This rank's samples, or None where there are none."""
    rows = tuple(tensor.tensor_split(dist.get_world_size())[rank] for tensor in tensors)
    return rows if len(rows[0]) else None


def train(rank: int, name: str, optimizer: str, sizes: tuple[int, ...] = (8, 7), **arguments: Any) -> Outcome:
    with engine_of(name, optimizer, **arguments) as engine:
        results = [engine.step(part(DROPPING[name].batch(step, samples), rank)) for step, samples in enumerate(sizes)]
        return Outcome(
            [r.loss for r in results], [r.grad_norm for r in results], [r.lr for r in results], engine.state_dict()
        )


def layout(row: dict[str, Any]) -> dict[str, Any]:
    """What results may depend on."""
    clip = 0.5 if row["updates"] == "clipped" else None
    micro_batches = row["turns"][0]
    same = {key: row[key] for key in ("name", "optimizer", "precision")}
    return same | {"micro_batches": micro_batches, "clip_grad_norm": clip}


def places(row: dict[str, Any]) -> dict[str, Any]:
    kept = ("zero", "transport", "offload", "activations", "prefetch", "cache_bytes")
    update = {} if row["updates"] == "clipped" else {"update": row["updates"]}
    return {key: row[key] for key in kept} | update | {"order": row["turns"][1]}


def compare_rows(rank: int, rows: list[dict[str, Any]]) -> list[str]:
    """What differs from training in memory, in words."""
    references: dict[str, Outcome] = {}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for row in rows:
            key = repr(layout(row))
            if key not in references:
                references[key] = train(rank, folder=None, offload="none", **layout(row))
            try:
                found = train(rank, folder=folder, **layout(row), **places(row))
            except Exception as error:
                error.add_note(f"{row}")
                raise
            differences = found.differ(references[key])
            wrong += [f"{row}: {differences}"] if differences else []
    return wrong


@pytest.mark.parametrize("half", [0, 1])
def test_the_bits_are_those_of_training_in_memory(half: int) -> None:
    for wrong in run_ranks(compare_rows, 2, ROWS[half::2]):
        assert wrong == []


def odd_batches(rank: int) -> None:
    """Ranks and micro-batches without a sample."""
    wanted: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as folder:
        for offload, order in (("none", "sequential"), ("all", "sequential"), ("all", "by-unit")):
            found = train(
                rank,
                "gpt-tied",
                "adamw",
                (8, 5, 1),
                folder=folder,
                offload=offload,
                order=order,
                micro_batches=3,
                zero=3,
            )
            assert wanted.setdefault("first", found).differ(found) == []


def looks_between_steps(rank: int) -> None:
    case = DROPPING["gpt"]
    weights: list[dict[str, torch.Tensor]] = []
    with tempfile.TemporaryDirectory() as folder:
        for offload in ("none", "all"):
            with engine_of("gpt", "adamw", folder, offload=offload, precision="bf16", zero=3) as engine:
                for step in range(3):
                    engine.step(part(case.batch(step, 8), rank))
                    state = engine.state_dict()
                    if offload == "none":
                        weights.append(state)
                    assert [key for key in state if not torch.equal(state[key], weights[step][key])] == []
                    with engine.gathered() as model:
                        for key, value in model.state_dict().items():
                            assert torch.equal(value, state[key].to(value.dtype)), key
                    if step == 1:
                        engine.export(f"{folder}/rank{rank}.safetensors")


@pytest.mark.parametrize("function", [odd_batches, looks_between_steps])
def test_two_ranks(function: Callable[[int], None]) -> None:
    run_ranks(function, 2)


def test_every_optimizer_is_tried() -> None:
    assert {row["optimizer"] for row in ROWS} <= OPTIMIZERS.keys()
