"""Pipelines beside data-parallel plans: which are looked at, what a step of each takes, and what became of them.

Owns the space of pipeline layouts, their price and the choice, pure. Does not own the figures (`runtime/layouts.py`
measures them), data-parallel plans (`search.py`), the cut and the schedules (`stage_choice.py`).

The global batch is the same in every layout: with `num_ranks` ranks a pipeline, so many times fewer ranks share out the
samples, and a micro-batch has as many times more of them. First comes a floor: what all ranks compute, shared out with
no bubble and nothing waited for. Only a pipeline whose floor is below the best plan so far is cut and played.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..memory.errors import OutgrowError
from ..parallel.actions import Kind
from .assessment import against
from .cost import TimeProfile
from .hardware import NetFigures
from .pipeline_data import Schedule
from .plan import PipelinePlan, Plan
from .prediction import Fate
from .program import Instruction
from .rank_play import KINDS, RunSeconds, Shared, play_ranks, stage_programs
from .simulate import Work
from .stage_choice import UnitSeconds

__all__ = [
    "SCHEDULES",
    "Layout",
    "LayoutFigures",
    "Priced",
    "beside_pipelines",
    "choose_layout",
    "floor_seconds",
    "pipeline_layouts",
    "pipeline_seconds",
    "with_recompute",
]

SCHEDULES = ("1f1b", "zb-h1", "interleaved", "zb-v", "auto")
"""That are looked at, the simplest first: of those that are alike within 2%, the first is taken."""
_ALIKE = 0.02


@dataclass(frozen=True, slots=True)
class Layout:
    """Ranks as pipelines.

    Attributes:
        num_ranks: of each pipeline.
        num_data: pipelines, beside each other.
        micro_batches: of each pipeline's samples.
    """

    num_ranks: int
    num_data: int
    micro_batches: int

    @property
    def words(self) -> str:
        """In a few words."""
        beside = (
            f"{self.num_data} pipelines of {self.num_ranks} ranks"
            if self.num_data > 1
            else (f"a pipeline of {self.num_ranks} ranks")
        )
        return f"{beside}, {self.micro_batches} micro-batches"


@dataclass(frozen=True)
class LayoutFigures:
    """What the seconds of a layout's pipelines follow from.

    Attributes:
        runs: of each unit run, on a micro-batch of this layout.
        hosts: as in `PipelinePlan`.
        border_bytes: of what each unit run returns.
        parameters: for each unit run, the names of those that it uses.
        num_elems: trainable parameter -> elements.
        send_bytes_per_s: to another rank of the pipeline.
        update_elems_per_s: parameters that the optimizer updates.
        action_s: what an action takes beside its work.
        net: of the exchange between ranks; None on one rank.
        shares_parameters: whether gathering is a look into shared memory.
    """

    runs: tuple[UnitSeconds, ...]
    hosts: tuple[int, ...]
    border_bytes: tuple[int, ...]
    parameters: tuple[frozenset[str], ...]
    num_elems: Mapping[str, int]
    send_bytes_per_s: float
    update_elems_per_s: float
    action_s: float = 0.0
    net: NetFigures | None = None
    shares_parameters: bool = False


@dataclass(frozen=True, slots=True)
class Priced:
    """A pipeline that can be run.

    Attributes:
        plan: with the pipeline in it.
        seconds: of a step.
        peak_bytes: that the fullest rank takes at most.
    """

    plan: Plan
    seconds: float
    peak_bytes: int
    words: str


def pipeline_layouts(num_ranks: int, num_units: int, counts_of: Callable[[int, int], Sequence[int]]) -> list[Layout]:
    """All ways to make pipelines of ranks, the shortest pipelines first.

    Args:
        num_units: unit runs of the model; a stage has one at least.
        counts_of: f(ranks of a pipeline, pipelines) -> numbers of micro-batches that may be.
    """
    sizes = [size for size in range(2, min(num_ranks, num_units) + 1) if num_ranks % size == 0]
    return [Layout(size, num_ranks // size, count) for size in sizes for count in counts_of(size, num_ranks // size)]


def floor_seconds(layout: Layout, times: TimeProfile, num_elems: int, update_elems_per_s: float) -> float:
    """What a step takes at least: all that the ranks of a pipeline compute while all of them do, shared out evenly, and
    the update of an even share. Nothing is waited for, and nothing sent.

    Where ranks of one machine are faster while others wait, that is no less: they are faster by what the others leave.

    Args:
        times: of one micro-batch of this layout, measured while all ranks compute.
        num_elems: trainable ones, of the model.
    """
    compute_s = sum(unit.forward_s + unit.backward_s for unit in times.units) + times.loss_s + times.loss_backward_s
    update_s = num_elems / (layout.num_ranks * layout.num_data) / update_elems_per_s
    return layout.micro_batches * compute_s / layout.num_ranks + update_s


def pipeline_seconds(layout: Layout, plan: Plan, order: Schedule, figures: LayoutFigures) -> float:
    """A step, played: stages in the order of the schedule, what they send each other, and what follows the last
    backward pass: updates, and the exchange between pipelines, as if nothing of that ran beside computation.

    Args:
        order: of the plan's schedule.
    """
    pipeline = plan.pipeline
    assert pipeline is not None
    shared = Shared(pipeline.hosts or tuple(range(layout.num_ranks)))
    together = [(*split, whole) for split, whole in zip(pipeline.seconds, _whole_seconds(pipeline), strict=True)]
    alone = pipeline.alone_s or tuple(together)

    def cost(rank: int, instruction: Instruction) -> Work:
        kind, stage = instruction.action.kind, instruction.action.index
        assert stage is not None
        if kind in KINDS:
            place = KINDS.index(kind)
            work = shared.work(rank, RunSeconds(together[stage][place], alone[stage][place]))
            return replace(work, seconds=work.seconds + figures.action_s)
        if kind in (Kind.SEND_F, Kind.SEND_B):
            before = pipeline.starts[stage + (kind is Kind.SEND_F)] - 1
            return Work(figures.border_bytes[before] / figures.send_bytes_per_s + figures.action_s)
        return Work(0.0)

    played = max(timeline.seconds for timeline in play_ranks(stage_programs(order), cost))
    return played + max(_behind_s(layout, plan, rank, figures) for rank in range(layout.num_ranks))


def with_recompute(run: UnitSeconds) -> UnitSeconds:
    """A unit run whose backward begins with its forward, once more."""
    forward_s, input_s, weight_s, whole_s = run.by_kind
    alone = None if run.alone is None else with_recompute(run.alone)
    return UnitSeconds(forward_s, input_s + forward_s, weight_s, whole_s + forward_s, alone)


def _whole_seconds(pipeline: PipelinePlan) -> Sequence[float]:
    return pipeline.backward_s or [input_s + weight_s for _, input_s, weight_s in pipeline.seconds]


def _behind_s(layout: Layout, plan: Plan, rank: int, figures: LayoutFigures) -> float:
    """What a rank does behind its last backward pass."""
    pipeline = plan.pipeline
    assert pipeline is not None
    ends = [*pipeline.starts[1:], len(figures.parameters)]
    names: set[str] = set()
    for stage, owner in enumerate(pipeline.placement):
        if owner == rank:
            names.update(*figures.parameters[pipeline.starts[stage] : ends[stage]])
    elems = sum(figures.num_elems.get(name, 0) for name in names)
    shares = layout.num_data if plan.zero else 1
    update_s = elems / shares / figures.update_elems_per_s
    if layout.num_data == 1:
        return update_s
    assert figures.net is not None
    net, num_bytes = figures.net, 4 * elems
    reduce_s = layout.micro_batches * (net.reduce_latency_s + num_bytes / net.reduce_bytes_per_s)
    if figures.shares_parameters or not plan.zero:
        return update_s + reduce_s
    num_gathers = 2 * layout.micro_batches if plan.zero == 3 else 1
    return update_s + reduce_s + num_gathers * (net.gather_latency_s + num_bytes / net.gather_bytes_per_s)


def choose_layout(
    best_s: float,
    layouts: Sequence[Layout],
    floor: Callable[[Layout], float],
    priced: Callable[[Layout, str], Priced],
    schedules: Sequence[str] = SCHEDULES,
) -> tuple[Priced | None, list[Fate]]:
    """The pipeline that is faster than the best plan without one, and the fates of all of them.

    Args:
        best_s: of a step without pipelines; infinite where none fits.
        floor: seconds that a layout takes at least; raises ValueError or OutgrowError where it cannot be.
        priced: of one schedule; raises likewise.

    Returns:
        None where a pipeline would have to be 2% faster and none is: nothing that a prediction could tell.
    """
    found: list[Priced] = []
    fates: list[Fate] = []
    least = best_s * (1 - _ALIKE)
    for layout in layouts:
        try:
            floor_s = floor(layout)
        except (ValueError, OutgrowError) as error:
            fates.append(Fate(layout.words, None, 0, f"refused: {error}"))
            continue
        if floor_s > least:
            fates.append(Fate(f"{layout.words}, any schedule", None, 0, _fate_of_floor(floor_s, best_s)))
            continue
        for name in schedules:
            try:
                found.append(priced(layout, name))
            except (ValueError, OutgrowError) as error:
                fates.append(Fate(f"{layout.words}, {name}", None, 0, f"refused: {error}"))
    fastest_s = min((each.seconds for each in found), default=best_s)
    best = None
    if found and fastest_s <= least:
        best = next(each for each in found if each.seconds <= fastest_s * (1 + _ALIKE))
    best_s = best_s if best is None else best.seconds
    looked = [
        Fate(each.words, each.seconds, each.peak_bytes, "chosen" if each is best else against(each.seconds, best_s))
        for each in sorted(found, key=lambda each: each.seconds)
    ]
    return best, looked + fates


def beside_pipelines(fates: Sequence[Fate], pipelines: Sequence[Fate], best: Priced | None) -> tuple[Fate, ...]:
    """The fates of plans without and with pipelines, the chosen one first, the refused last."""
    if best is not None:
        fates = [
            each if each.seconds is None else replace(each, fate=against(each.seconds, best.seconds)) for each in fates
        ]
    every = [*fates, *pipelines]
    chosen = [each for each in every if each.fate == "chosen"]
    timed = [each for each in every if each.seconds is not None and each.fate != "chosen"]
    return (*chosen, *sorted(timed, key=lambda each: each.seconds or 0.0), *(e for e in every if e.seconds is None))


def _fate_of_floor(floor_s: float, best_s: float) -> str:
    if floor_s < best_s:
        return f"faster by {100 * (1 - floor_s / best_s):.1f}% at the very most, no more than a prediction can tell"
    return f"slower by at least {100 * (floor_s / best_s - 1):.0f}%"
