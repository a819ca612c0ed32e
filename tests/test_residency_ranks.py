"""Invariant 1 on two ranks: wherever each rank's part of the state lies, the bits are the same."""

import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import CASES, DROPPING
from ranks import run_ranks
from residency import OPTIMIZERS, Outcome, covering, engine_of
from residency_ranks import compare_rows, part, train

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


def copies_of_two_steps(rank: int) -> None:
    """Gathered copies of parameters at home on disk are made of the same memory again."""
    with (
        tempfile.TemporaryDirectory() as folder,
        engine_of("gpt", "adamw", folder, offload="all", micro_batches=3, zero=3, predict=True) as engine,
    ):
        assert engine.transport is not None
        pool, made = engine.transport.copies, []
        for step in range(3):
            engine.step(part(DROPPING["gpt"].batch(step, 8), rank))
            made.append(sorted(block.data_ptr() for block in pool._free))
        assert engine.predicted is not None
        assert 0 < pool.free_bytes <= pool.limit_bytes == engine.predicted.parts["gathered"]
        assert set(made[0]) & set(made[-1]), "blocks of the first step serve in the last one"


def test_gathered_copies_are_made_of_memory_that_earlier_ones_had() -> None:
    run_ranks(copies_of_two_steps, 2)


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
