"""Invariant 1 on two ranks with devices apart from the host: the bits are those of training in memory."""

import tempfile
from typing import Any

import pytest
import torch.distributed as dist
from models import DROPPING
from ranks import run_ranks
from residency import Outcome, covering, engine_of

FACTORS: dict[str, tuple[Any, ...]] = {
    "name": ("gpt-tied", "conv", "tied-frozen"),
    "zero": (0, 1, 2, 3),
    "transport": ("shared-memory", "gloo"),
    "precision": ("float32", "bf16"),
    "turns": ((1, None), (3, "by-unit"), (2, "sequential")),
    "updates": ("after", "backward", "clipped"),
    "offload": ("none", "host", "all"),
    "activations": ("keep", "offload:host"),
    "device_cache_bytes": (0, 1 << 30),
}
ROWS = covering(FACTORS)


def part(tensors: Any, rank: int) -> Any:
    """This rank's samples."""
    return tuple(tensor.tensor_split(dist.get_world_size())[rank] for tensor in tensors)


def train(rank: int, name: str, **arguments: Any) -> Outcome:
    with engine_of(name, "adamw", **arguments) as engine:
        results = [engine.step(part(DROPPING[name].batch(step, samples), rank)) for step, samples in enumerate((8, 7))]
        return Outcome(
            [r.loss for r in results], [r.grad_norm for r in results], [r.lr for r in results], engine.state_dict()
        )


def layout(row: dict[str, Any]) -> dict[str, Any]:
    """What results may depend on."""
    clip = 0.5 if row["updates"] == "clipped" else None
    same = {key: row[key] for key in ("name", "precision")}
    return same | {"micro_batches": row["turns"][0], "clip_grad_norm": clip}


def places(row: dict[str, Any]) -> dict[str, Any]:
    kept = ("zero", "transport", "offload", "activations", "device_cache_bytes")
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


def budgets_decide(rank: int) -> None:
    """Homes that follow from a budget are the same on every rank, whose budgets are not."""
    from outgrow import Memory

    wanted = train(rank, "gpt-tied", folder=None, offload="none", zero=3)
    memory = Memory(device=f"{900 + 100 * rank}KiB", host="4GiB", unified=False)
    with engine_of("gpt-tied", "adamw", None, memory=memory, zero=3) as engine:
        losses = [engine.step(part(DROPPING["gpt-tied"].batch(s, n), rank)).loss for s, n in enumerate((8, 7))]
        assert losses == wanted.losses
        plans = [""] * 2
        dist.all_gather_object(plans, engine.plan.to_json())
        assert plans[0] == plans[1]
        assert engine.predicted_device is not None
        assert engine.predicted_device.peak_bytes <= 900 << 10


def test_the_smallest_device_decides_for_all_ranks() -> None:
    run_ranks(budgets_decide, 2)
