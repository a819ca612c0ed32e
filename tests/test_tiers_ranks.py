"""Invariant 1 on two ranks with devices apart from the host: the bits are those of training in memory."""

from typing import Any

import pytest
import torch.distributed as dist
from models import DROPPING
from ranks import run_ranks
from residency import covering, engine_of
from residency_ranks import compare_rows, part, train

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
