"""Pipeline schedules by name: `schedule("zb-v", 4, 8)`.

Owns the names and what a person may ask. See also: `pipeline_data.py` for the words and units, `pipelines_*.py` for the
generators, `pipeline_timing.py` for bubble and peak, `pipeline_check.py` for validity, `pipeline_draw.py` for pictures.

    name              placement   what it is
    gpipe             1 stage     all forwards, then all backwards
    1f1b              1 stage     p-d micro-batches in flight
    interleaved       loop, v     1F1B over v chunks: the bubble of 1F1B / v, more activations and transfers
    looped-bfs        loop, v     GPipe over v chunks
    zb-h1, zb-h2      1 stage     weight gradients fill the bubble; with the memory of 1F1B, or twice that
    zb-v              vee         no bubble for equal times, memory of 1F1B
    v-half, v-min     vee         half, and about a third, of the activations of 1F1B
    dualpipe-v        vee         DualPipe with one copy of the model
    gis, gis-half     loop, v     interleaved with the memory of 1F1B, or about (v+1)/2v of it
    pipeoffload-half  loop, v     uniform repetition, half of the chunks copied away between forward and backward
    pipeoffload-full  loop, v     the same, all chunks
    auto              any         the best of all these, list schedules and building blocks for the given costs
"""

from collections.abc import Callable
from math import ceil

from .pipeline_data import Draft, Schedule, ScheduleError, StageCosts, from_draft
from .pipeline_timing import simulate
from .pipelines_auto import auto
from .pipelines_basic import gpipe, looped_bfs, one_f_one_b
from .pipelines_dualpipe import dualpipe_v
from .pipelines_offload import building_block, pipeoffload
from .pipelines_retime import best_gis, best_gis_half, best_interleaved, best_v_half, best_v_min, refined
from .pipelines_zero_bubble import zb_h1, zb_h2, zb_v

__all__ = ["LOOP_NAMES", "NAMES", "SPLIT_NAMES", "schedule"]

_ONE = ("gpipe", "1f1b", "zb-h1", "zb-h2")
_VEE = ("zb-v", "v-half", "v-min", "dualpipe-v")
#: Those on a loop, which take `chunks`.
LOOP_NAMES = ("interleaved", "looped-bfs", "gis", "gis-half", "pipeoffload-half", "pipeoffload-full")
#: Every name, in the order of the table.
NAMES = (
    "gpipe", "1f1b", "interleaved", "looped-bfs", "zb-h1", "zb-h2", "zb-v", "v-half", "v-min", "dualpipe-v",
    "gis", "gis-half", "pipeoffload-half", "pipeoffload-full", "auto",
)  # fmt: skip
#: Those in which the backward pass is split into I and W everywhere.
SPLIT_NAMES = ("zb-h1", "zb-h2", "zb-v", "v-half", "v-min", "gis", "gis-half", "pipeoffload-half", "pipeoffload-full")
_ROUNDING = 1e-6


def schedule(
    name: str,
    stages: int,
    micro_batches: int,
    costs: StageCosts | None = None,
    memory_limit: float | None = None,
    chunks: int | None = None,
    barrier: bool = False,
) -> Schedule:
    """A schedule.

    Args:
        name: one of `NAMES`.
        stages: pipeline ranks p. A loop has p * chunks stages and a vee 2p: see `Schedule.placement`.
        micro_batches: m, any number from 1.
        costs: of each of the p parts of the model, or of each stage; equal ones when None. With unequal ones the
            zero-bubble and V schedules are timed again, within the memory of their pattern.
        memory_limit: most activations that any rank may hold, in the unit of `costs.activations` (without costs: of one
            micro-batch on the p-th part of the model).
        chunks: stages on each rank of a loop; 2 when None.
        barrier: steps end at a barrier, such as a global gradient norm: `auto` makes the time from the first start to
            the last end of all ranks short, else the longest time between a rank's own first start and last end.

    Raises:
        ValueError: an unknown name, numbers below 1, chunks for a schedule that has a fixed number of them, or costs of
            another number of stages.
        ScheduleError: the schedule needs more than the limit; says how much, where, and what to try.
    """
    if name not in NAMES:
        raise ValueError(f"no schedule is called {name!r}; there are {', '.join(NAMES)}")
    if stages < 1 or micro_batches < 1 or (chunks is not None and chunks < 1):
        raise ValueError(f"stages, micro-batches and chunks count from 1, got {stages}, {micro_batches}, {chunks}")
    if chunks is not None and name not in (*LOOP_NAMES, "auto") and chunks != (2 if name in _VEE else 1):
        fixed = 2 if name in _VEE else 1
        raise ValueError(f"{name} has {fixed} chunks per rank, not {chunks}; chunks are for {', '.join(LOOP_NAMES)}")
    base = costs or StageCosts.equal(stages)
    if name == "auto":
        draft = auto(stages, micro_batches, base, memory_limit, chunks or 2, named_draft, barrier)
        return from_draft(name, draft, micro_batches)
    draft, stage_costs = named_draft(name, stages, micro_batches, base, chunks or 2, memory_limit)
    result = from_draft(name, draft, micro_batches)
    if memory_limit is not None:
        peaks = simulate(result, stage_costs).peak_activations
        worst = max(range(len(peaks)), key=peaks.__getitem__)
        if peaks[worst] > memory_limit * (1 + _ROUNDING):
            raise ScheduleError(
                f"{name} with {micro_batches} micro-batches holds {peaks[worst]:g} activations on rank {worst}, "
                f"{peaks[worst] - memory_limit:g} more than the limit of {memory_limit:g}: "
                "take `auto`, or one with fewer (v-half, v-min, gis-half, pipeoffload-full)"
            )
    return result


def named_draft(
    name: str, p: int, m: int, base: StageCosts, chunks: int, limit: float | None
) -> tuple[Draft, StageCosts]:
    """The draft of a name other than `auto`, and the costs of its stages.

    Raises:
        ValueError: costs of another number of stages.
    """
    num_stages = p * (1 if name in _ONE else 2 if name in _VEE else chunks)
    costs = base.split(num_stages)
    draft = _MAKERS[name](p, m, chunks, costs, limit)
    if name in ("zb-h1", "zb-h2", "zb-v", "gis", "gis-half") and not _is_equal(costs):
        draft = refined(draft, costs)
    return draft, costs


def _is_equal(costs: StageCosts) -> bool:
    """Whether F, I and W take the same time on every stage, as the patterns assume."""
    seconds = (*costs.forward_s, *costs.input_s, *costs.weight_s)
    return max(seconds) - min(seconds) <= _ROUNDING * max(seconds) and not costs.comm_s


_Maker = Callable[[int, int, int, StageCosts, float | None], Draft]
_MAKERS: dict[str, _Maker] = {
    "gpipe": lambda p, m, v, costs, limit: gpipe(p, m),
    "1f1b": lambda p, m, v, costs, limit: one_f_one_b(p, m),
    "interleaved": lambda p, m, v, costs, limit: best_interleaved(p, m, v, costs),
    "looped-bfs": lambda p, m, v, costs, limit: looped_bfs(p, m, v),
    "zb-h1": lambda p, m, v, costs, limit: zb_h1(p, m),
    "zb-h2": lambda p, m, v, costs, limit: zb_h2(p, m),
    "zb-v": lambda p, m, v, costs, limit: zb_v(p, m),
    "v-half": lambda p, m, v, costs, limit: best_v_half(p, m, costs),
    "v-min": lambda p, m, v, costs, limit: best_v_min(p, m, costs, limit),
    "dualpipe-v": lambda p, m, v, costs, limit: dualpipe_v(p, m),
    "gis": lambda p, m, v, costs, limit: best_gis(p, m, v, costs),
    "gis-half": lambda p, m, v, costs, limit: best_gis_half(p, m, v, costs),
    "pipeoffload-half": lambda p, m, v, costs, limit: pipeoffload(building_block(p, m, v, 1), ceil(v / 2), costs),
    "pipeoffload-full": lambda p, m, v, costs, limit: pipeoffload(building_block(p, m, v, 1), v, costs),
}
