"""The members of the cases `predict` and `choose`: an engine under a given plan, or under the one that it chose itself.

Owns what a plan is called, the space of plans that is measured in full, and how a step is timed. Does not own turns nor
what is made of the answers.
"""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from ..memory.allocator import return_blocks_at_once
from ..memory.budget import Memory
from ..runtime.engine import Engine
from ..scheduler.assessment import describe, offloaded
from ..scheduler.plan import Activations, Home, MicroBatchOrder, Plan, UpdateTime
from .rank import Rank
from .zoo import ZOO

__all__ = ["Outlook", "PlanMember", "Space", "StepOfPlan", "engine", "space"]

MICRO_BATCHES = 4
_HOMES = ((Home.HOST, Home.HOST), (Home.HOST, Home.DISK), (Home.DISK, Home.DISK))
_POLICIES = (Activations.KEEP, Activations.RECOMPUTE, Activations.OFFLOAD_DISK)


@dataclass(frozen=True, slots=True)
class Outlook:
    """What was said of a plan before its first step.

    Attributes:
        words: the plan, in a few words.
        seconds: of a step; None where nothing was measured beforehand, and `note` says why.
        peak_bytes: of the process, on the host; 0 where memory is ample and nobody asked.
        plan_s: seconds from the model to the plan, profiling included.
    """

    words: str
    seconds: float | None
    note: str
    peak_bytes: int
    plan_s: float


@dataclass(frozen=True, slots=True)
class StepOfPlan:
    """One step: seconds and the greatest resident set in it, less the pages that are other ranks'."""

    seconds: float
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Space:
    """Plans to measure: JSON texts with the bytes that each takes of the host."""

    plans: tuple[str, ...]
    peaks_bytes: tuple[int, ...]


class PlanMember:
    """An engine on a model of the zoo.

    Args:
        plan: as JSON; None: the engine's own choice.
        budget_bytes: of the process; None: an ample one.
        predicts: measure units and machine first.
    """

    def __init__(
        self,
        rank: Rank,
        model: str,
        folder: str,
        plan: str | None,
        budget_bytes: int | None,
        predicts: bool,
    ) -> None:
        rank.keep_to_cores()
        self._rank, exhibit = rank, ZOO[model]
        torch.manual_seed(0)

        def batch(step: int) -> tuple[torch.Tensor, ...]:
            rows = [tensor.chunk(rank.count)[rank.index] for tensor in exhibit.batch(step)]
            return tuple(rows)

        make = partial(
            Engine,
            optimizer=partial(torch.optim.AdamW, lr=1e-4, fused=True),
            loss=exhibit.loss,
            micro_batches=MICRO_BATCHES,
            plan=None if plan is None else Plan.from_json(plan),
            run_name=f"perf-{rank.index}",
            example=batch(0),
            predict=predicts,
        )
        if budget_bytes is not None:
            return_blocks_at_once()  # before anything is built: a heap that has grown does not shrink
        self._batch = batch
        began_s = time.perf_counter()
        self._engine = make(exhibit.build(), memory=Memory(host=budget_bytes or "1024GiB", disk=folder))
        self._plan_s = time.perf_counter() - began_s

    def outlook(self) -> Outlook:
        """What the engine said before its first step."""
        prediction, ledger = self._engine.prediction, self._engine.predicted
        seconds = None if prediction is None else prediction.seconds
        peak_bytes = 0 if ledger is None else ledger.peak_bytes
        words = describe(self._engine.plan)
        return Outlook(words, seconds, self._engine.prediction_note, peak_bytes, self._plan_s)

    def step(self, index: int) -> StepOfPlan:
        """One training step on the batch of that index."""
        batch = self._batch(index)
        self._rank.barrier()
        began_s = time.perf_counter()
        result = self._engine.step(batch)
        return StepOfPlan(time.perf_counter() - began_s, result.peak_bytes["host"])

    def close(self) -> None:
        self._engine.close()


class SpaceMember:
    """Lists the reduced space: residency x activations x order x time of updates, prefetch 1, all chunks and units
    alike; in tight memory freed blocks go back at once, whoever shares the state."""

    def __init__(self, rank: Rank, model: str, folder: str) -> None:
        rank.keep_to_cores()
        self._rank, self._model, self._folder = rank, model, folder

    def space(self) -> Space:
        """All plans, and what each takes. Collective."""
        from ..runtime.plan_only import PlannedEngine

        exhibit = ZOO[self._model]
        example = tuple(tensor.chunk(self._rank.count)[self._rank.index] for tensor in exhibit.batch(0))
        plans, peaks = [], []

        def look(plan: Plan | None) -> PlannedEngine:
            return PlannedEngine(
                exhibit.build(),
                optimizer=partial(torch.optim.AdamW, lr=1e-4, fused=True),
                loss=exhibit.loss,
                micro_batches=MICRO_BATCHES,
                memory=Memory(host="1024GiB", disk=self._folder),
                plan=plan,
                example=example,
            )

        base = look(None)
        assert base.predicted is not None
        process_bytes = base.predicted.parts["process"]  # later ones find what earlier ones have left
        num_units = len(base.unit_names)
        variants = _variants(replace(base.plan, keeps_freed=False), num_units)
        base.close()
        for plan in variants:
            found = look(plan)
            assert found.predicted is not None
            plans.append(plan.to_json())
            peaks.append(found.predicted.peak_bytes - found.predicted.parts["process"] + process_bytes)
            found.close()
        return Space(tuple(plans), tuple(peaks))

    def close(self) -> None: ...


def _variants(base: Plan, num_units: int) -> Sequence[Plan]:
    result = []
    for homes, word, order, update in itertools.product(_HOMES, _POLICIES, MicroBatchOrder, UpdateTime):
        chunks = tuple(offloaded(chunk, *homes) for chunk in base.chunks)
        words = (word,) * num_units if word is not Activations.KEEP else ()
        result.append(replace(base, chunks=chunks, activations=words, order=order, update=update))
    return result


def engine(
    rank: Rank,
    model: str,
    folder: str,
    plan: str | None = None,
    budget_bytes: int | None = None,
    predicts: bool = True,
) -> PlanMember:
    """See `PlanMember`."""
    return PlanMember(rank, model, folder, plan, budget_bytes, predicts)


def space(rank: Rank, model: str, folder: str) -> SpaceMember:
    """See `SpaceMember`."""
    return SpaceMember(rank, model, folder)
