"""From measured costs of units to stages and a schedule of them.

Owns the choice for every schedule name, pure and the same on all ranks. Does not own the schedules (`pipelines.py`),
the cut (`stages.py`) nor the measuring.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf

from ..parallel.actions import Kind
from .pipeline_data import Schedule, ScheduleError, StageCosts, from_draft, loop, vee
from .pipeline_timing import Timing, simulate
from .pipelines import LOOP_NAMES, NAMES, named_draft, schedule
from .pipelines_list import Rules, list_schedule
from .plan import PipelinePlan
from .program import Instruction
from .rank_play import KINDS, RunSeconds, Shared, play_ranks, stage_programs
from .simulate import Work
from .stage_memory import StageMemory
from .stages import balance, check_starts

__all__ = ["UnitSeconds", "choose_stages", "costs_of", "schedule_of", "step_seconds"]

_MOST_PLAYED = 40_000  # actions times ranks, of schedules that are played with ranks that slow each other down
_TIE = 0.01  # of measured seconds: less than a machine can tell; the schedule that keeps less open is then taken
_COPIES = (Kind.SAVE, Kind.LOAD)
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
        backward_s: of B; None: as long as I and W.
        alone: the same while no other rank of the machine computes; None: they do not slow it down.
    """

    forward_s: float
    input_s: float
    weight_s: float
    backward_s: float | None = None
    alone: "UnitSeconds | None" = None

    @classmethod
    def of(cls, by_kind: Iterable[float], alone: "UnitSeconds | None" = None) -> "UnitSeconds":
        """From seconds of F, I, W and B."""
        forward_s, input_s, weight_s, backward_s = by_kind
        return cls(forward_s, input_s, weight_s, backward_s, alone)

    @property
    def total_s(self) -> float:
        return self.forward_s + self.input_s + self.weight_s

    @property
    def by_kind(self) -> tuple[float, float, float, float]:
        """Of F, I, W and B."""
        whole_s = self.input_s + self.weight_s if self.backward_s is None else self.backward_s
        return self.forward_s, self.input_s, self.weight_s, whole_s


def choose_stages(
    name: str,
    num_ranks: int,
    micro_batches: int,
    runs: Sequence[UnitSeconds],
    chunks: int | None = None,
    starts: Sequence[int] | None = None,
    allowed: Sequence[bool] | None = None,
    memory: StageMemory | None = None,
    hosts: tuple[int, ...] = (),
) -> PipelinePlan:
    """Where to cut, and where the stages lie.

    Args:
        name: of the schedule.
        runs: of each unit run, in their order.
        chunks: stages on each rank of a loop; 2 when None.
        starts: the first run of each stage, where a person has said so.
        allowed: whether a stage may begin at that run.
        memory: what stages take, and the limit; None: there is none.
        hosts: as in `PipelinePlan`.

    Raises:
        ValueError: a name that there is not, or more stages than unit runs; says what to do.
        ScheduleError: no cut fits into the limit.
    """
    if name not in NAMES:
        raise ValueError(f"schedule={name!r}: there is {', '.join(NAMES)}")
    if name == "auto":
        found = _plans_for_auto(num_ranks, micro_batches, runs, chunks, starts, allowed, memory, hosts)
        if found:
            return min(found, key=lambda plan: step_seconds(plan, schedule_of(plan, micro_batches)))
    order = schedule("1f1b" if name == "auto" else name, num_ranks, micro_batches, chunks=chunks)
    return _with(name, order, runs, starts, allowed, memory, hosts)


def _plans_for_auto(
    num_ranks: int,
    micro_batches: int,
    runs: Sequence[UnitSeconds],
    chunks: int | None,
    starts: Sequence[int] | None,
    allowed: Sequence[bool] | None,
    memory: StageMemory | None,
    hosts: tuple[int, ...],
) -> list[PipelinePlan]:
    """One for every placement; where memory is limited, for what every known schedule keeps open in it."""
    found: dict[PipelinePlan, None] = {}
    placements = (loop(num_ranks), vee(num_ranks), loop(num_ranks, chunks or 2))
    for placement in dict.fromkeys(placements):
        if len(placement) > len(runs) or (starts is not None and len(starts) != len(placement)):
            continue
        for known in NAMES:
            if known == "auto":
                continue
            order = schedule(known, num_ranks, micro_batches, chunks=chunks if known in LOOP_NAMES else None)
            if order.placement != placement:
                continue
            try:
                plan = _with("auto", order, runs, starts, allowed, memory, hosts)
                schedule_of(plan, micro_batches)
            except ScheduleError:
                continue  # it needs too much
            found[plan] = None
            if memory is None:
                break
    return list(found)


def _with(
    name: str,
    order: Schedule,
    runs: Sequence[UnitSeconds],
    starts: Sequence[int] | None,
    allowed: Sequence[bool] | None,
    memory: StageMemory | None,
    hosts: tuple[int, ...],
) -> PipelinePlan:
    placement, num_ranks = order.placement, order.num_ranks
    needs = None if memory is None else memory.needs(order)
    limit_bytes = inf if memory is None else memory.limit_bytes
    if starts is None:
        starts = balance([run.total_s for run in runs], placement, allowed, needs, limit_bytes)
    check_starts(starts, len(placement), len(runs))
    spans = list(zip(starts, [*starts[1:], len(runs)], strict=True))
    if needs is not None:
        needed = needs.ranks(spans)
        worst = max(range(num_ranks), key=needed.__getitem__)
        if needed[worst] > limit_bytes:
            raise ScheduleError(
                f"the stages of rank {worst} need {needed[worst]:,.0f} bytes, {needed[worst] - limit_bytes:,.0f} more "
                f"than the limit of {limit_bytes:,.0f}"
            )
    table = [_summed([run.by_kind for run in runs[first:end]]) for first, end in spans]
    alone = [run.alone for run in runs]
    plan = PipelinePlan(
        num_ranks,
        name,
        placement,
        tuple(starts),
        tuple((forward_s, input_s, weight_s) for forward_s, input_s, weight_s, _ in table),
        backward_s=tuple(row[-1] for row in table),
        alone_s=tuple(
            _summed([(run.alone or run).by_kind for run in runs[first:end]])
            for first, end in spans
            if any(each is not None for each in alone)
        ),
        hosts=hosts,
    )
    if memory is None:
        return plan
    saved = tuple(sum(memory.saved_bytes[first:end]) for first, end in spans)
    return replace(plan, saved_bytes=saved, room_bytes=memory.room_bytes(placement, spans))


def _summed(rows: Sequence[tuple[float, float, float, float]]) -> tuple[float, float, float, float]:
    forward_s, input_s, weight_s, whole_s = (sum(column) for column in zip(*rows, strict=True))
    return forward_s, input_s, weight_s, whole_s


def costs_of(plan: PipelinePlan) -> StageCosts:
    """Of its stages while all ranks compute; equal ones where nothing was measured."""
    seconds = plan.seconds or ((1.0, 1.0, 1.0),) * len(plan.placement)
    forward_s, input_s, weight_s = zip(*seconds, strict=True)
    return StageCosts.of_stages(
        forward_s, input_s, weight_s, plan.saved_bytes or None, backward_s=plan.backward_s or None
    )


def step_seconds(plan: PipelinePlan, order: Schedule) -> float:
    """What the computation of a step takes, where ranks of one host are faster while another one waits."""
    costs = costs_of(plan)
    if not plan.alone_s or len(set(plan.hosts)) == len(plan.hosts):
        return simulate(order, costs).makespan_s
    together = list(zip(costs.forward_s, costs.input_s, costs.weight_s, costs.whole_s, strict=True))
    shared = Shared(plan.hosts)

    def cost(rank: int, instruction: Instruction) -> Work:
        kind, stage = instruction.action.kind, instruction.action.index
        if kind not in KINDS or stage is None:
            return Work(0.0)
        place = KINDS.index(kind)
        return shared.work(rank, RunSeconds(together[stage][place], plan.alone_s[stage][place]))

    return max(timeline.seconds for timeline in play_ranks(stage_programs(order), cost))


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
    if not plan.copies_to_disk:  # then they would only hold others up
        drafts = [(draft[0], [[op for op in order if op[0] not in _COPIES] for order in draft[1]]) for draft in drafts]
    most = [float(each) for each in plan.room_bytes]
    if not most:
        most = [float(micro_batches * sum(costs.activations))] * plan.num_ranks
    drafts += [
        draft
        for rules in _RULES
        if (draft := list_schedule(plan.placement, micro_batches, costs, most, rules)) is not None
    ]
    timed = [simulate(from_draft("auto", draft, micro_batches), costs) for draft in drafts]
    if plan.room_bytes:
        timed = [each for each in timed if all(a <= b for a, b in zip(each.peak_activations, most, strict=True))]
    if not timed:
        raise ScheduleError(
            f"no schedule of {micro_batches} micro-batches keeps its activations within {most} bytes: take smaller "
            "micro-batches, more pipeline ranks, or activations='recompute'"
        )
    timed.sort(key=lambda each: (each.makespan_s, each.span_s))
    if not plan.alone_s:
        return timed[0].schedule
    played = [(step_seconds(plan, each.schedule), each) for each in _affordable(timed)]
    best_s = min(seconds for seconds, _ in played)
    near = [(max(each.peak_activations), seconds, each) for seconds, each in played if seconds <= best_s * (1 + _TIE)]
    return min(near, key=lambda found: found[:2])[-1].schedule


def _affordable(timed: Sequence[Timing]) -> list[Timing]:
    """The first ones, different from each other, as many as can be played in a second or so."""
    found: dict[Schedule, Timing] = {}
    left = _MOST_PLAYED
    for each in timed:
        order = each.schedule
        if order not in found:
            left -= sum(map(len, order.orders)) * order.num_ranks
            if found and left < 0:
                break
            found[order] = each
    return list(found.values())
