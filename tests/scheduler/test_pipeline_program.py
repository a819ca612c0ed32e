import pytest
from steps import PAGE, text

from outgrow.memory.errors import InvalidProgram
from outgrow.parallel.actions import Kind
from outgrow.scheduler.pipeline_program import Stages, add_transfers, compile_stages, expand
from outgrow.scheduler.pipelines import NAMES, schedule
from outgrow.scheduler.plan import ChunkPlan, Plan
from outgrow.scheduler.program import ChunkUse, Lane, StepShape, UnitUse, actions_from
from outgrow.scheduler.rank_check import check_ranks

PLAN = Plan(1, 0, 4, "float32", False, 1, (ChunkPlan(),) * 8)


def stages_of(placement: tuple[int, ...], num_runs: int) -> Stages:
    return Stages(tuple(range(len(placement))), num_runs, placement, (False, *[True] * (len(placement) - 1)))


def shape_of(num_runs: int, starts: tuple[int, ...]) -> StepShape:
    units = tuple(UnitUse(f"u{i}", (i,), True, i) for i in range(num_runs))
    chunks = tuple(ChunkUse(PAGE, True, PAGE, 0) for _ in range(num_runs))
    return StepShape(units, chunks, (), starts, (0, *[64] * (len(starts) - 1)))


def test_stages_become_units_with_transfers_at_their_borders():
    stages = Stages((0, 2), 4, (0, 1), (False, True))
    shape = shape_of(4, stages.starts)
    plan = schedule("zb-h1", 2, 1)
    first, second = (add_transfers(expand(plan, stages, shape, rank), stages, rank) for rank in (0, 1))
    assert ", ".join(text(first)) == "F0.0, F1.0, SEND_F s0.0, RECV_B s0.0, I1.0, I0.0, W1.0, W0.0"
    assert ", ".join(text(second)) == "RECV_F s1.0, F2.0, F3.0, I3.0, I2.0, SEND_B s1.0, W3.0, W2.0"


def test_a_border_without_gradients_sends_none_back_and_a_turn_sends_nothing():
    stages = Stages((0, 1, 2, 3), 4, (0, 1, 1, 0), (False, False, True, True))
    shape = shape_of(4, stages.starts)
    plan = schedule("zb-v", 2, 1)
    middle = ", ".join(text(add_transfers(expand(plan, stages, shape, 1), stages, 1)))
    assert middle == "RECV_F s1.0, F1.0, F2.0, SEND_F s2.0, RECV_B s2.0, I2.0, W2.0, I1.0, W1.0"


@pytest.mark.parametrize("name", NAMES)
def test_programs_of_every_schedule_run_together(name: str):
    for ranks in (2, 4):
        for count in (1, 3, 8):
            plan = schedule(name, ranks, count)
            stages = stages_of(plan.placement, len(plan.placement))
            shape = shape_of(stages.num_runs, stages.starts)
            decisions = Plan(1, 0, count, "float32", False, 1, (ChunkPlan(),) * stages.num_runs)
            programs = [compile_stages(shape, decisions, plan, stages, rank) for rank in range(ranks)]
            check_ranks(programs, [[rank] for rank in range(ranks)])
            for program in programs:
                transfers = [i for i in program.instructions if i.action.kind.name.startswith(("SEND", "RECV"))]
                assert {i.lane for i in transfers} <= {Lane.NET}
                assert {i.num_bytes for i in transfers} <= {64}


def test_a_receive_before_its_send_comes_to_a_stand():
    stages = Stages((0, 1), 2, (0, 1), (False, True))
    shape = shape_of(2, stages.starts)
    plan = schedule("1f1b", 2, 2)
    programs = [compile_stages(shape, PLAN, plan, stages, rank) for rank in (0, 1)]
    turned = [i for i in programs[0].instructions if i.action.kind is not Kind.SEND_F]
    programs[0] = type(programs[0])(tuple(type(i)(i.action, i.lane) for i in turned))
    with pytest.raises(InvalidProgram):
        check_ranks(programs, [[0], [1]])


def test_text_forms():
    words = ["SEND_F s0.1", "RECV_B s0.1", "I3.0", "W3.0", "REDUCE c1:tied"]
    assert [str(action) for action in actions_from(words)] == words
