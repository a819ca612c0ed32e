"""The members of the cases `predict` and `choose`: an engine under a given plan, or under the one that it chose itself.

Owns what a plan is called, the space of plans that is measured in full, how a step is timed, and foretelling one anew
beside an engine that runs it. Does not own turns nor what is made of the answers.
"""

import gc
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ..memory.allocator import return_blocks_at_once
from ..memory.budget import Memory
from ..memory.process import read_process_memory
from ..runtime.engine import Engine
from ..scheduler.assessment import describe, offloaded
from ..scheduler.plan import Activations, Home, MicroBatchOrder, Plan, UpdateTime
from .rank import Rank
from .zoo import ZOO

__all__ = ["Forecaster", "Outlook", "PlanMember", "Space", "StepOfPlan", "engine", "forecaster", "space"]

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
    """One step: seconds, and the greatest resident set in it, with all pages that other ranks look at too: a prediction
    counts every page that a rank touches, as the kernel counts it where each rank has a limit of its own."""

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
        if budget_bytes is not None:
            return_blocks_at_once()  # before anything is built: a heap that has grown does not shrink
        self._rank = rank
        self._batch = partial(_batch, rank, model)
        began_s = time.perf_counter()
        given = _arguments(rank, model, folder, plan, budget_bytes)
        self._engine = Engine(ZOO[model].build(), run_name=f"perf-{rank.index}", predict=predicts, **given)
        self._plan_s = time.perf_counter() - began_s

    def outlook(self) -> Outlook:
        """What the engine said before its first step."""
        return _outlook(self._engine, self._plan_s)

    def step(self, index: int) -> StepOfPlan:
        """One training step on the batch of that index."""
        batch = self._batch(index)
        self._rank.barrier()
        began_s = time.perf_counter()
        self._engine.step(batch)
        return StepOfPlan(time.perf_counter() - began_s, read_process_memory().peak_bytes)

    def close(self) -> None:
        self._engine.close()


class Forecaster:
    """Foretells a plan's step again and again, from units and machine as they are then, and runs none: the process of
    the engine that runs it is left as it is, and idle meanwhile.

    Args: as of `PlanMember`.
    """

    def __init__(self, rank: Rank, model: str, folder: str, plan: str, budget_bytes: int | None) -> None:
        rank.keep_to_cores()
        if budget_bytes is not None:
            return_blocks_at_once()
        self._model = model
        self._given = _arguments(rank, model, folder, plan, budget_bytes)

    def outlook(self) -> Outlook:
        """What is said of the plan now. Collective."""
        from ..runtime.plan_only import PlannedEngine

        gc.collect()  # a model and the hooks on it refer to each other: what the last one had counts as the process's
        began_s = time.perf_counter()
        planned = PlannedEngine(ZOO[self._model].build(), predict=True, **self._given)
        try:
            return _outlook(planned, time.perf_counter() - began_s)
        finally:
            planned.close()

    def close(self) -> None: ...


def _batch(rank: Rank, model: str, step: int) -> tuple[torch.Tensor, ...]:
    """This rank's rows of it."""
    return tuple(tensor.chunk(rank.count)[rank.index] for tensor in ZOO[model].batch(step))


def _arguments(rank: Rank, model: str, folder: str, plan: str | None, budget_bytes: int | None) -> dict[str, Any]:
    return {
        "optimizer": partial(torch.optim.AdamW, lr=1e-4, fused=True),
        "loss": ZOO[model].loss,
        "micro_batches": MICRO_BATCHES,
        "plan": None if plan is None else Plan.from_json(plan),
        "memory": Memory(host=budget_bytes or "1024GiB", disk=folder),
        "example": _batch(rank, model, 0),
    }


def _outlook(engine: Engine, plan_s: float) -> Outlook:
    prediction, ledger = engine.prediction, engine.predicted
    seconds = None if prediction is None else prediction.seconds
    peak_bytes = 0 if ledger is None else ledger.peak_bytes
    return Outlook(describe(engine.plan), seconds, engine.prediction_note, peak_bytes, plan_s)


class SpaceMember:
    """Lists the reduced space: residency x activations x order x time of updates, prefetch 1, all chunks and units
    alike; in tight memory freed blocks go back at once, whoever shares the state."""

    def __init__(self, rank: Rank, model: str, folder: str) -> None:
        rank.keep_to_cores()
        self._rank, self._model, self._folder = rank, model, folder

    def space(self) -> Space:
        """All plans, and what each takes. Collective."""
        from ..runtime.plan_only import PlannedEngine

        plans, peaks = [], []
        given = _arguments(self._rank, self._model, self._folder, None, None)

        def look(plan: Plan | None) -> PlannedEngine:
            given["plan"] = plan
            return PlannedEngine(ZOO[self._model].build(), **given)

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


def forecaster(rank: Rank, model: str, folder: str, plan: str, budget_bytes: int | None = None) -> Forecaster:
    """See `Forecaster`."""
    return Forecaster(rank, model, folder, plan, budget_bytes)


def space(rank: Rank, model: str, folder: str) -> SpaceMember:
    """See `SpaceMember`."""
    return SpaceMember(rank, model, folder)
