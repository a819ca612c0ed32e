"""Memory against speed: every schedule with every way to hold activations, and `auto` at every limit, in one figure.

Owns the points and the figure. Recomputing keeps the input of a stage and runs its forward once more before its
backward; offloading keeps nothing between the two copies, where there is time for them (`pipelines_offload.py`). Does
not own schedules or their times.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .pipeline_data import ScheduleError, StageCosts, from_draft
from .pipeline_timing import simulate
from .pipelines import NAMES, named_draft, schedule
from .pipelines_offload import pipeoffload

__all__ = ["Point", "draw_frontier", "points_of"]

_INPUT_SHARE = 2 / 34  # of a transformer block's activations (ALGORITHMS 3.3)


@dataclass(frozen=True, slots=True)
class Point:
    """A schedule with a policy.

    Attributes:
        peak_activations: most of any rank, in micro-batches of one rank's part of the model.
        step_s: from the first start to the last end.
    """

    name: str
    policy: str
    peak_activations: float
    step_s: float


def points_of(
    num_ranks: int, micro_batches: int, costs: StageCosts, limits: Sequence[float], names: Iterable[str] = NAMES
) -> list[Point]:
    """Every named schedule with its activations kept, recomputed and offloaded, then `auto` for every limit; limits for
    which there is nothing are left out."""
    found: list[Point] = []
    lean = replace(
        costs,
        input_s=tuple(i + f for i, f in zip(costs.input_s, costs.forward_s, strict=True)),
        activations=tuple(held * _INPUT_SHARE for held in costs.activations),
    )
    for name in names:
        if name == "auto":
            continue
        found.append(_point(name, "keep", num_ranks, micro_batches, costs))
        point = _point(name, "recompute", num_ranks, micro_batches, lean)
        found.append(replace(point, peak_activations=point.peak_activations + max(costs.activations)))  # one, whole
        if not name.startswith("pipeoffload"):
            draft, stage_costs = named_draft(name, num_ranks, micro_batches, costs, 2, None)
            copied = from_draft(name, pipeoffload(draft, len(draft[0]) // num_ranks, stage_costs), micro_batches)
            timing = simulate(copied, costs)
            found.append(Point(name, "offload", max(timing.peak_activations), timing.makespan_s))
    for limit in limits:
        try:
            timing = simulate(schedule("auto", num_ranks, micro_batches, costs, limit, barrier=True), costs)
        except ScheduleError:
            continue
        found.append(Point("auto", "keep", max(timing.peak_activations), timing.makespan_s))
    return found


def _point(name: str, policy: str, num_ranks: int, micro_batches: int, costs: StageCosts) -> Point:
    timing = simulate(schedule(name, num_ranks, micro_batches, costs), costs)
    return Point(name, policy, max(timing.peak_activations), timing.makespan_s)


def draw_frontier(points: Sequence[Point], path: Path, title: str) -> None:
    """Write the figure; the suffix of `path` says in which format."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for policy, marker in (("keep", "o"), ("recompute", "s"), ("offload", "^")):
        some = [point for point in points if point.policy == policy and point.name != "auto"]
        axes.scatter([p.peak_activations for p in some], [p.step_s for p in some], marker=marker, label=policy)
        for point in some:
            axes.annotate(point.name, (point.peak_activations, point.step_s), fontsize=6, alpha=0.7)
    auto = sorted((p.peak_activations, p.step_s) for p in points if p.name == "auto")
    axes.step([peak for peak, _ in auto], [step for _, step in auto], where="post", color="black", label="auto")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("peak activations of a rank (micro-batches of its part of the model)")
    axes.set_ylabel("seconds of a step")
    axes.set_title(title)
    axes.legend()
    figure.savefig(path, dpi=150)
