"""Pipelines among the plans of several ranks, from the data to the weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.utils.data import TensorDataset

from outgrow.runtime.config import Job, TrainConfig
from outgrow.runtime.events import Event, Failure, Started
from outgrow.runtime.worker import Place, train_rank
from outgrow.scheduler.plan import Plan
from outgrow.scheduler.prediction import Prediction

WIDTH, BATCH = 768, 32


class Kept:
    """What a rank says, kept."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def send(self, event: Event) -> None:
        self.events.append(event)

    def flush(self) -> None:
        """Nothing waits."""


def model() -> nn.Module:
    """Many weights for few rows: exchanging gradients after every micro-batch costs more than computing."""
    torch.manual_seed(3)
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(8)))


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(4)
    return TensorDataset(*(torch.randn(2 * BATCH, WIDTH, generator=generator) for _ in range(2)))


def train(
    rank: int, folder: str, ranks: int, plan: Plan | None, words: dict[str, Any], plans_only: bool = False
) -> tuple[Started, list[float]]:
    """Two steps as a worker takes them; what it was to do, and the losses."""
    path = Path(folder) / "run"
    path.mkdir(parents=True, exist_ok=True)
    config = TrainConfig(batch_size=BATCH, steps=2, **words)
    job = Job(config, model(), data(), nn.functional.mse_loss, plan=plan, plans_only=plans_only)
    kept = Kept()
    train_rank(job, Place(rank, ranks, ranks), kept, str(path))  # pyright: ignore[reportArgumentType]
    assert not [event for event in kept.events if isinstance(event, Failure)]
    started = next(event for event in kept.events if isinstance(event, Started))
    return started, [row["loss"] for event in kept.events for row in getattr(event, "rows", ())]


def test_the_fastest_layout_is_run_with_the_same_result_and_its_plan_runs_again(tmp_path: Path) -> None:
    words = {"micro_batches": 8}
    started, losses = run_ranks(train, 2, str(tmp_path / "chosen"), 2, None, words)[0]
    plan, prediction = started.plan, Prediction.from_json(started.prediction)
    assert plan.pipeline is not None, [fate.fate for fate in prediction.fates]
    assert prediction.fates[0].fate == "chosen"
    assert prediction.fates[0].words.startswith("a pipeline of 2 ranks, 8 micro-batches")
    said = " ".join(f"{fate.words} {fate.fate}\n" for fate in prediction.fates)
    for words_of_others in ("2 ranks with zero=0", "2 ranks with zero=3", "1f1b", "zb-v", "interleaved", "auto"):
        assert words_of_others in said
    assert prediction.timeline.busy_s("compute") > 0
    plain, expected = run_ranks(train, 2, str(tmp_path / "plain"), 2, None, words | {"pipeline": 1, "zero": 3})[0]
    assert plain.plan.pipeline is None
    assert losses == pytest.approx(expected, rel=1e-5)
    by_hand, _ = run_ranks(train, 2, str(tmp_path / "by-hand"), 2, None, words | {"pipeline": 2}, True)[0]
    assert by_hand.plan.pipeline.schedule == "1f1b"
    assert Prediction.from_json(by_hand.prediction).timeline.busy_s("compute") > 0
    again, repeated = run_ranks(train, 2, str(tmp_path / "again"), 2, Plan.from_json(plan.to_json()), words)[0]
    assert again.plan.pipeline == plan.pipeline
    assert repeated == losses
