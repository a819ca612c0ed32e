"""Costs of stages as a step really had them: from the spans of its actions.

Owns the step from measured spans to `StageCosts`, pure. Does not own the spans, nor what is made of the costs. Units
that were measured alone miss what a step adds: other ranks at the same caches and memory, hooks, allocation.
"""

from collections.abc import Mapping, Sequence
from statistics import median

from ..memory.timeline import Span
from ..parallel.actions import Action, Kind
from .pipeline_data import StageCosts
from .pipeline_program import Stages

__all__ = ["costs_of_spans", "seconds_of_spans"]

_SENDS = (Kind.SEND_F, Kind.SEND_B)


def seconds_of_spans(spans: Sequence[Span], stages: Stages) -> dict[str, float]:
    """What one rank's spans say: median seconds of F, B, I and W of each stage (`F2`), and of a transfer (`SEND`).

    Args:
        spans: of one step.
    """
    sums: dict[tuple[str, int], float] = {}
    sends: list[float] = []
    for span in spans:
        action = Action.parse(span.action)
        if action.kind in _SENDS:
            sends.append(span.seconds)
        elif action.kind.is_compute and action.index is not None and action.micro_batch is not None:
            key = f"{action.kind}{stages.stage_of(action.index)}", action.micro_batch
            sums[key] = sums.get(key, 0.0) + span.seconds
    by_stage: dict[str, list[float]] = {}
    for (name, _), seconds in sums.items():
        by_stage.setdefault(name, []).append(seconds)
    found = {name: median(values) for name, values in by_stage.items()}
    return found | ({"SEND": median(sends)} if sends else {})


def costs_of_spans(ranks: Sequence[Mapping[str, float]], num_stages: int) -> StageCosts:
    """The costs of all stages, from what every rank found.

    A whole backward pass counts as I; where a schedule has both, what is more in it than in I is left out. A transfer
    takes a copy at each end.
    """
    found: dict[str, float] = {}
    for each in ranks:
        found |= {name: seconds for name, seconds in each.items() if name != "SEND"}
    sends = [each["SEND"] for each in ranks if "SEND" in each]
    stages = range(num_stages)
    return StageCosts.of_stages(
        [found.get(f"F{stage}", 0.0) for stage in stages],
        [found.get(f"I{stage}", found.get(f"B{stage}", 0.0)) for stage in stages],
        [found.get(f"W{stage}", 0.0) for stage in stages],
        comm_s=2 * max(sends, default=0.0),
    )
