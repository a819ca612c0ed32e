"""Members that train in a pipeline: the engine, and `torch.distributed.pipelining` with the same schedule.

Owns how each is set up. Every rank of a pipeline is given the whole batch. torch's stages are those of its users: as
many blocks in each as there are, the embedding before the first, the head with the last (in front of it a stage of its
own where there are four, as its blocks do not divide). Does not own what is made of the answers (`case_pipelines.py`).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..parallel.actions import Kind
from ..runtime.engine import Engine
from ..scheduler.pipeline_timing import simulate
from ..scheduler.stage_choice import costs_of, schedule_of
from .contestants import StepReport
from .members import peak_rss_bytes, reset_peak_rss
from .models import CONFIGS, GPT, Batches, build_gpt, token_loss
from .peers import adamw, batches_of
from .rank import Rank

__all__ = ["PipelineTrainee", "outgrow", "torch_pipelining"]


@dataclass(frozen=True, slots=True)
class PipelineTrainee:
    """One rank of a pipeline.

    Attributes:
        train: the global batch's (inputs, targets) -> its loss. Does one whole step.
        foresee: is given the same, does nothing to the model; seconds that such a step will take, or 0.
        kept: (bytes that the last step kept for backward passes, the same by the schedule).
    """

    rank: Rank
    batches: Batches
    train: Callable[[Tensor, Tensor], float]
    finish: Callable[[], None] = lambda: None
    foresee: Callable[[Tensor, Tensor], float] = lambda inputs, targets: 0.0
    kept: Callable[[], tuple[int, float]] = lambda: (0, 0.0)
    remark: Callable[[], str] = lambda: ""

    def step(self, index: int) -> StepReport:
        """One training step on the batch of that index. Making the batch is not timed."""
        inputs, targets = self.batches(index)
        reset_peak_rss()
        self.rank.barrier()
        started = time.perf_counter()
        loss = self.train(inputs, targets)
        return StepReport(time.perf_counter() - started, loss, peak_rss_bytes())

    def foretold(self, index: int) -> tuple[float, float, int, float]:
        """Another step: its seconds, those that were foreseen right before and right after it, and what it kept."""
        batch = self.batches(index)
        before_s = self.foresee(*batch)
        seconds = self.step(index).seconds
        return seconds, (before_s + self.foresee(*batch)) / 2, *self.kept()

    def describe(self) -> str:
        return self.remark()

    def close(self) -> None:
        self.finish()


def outgrow(rank: Rank, config: str, schedule: str, micro_batches: int = 8) -> PipelineTrainee:
    """The engine, all ranks one pipeline; stages by measured costs."""
    rank.keep_to_cores()
    engine = Engine(
        build_gpt(CONFIGS[config]), optimizer=adamw, loss=token_loss, micro_batches=micro_batches,
        pipeline=rank.count, schedule=schedule,
    )  # fmt: skip

    def train(inputs: Tensor, targets: Tensor) -> float:
        return engine.step((inputs, targets)).loss

    def foresee(inputs: Tensor, targets: Tensor) -> float:
        timeline = engine.predict_step((inputs, targets))
        return timeline.seconds if timeline is not None else 0.0

    def kept() -> tuple[int, float]:
        plan = engine.plan.pipeline
        assert plan is not None
        saved = dict.fromkeys(range(len(plan.placement)), 0.0)
        before = 0
        for action, now in engine.saved_levels:
            if action.kind is Kind.F and action.index is not None:
                saved[action.index] = max(saved[action.index], now - before)
            before = now
        costs = replace(costs_of(plan), activations=tuple(saved.values()))
        most = max(now for _, now in engine.saved_levels)
        return most, simulate(schedule_of(plan, micro_batches), costs).peak_activations[rank.index]

    def remark() -> str:
        assert engine.plan.pipeline is not None
        stages = engine.plan.pipeline
        share = max(sum(part) for part in stages.seconds) / sum(sum(part) for part in stages.seconds)
        return f"stages begin at unit runs {stages.starts}, the largest has {100 * share:.0f}% of the work"

    return PipelineTrainee(rank, batches_of(config, "random"), train, engine.close, foresee, kept, remark)


_CUTS = {2: {2: (0, 4), 4: (0, 2, 4, 6)}}  # ranks -> stages -> first block of each, for the 6 blocks of S


def torch_pipelining(rank: Rank, config: str, schedule: str, micro_batches: int = 8) -> PipelineTrainee:
    """torch's own schedule classes on its own stages."""
    import torch.distributed.pipelining as library
    from torch.distributed.pipelining import schedules

    kind = {"1f1b": "1F1B", "interleaved": "Interleaved1F1B", "zb-v": "ZBVZeroBubble", "gpipe": "GPipe"}[schedule]
    multiple = kind not in ("GPipe", "1F1B")
    count = rank.count * (2 if multiple else 1)
    model = build_gpt(CONFIGS[config])
    mine = [rank.index]
    if multiple:
        mine = [rank.index, (count - 1 - rank.index) if schedule == "zb-v" else rank.index + rank.count]
    parts = [_part(model, stage, _CUTS[rank.count][count]) for stage in mine]
    device = torch.device("cpu")
    stages = [library.PipelineStage(part, stage, count, device) for part, stage in zip(parts, mine, strict=True)]
    make: Any = getattr(schedules, f"Schedule{kind}")
    runner = make(stages if multiple else stages[0], n_microbatches=micro_batches, loss_fn=token_loss)
    optimizer = adamw([parameter for part in parts for parameter in part.parameters()])
    has_first, has_last = 0 in mine, count - 1 in mine

    def train(inputs: Tensor, targets: Tensor) -> float:
        losses: list[Tensor] = []
        last: dict[str, Any] = {"target": targets, "losses": losses} if has_last else {}
        runner.step(*([inputs] if has_first else []), **last)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = torch.stack(losses).mean().detach() if has_last else torch.zeros(())
        dist.all_reduce(loss)
        return loss.item()

    return PipelineTrainee(rank, batches_of(config, "random"), train)


def _part(model: GPT, stage: int, cuts: tuple[int, ...]) -> nn.Module:
    end = [*cuts[1:], len(model.blocks)][stage]
    layers = list(model.blocks[cuts[stage] : end])
    first = [model.embed] if stage == 0 else []
    last = [model.head] if stage == len(cuts) - 1 else []
    return nn.Sequential(*first, *layers, *last)
