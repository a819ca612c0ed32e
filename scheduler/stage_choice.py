"""From measured costs of units to stages and a schedule of them.

Owns the choice for every schedule name, pure and the same on all ranks. Does not own the schedules (`pipelines.py`),
the cut (`stages.py`) nor the measuring.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .pipeline_data import Schedule, StageCosts, from_draft, loop, vee
from .pipeline_timing import simulate
from .pipelines import LOOP_NAMES, NAMES, named_draft, schedule
from .pipelines_list import Rules, list_schedule
from .plan import PipelinePlan
from .stages import balance, check_starts

__all__ = ["UnitSeconds", "choose_stages", "costs_of", "schedule_of"]

_RULES = tuple(
    Rules(forward_first, True, spacing, 0, patience)
    for spacing in (0.0, 0.5, 1.0)
    for patience in (0.0, 0.5)
    for forward_first in (False, True)
)


@dataclass(frozen=True, slots=True)
class UnitSeconds:
    """What one run of a unit takes.

    Attributes:
        forward_s, input_s, weight_s: of F, I and W.
    """

    forward_s: float
    input_s: float
    weight_s: float

    @property
    def total_s(self) -> float:
        return self.forward_s + self.input_s + self.weight_s


def choose_stages(
    name: str,
    num_ranks: int,
    micro_batches: int,
    runs: Sequence[UnitSeconds],
    chunks: int | None = None,
    starts: Sequence[int] | None = None,
    allowed: Sequence[bool] | None = None,
) -> PipelinePlan:
    """Where to cut, and where the stages lie.

    Args:
        name: of the schedule.
        runs: of each unit run, in their order.
        chunks: stages on each rank of a loop; 2 when None.
        starts: the first run of each stage, where a person has said so.
        allowed: whether a stage may begin at that run.

    Raises:
        ValueError: a name that there is not, or more stages than unit runs; says what to do.
    """
    if name not in NAMES:
        raise ValueError(f"schedule={name!r}: there is {', '.join(NAMES)}")
    if name == "auto":
        found = [
            _with(name, num_ranks, placement, runs, starts, allowed)
            for placement in dict.fromkeys((loop(num_ranks), vee(num_ranks), loop(num_ranks, chunks or 2)))
            if len(placement) <= len(runs) and (starts is None or len(starts) == len(placement))
        ]
        if found:
            return min(found, key=lambda plan: simulate(schedule_of(plan, micro_batches), costs_of(plan)).makespan_s)
    placement = schedule("1f1b" if name == "auto" else name, num_ranks, micro_batches, chunks=chunks).placement
    return _with(name, num_ranks, placement, runs, starts, allowed)


def _with(
    name: str,
    num_ranks: int,
    placement: tuple[int, ...],
    runs: Sequence[UnitSeconds],
    starts: Sequence[int] | None,
    allowed: Sequence[bool] | None,
) -> PipelinePlan:
    if starts is None:
        starts = balance([run.total_s for run in runs], placement, allowed)
    check_starts(starts, len(placement), len(runs))
    spans = list(zip(starts, [*starts[1:], len(runs)], strict=True))
    seconds = tuple(
        (
            sum(run.forward_s for run in runs[first:end]),
            sum(run.input_s for run in runs[first:end]),
            sum(run.weight_s for run in runs[first:end]),
        )
        for first, end in spans
    )
    return PipelinePlan(num_ranks, name, placement, tuple(starts), seconds)


def costs_of(plan: PipelinePlan) -> StageCosts:
    """Of its stages; equal ones where nothing was measured."""
    seconds = plan.seconds or ((1.0, 1.0, 1.0),) * len(plan.placement)
    forward_s, input_s, weight_s = zip(*seconds, strict=True)
    return StageCosts.of_stages(forward_s, input_s, weight_s)


def schedule_of(plan: PipelinePlan, micro_batches: int) -> Schedule:
    """The plan's schedule for so many micro-batches."""
    costs = costs_of(plan)
    num_chunks = len(plan.placement) // plan.num_ranks
    if plan.schedule != "auto":
        chunks = num_chunks if plan.schedule in LOOP_NAMES else None
        return schedule(plan.schedule, plan.num_ranks, micro_batches, costs, chunks=chunks)
    drafts = []
    for name in NAMES:
        if name != "auto":
            draft, _ = named_draft(
                name, plan.num_ranks, micro_batches, StageCosts.equal(plan.num_ranks), num_chunks, None
            )
            if draft[0] == plan.placement:
                drafts.append(named_draft(name, plan.num_ranks, micro_batches, costs, num_chunks, None)[0])
    most = [float(micro_batches * num_chunks)] * plan.num_ranks
    drafts += [
        draft
        for rules in _RULES
        if (draft := list_schedule(plan.placement, micro_batches, costs, most, rules)) is not None
    ]
    found = [from_draft("auto", draft, micro_batches) for draft in drafts]
    return min(found, key=lambda each: (simulate(each, costs).makespan_s, simulate(each, costs).span_s))
