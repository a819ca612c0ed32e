import pytest

from outgrow.scheduler.pipeline_data import StageCosts, loop
from outgrow.scheduler.pipeline_timing import simulate
from outgrow.scheduler.pipelines import NAMES, schedule
from outgrow.scheduler.program import Instruction, Program
from outgrow.scheduler.rank_play import KINDS, RunSeconds, Shared, play_ranks, stage_programs
from outgrow.scheduler.simulate import Work

UNEQUAL = StageCosts.of_stages((1.0, 2.0, 1.5, 1.0), (1.5, 1.0, 2.0, 1.0), (0.5, 1.0, 1.5, 2.0))


def seconds_of(costs: StageCosts):
    table = list(zip(costs.forward_s, costs.input_s, costs.weight_s, costs.whole_s, strict=True))

    def of(instruction: Instruction) -> float:
        kind, stage = instruction.action.kind, instruction.action.index
        return table[stage][KINDS.index(kind)] if kind in KINDS and stage is not None else 0.0

    return of


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(("auto", "pipeoffload", "gis"))])
def test_ranks_that_do_not_slow_each_other_down_are_played_as_schedules_are_simulated(name: str):
    order = schedule(name, 2, 5)
    costs = UNEQUAL if order.num_stages == 4 else StageCosts.of_stages((1.0, 2.0), (1.5, 1.0), (0.5, 1.0))
    of = seconds_of(costs)
    timelines = play_ranks(stage_programs(order), lambda _rank, instruction: Work(of(instruction)))
    assert [each.rank for each in timelines] == [0, 1]
    expected = simulate(order, costs)
    for timeline, actions, times in zip(timelines, order.orders, expected.times_s, strict=True):
        computed = {span.action: (span.start_s, span.end_s) for span in timeline.spans if span.lane == "compute"}
        for action, span in zip(actions, times, strict=True):
            assert computed[str(action)] == pytest.approx(span)


def test_a_rank_is_faster_while_the_other_one_waits():
    # Alone a stage's F takes 1 s and its B 2 s, beside the other rank's half as much again.
    def cost(rank: int, instruction: Instruction) -> Work:
        kind = instruction.action.kind
        alone_s = {"F": 1.0, "B": 2.0}.get(str(kind), 0.0)
        return Shared((0, 0)).work(rank, RunSeconds(1.5 * alone_s, alone_s))

    one = play_ranks(stage_programs(schedule("1f1b", 2, 1)), cost)
    assert max(each.seconds for each in one) == pytest.approx(6.0)  # never both at once
    first, second = play_ranks(stage_programs(schedule("gpipe", 2, 2)), cost)
    spans = {
        span.action: (span.start_s, span.end_s) for span in (*first.spans, *second.spans) if span.lane == "compute"
    }
    assert spans["F0.0"] == pytest.approx((0.0, 1.0))
    assert spans["F0.1"] == pytest.approx((1.0, 2.5))
    assert spans["F1.0"] == pytest.approx((1.0, 2.5))
    assert spans["F1.1"] == pytest.approx((2.5, 3.5))
    assert spans["B1.1"] == pytest.approx((5.5, 8.5)) or spans["B1.0"] == pytest.approx((3.5, 5.5))


def test_hosts_apart_do_not_slow_each_other_down():
    seconds = RunSeconds(3.0, 2.0)
    assert Shared((0, 1)).work(0, seconds) == Work(2.0)
    assert Shared((0, 0)).work(1, seconds) == Work(2.0, {"cores 0": 0.75})
    assert Shared((0, 0)).work(0, RunSeconds(2.0, 3.0)) == Work(2.0, {"cores 0": 0.5})  # alone nothing is slower
    assert RunSeconds(1.0, 2.0).slowdown == 1.0  # noise: nothing becomes faster by company
    assert Shared((0, 0)).work(0, RunSeconds(1.0, 0.0)).seconds == 1.0  # too short to be measured alone


def test_the_norm_waits_for_the_slowest_rank():
    text = "0 compute B{}.0 0 <- -\n1 net NORM 0 <- 0\n2 compute STEP c0 0 <- 1"
    programs = [Program.parse(text.format(stage)) for stage in range(2)]
    seconds = {"B0.0": 1.0, "B1.0": 5.0, "NORM": 0.5, "STEP c0": 0.25}
    timelines = play_ranks(programs, lambda _rank, instruction: Work(seconds[str(instruction.action)]))
    assert [each.seconds for each in timelines] == [5.75, 5.75]


def test_a_bubble_is_in_the_programs_of_loops_too():
    order = schedule("interleaved", 2, 4)
    assert order.placement == loop(2, 2)
    timelines = play_ranks(
        stage_programs(order), lambda _rank, instruction: Work(1.0 * (instruction.lane == "compute"))
    )
    assert max(each.seconds for each in timelines) > 16  # of each rank's work
