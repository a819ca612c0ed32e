import json
from dataclasses import replace

import pytest

from outgrow.parallel.actions import Kind
from outgrow.scheduler.pipeline_check import validate
from outgrow.scheduler.pipeline_data import ScheduleError, loop, vee
from outgrow.scheduler.pipeline_timing import simulate
from outgrow.scheduler.pipelines import NAMES
from outgrow.scheduler.plan import ChunkPlan, PipelinePlan, Plan
from outgrow.scheduler.stage_choice import UnitSeconds, choose_stages, costs_of, schedule_of, step_seconds
from outgrow.scheduler.stage_memory import StageMemory

RUNS = [UnitSeconds(1.0, 0.5, 0.5), *[UnitSeconds(2.0, 2.0, 2.0)] * 6, UnitSeconds(3.0, 3.0, 3.0)]


def memory_of(limit_bytes: int) -> StageMemory:
    """Ten bytes of state and one for each micro-batch in each run."""
    names = tuple(frozenset({f"p{run}"}) for run in range(8))
    return StageMemory(limit_bytes, names, {f"p{run}": 10.0 for run in range(8)}, (1,) * 8, (0,) * 8, (0,) * 8)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_gets_stages_that_cover_all_runs(name: str):
    plan = choose_stages(name, 2, 8, RUNS)
    assert plan.starts[0] == 0
    assert len(plan.starts) == len(plan.placement) == len(plan.seconds)
    assert sum(sum(stage) for stage in plan.seconds) == pytest.approx(sum(run.total_s for run in RUNS))
    for count in (1, 3, 8):
        order = schedule_of(plan, count)
        validate(order)
        assert order.placement == plan.placement


def test_auto_is_as_fast_as_the_best_name():
    best = min(
        simulate(schedule_of(plan, 8), costs_of(plan)).makespan_s
        for plan in (choose_stages(name, 2, 8, RUNS) for name in NAMES if name != "auto")
    )
    plan = choose_stages("auto", 2, 8, RUNS)
    assert simulate(schedule_of(plan, 8), costs_of(plan)).makespan_s <= best * (1 + 1e-9)


def test_given_starts_are_taken_or_refused():
    assert choose_stages("1f1b", 2, 4, RUNS, starts=(0, 3)).starts == (0, 3)
    with pytest.raises(ScheduleError, match="2 stages are given, and the schedule has 4"):
        choose_stages("zb-v", 2, 4, RUNS, starts=(0, 3))
    with pytest.raises(ValueError, match="there is gpipe, 1f1b"):
        choose_stages("quick", 2, 4, RUNS)


def test_a_limit_moves_borders_and_refuses_what_keeps_too_much():
    free = choose_stages("1f1b", 2, 8, RUNS)
    assert free.starts == (0, 5)
    assert not free.room_bytes
    # Two micro-batches are open on rank 0: five runs take 60 bytes there, four 48.
    tight = choose_stages("1f1b", 2, 8, RUNS, memory=memory_of(48))
    assert tight.starts == (0, 4)
    assert tight.saved_bytes == (4, 4)
    assert tight.room_bytes == (8, 8)
    with pytest.raises(ScheduleError, match="fits into 47 bytes a rank"):
        choose_stages("1f1b", 2, 8, RUNS, memory=memory_of(47))
    with pytest.raises(ScheduleError, match="fits into 71 bytes a rank"):
        choose_stages("gpipe", 2, 8, RUNS, memory=memory_of(71))
    heavy = replace(memory_of(56), state_bytes={f"p{run}": 25.0 if run < 2 else 5.0 for run in range(8)})
    assert choose_stages("1f1b", 2, 8, RUNS, memory=heavy).starts == (0, 2)
    with pytest.raises(ScheduleError, match="the stages of rank 0 need 72 bytes, 16 more than the limit of 56"):
        choose_stages("1f1b", 2, 8, RUNS, starts=(0, 4), memory=replace(heavy, saved_bytes=(1, 1, 2, 2, 1, 1, 1, 1)))


def test_auto_stays_within_the_room_of_each_rank():
    wide = choose_stages("auto", 2, 8, RUNS, memory=memory_of(1000))
    tight = choose_stages("auto", 2, 8, RUNS, memory=memory_of(48))
    times = []
    for plan in (wide, tight):
        timed = simulate(schedule_of(plan, 8), costs_of(plan))
        assert all(peak <= room for peak, room in zip(timed.peak_activations, plan.room_bytes, strict=True))
        times.append(timed.makespan_s)
    assert times[0] <= times[1]
    with pytest.raises(ScheduleError):
        choose_stages("auto", 2, 8, RUNS, memory=memory_of(40))


def test_auto_leaves_backward_whole_where_ranks_are_slowed_down_and_halves_cost_more():
    """With all ranks on two threads of one core, a bubble costs nothing, and work that is done twice does."""

    def run(scale: float) -> UnitSeconds:
        alone = UnitSeconds(1.0 * scale, 1.0 * scale, 1.0 * scale, 1.6 * scale)
        return UnitSeconds.of((2 * each for each in alone.by_kind), alone)

    runs = [run(1.0)] * 8
    shared = choose_stages("auto", 2, 8, runs, hosts=(0, 0))
    assert {action.kind for order in schedule_of(shared, 8).orders for action in order} == {Kind.F, Kind.B}
    assert step_seconds(shared, schedule_of(shared, 8)) == pytest.approx(8 * 8 * 2.6)
    halves = choose_stages("zb-h1", 2, 8, runs, hosts=(0, 0))
    assert step_seconds(halves, schedule_of(halves, 8)) == pytest.approx(8 * 8 * 3.0)


def test_a_whole_backward_is_timed_as_it_was_measured():
    plan = choose_stages("1f1b", 2, 4, [UnitSeconds(1.0, 1.0, 1.0, 1.5)] * 4)
    assert plan.backward_s == (3.0, 3.0)
    assert simulate(schedule_of(plan, 4), costs_of(plan)).work_s == (20.0, 20.0)
    assert step_seconds(plan, schedule_of(plan, 4)) == pytest.approx(25.0)


def test_a_plan_with_a_pipeline_comes_back_from_json():
    stages = PipelinePlan(2, "zb-v", vee(2), (0, 2, 4, 6), ((1.0, 2.0, 3.0),) * 4, (1, 2, 3, 4), (9, 8), True)
    slowed = UnitSeconds(2.0, 2.0, 2.0, 3.0, UnitSeconds(1.0, 1.0, 1.0))
    shared = choose_stages("zb-v", 2, 4, [slowed] * 4, hosts=(0, 0))
    assert shared.alone_s == ((1.0, 1.0, 1.0, 2.0),) * 4
    for pipeline in (stages, shared, PipelinePlan(2, "1f1b", loop(2), (0, 4)), choose_stages("auto", 2, 4, RUNS)):
        plan = Plan(1, 0, 4, "float32", False, 1, (ChunkPlan(),), pipeline=pipeline)
        assert Plan.from_json(plan.to_json()) == plan
    old = json.loads(Plan(1, 0, 4, "float32", False, 1, (ChunkPlan(),), pipeline=stages).to_json())
    for name in ("saved_bytes", "room_bytes", "copies_to_disk"):
        del old["pipeline"][name]
    assert Plan.from_json(json.dumps(old)).pipeline == PipelinePlan(2, "zb-v", vee(2), stages.starts, stages.seconds)


@pytest.mark.parametrize(
    "fields",
    [
        {"backward_s": (1.0,)},
        {"hosts": (0, 0, 0)},
        {"saved_bytes": (1,)},
        {"room_bytes": (1, 2)},
        {"saved_bytes": (1, 1), "room_bytes": (1,)},
        {"starts": (0,)},
    ],
)
def test_plans_whose_parts_do_not_belong_together_are_refused(fields: dict[str, tuple[float, ...]]):
    with pytest.raises(ValueError, match=r"stages have|room for activations|of whole backward passes"):
        replace(PipelinePlan(2, "1f1b", loop(2), (0, 4)), **fields)


def test_of_schedules_that_no_machine_can_tell_apart_auto_takes_the_one_that_keeps_less():
    """GPipe and 1F1B take the same time here; the order of the list must not decide."""
    same = UnitSeconds(2.0, 1.0, 1.0)
    runs = [UnitSeconds(*same.by_kind[:3], alone=same)] * 2
    plan = choose_stages("auto", 2, 8, runs, starts=(0, 1), hosts=(0, 1))
    costs = costs_of(plan)
    chosen = simulate(schedule_of(replace(plan, alone_s=((2.0, 1.0, 1.0, 2.0),) * 2), 8), costs)
    fast = simulate(schedule_of(replace(plan, alone_s=()), 8), costs)
    assert chosen.makespan_s <= 1.01 * fast.makespan_s
    assert max(chosen.peak_activations) <= max(fast.peak_activations)
    assert max(chosen.peak_activations) <= 2 * costs.activations[0]
