from dataclasses import replace
from typing import Any

import pytest
from steps import PAGE, text

from outgrow.memory.errors import InvalidProgram
from outgrow.parallel.actions import Kind
from outgrow.scheduler.passes import add_reduces, add_updates
from outgrow.scheduler.pipeline_program import TIED, Stages, add_tied, add_transfers, compile_stages, expand
from outgrow.scheduler.pipelines import NAMES, schedule
from outgrow.scheduler.plan import Activations, ChunkPlan, GatheredFor, Home, PipelinePlan, Plan, UpdateTime
from outgrow.scheduler.program import ChunkUse, Lane, StepShape, UnitUse, actions_from
from outgrow.scheduler.rank_check import check_ranks
from outgrow.scheduler.verify import verify

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
    first, second = (add_transfers(expand(plan, stages, shape, PLAN, rank), stages, rank) for rank in (0, 1))
    assert ", ".join(text(first)) == "F0.0, F1.0, SEND_F s0.0, RECV_B s0.0, I1.0, I0.0, W1.0, W0.0"
    assert ", ".join(text(second)) == "RECV_F s1.0, F2.0, F3.0, I3.0, I2.0, SEND_B s1.0, W3.0, W2.0"


def test_a_border_without_gradients_sends_none_back_and_a_turn_sends_nothing():
    stages = Stages((0, 1, 2, 3), 4, (0, 1, 1, 0), (False, False, True, True))
    shape = shape_of(4, stages.starts)
    plan = schedule("zb-v", 2, 1)
    middle = ", ".join(text(add_transfers(expand(plan, stages, shape, PLAN, 1), stages, 1)))
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
                lanes = {Kind.SEND_F: Lane.COMPUTE, Kind.SEND_B: Lane.COMPUTE}
                assert all(i.lane is lanes.get(i.action.kind, Lane.NET) for i in transfers)
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


def test_copies_of_a_stage_become_copies_of_its_units():
    placement = (0, 1, 0, 1)
    stages = Stages((0, 2, 4, 6), 8, placement, (False, True, True, True))
    shape = shape_of(8, stages.starts)
    units = [replace(unit, saved_bytes=PAGE if place != 1 else 0) for place, unit in enumerate(shape.units)]
    shape = replace(shape, units=tuple(units))
    plan = schedule("pipeoffload-full", 2, 4)
    without = text(expand(plan, stages, shape, PLAN, 0))
    assert not [word for word in without if word.startswith(("SAVE", "LOAD"))]
    copying = replace(PLAN, pipeline=PipelinePlan(2, plan.name, placement, stages.starts, copies_to_disk=True))
    words = text(expand(plan, stages, shape, copying, 0))
    assert [word for word in words if not word.startswith(("SAVE", "LOAD"))] == without
    assert words[words.index("F0.1") + 1] == "SAVE a0.1"
    assert words.index("LOAD a0.1") < words.index("I0.1")
    assert "SAVE a1.1" not in words  # it keeps nothing
    policies = (Activations.RECOMPUTE, *[Activations.KEEP] * 7)
    assert "SAVE a0.1" not in text(expand(plan, stages, shape, replace(copying, activations=policies), 0))


def test_sums_over_stages_come_before_the_updates_of_their_chunks():
    late = actions_from(["F0.0", "B0.0", "NORM", "STEP c0", "STEP c1"])
    words = "F0.0, B0.0, REDUCE c1:tied, NORM, STEP c0, STEP c1"
    assert ", ".join(text(add_tied(late, [1]))) == words
    early = actions_from(["F0.0", "B0.0", "STEP c1", "STEP c0", "NORM"])
    words = "F0.0, B0.0, STEP c0, REDUCE c1:tied, STEP c1, NORM"
    assert ", ".join(text(add_tied(early, [1]))) == words


_ON_DISK = ChunkPlan(optimizer_home=Home.DISK, parameter_home=Home.DISK)
_SHARDED = ChunkPlan(GatheredFor.USE, True, True)
PLANS: dict[str, tuple[ChunkPlan, dict[str, Any]]] = {
    "in memory": (ChunkPlan(), {}),
    "slots on disk": (ChunkPlan(optimizer_home=Home.DISK), {}),
    "all on disk, updated early": (_ON_DISK, {"update": UpdateTime.BACKWARD}),
    "activations on disk": (ChunkPlan(), {"activations": (Activations.OFFLOAD_DISK,)}),
    "copies to disk": (ChunkPlan(), {"copies": True}),
    "bf16": (ChunkPlan(), {"precision": "bf16"}),
    "sharded": (_SHARDED, {"world_size": 2}),
    "sharded, on disk": (
        replace(_SHARDED, optimizer_home=Home.DISK, parameter_home=Home.DISK),
        {"world_size": 2, "update": UpdateTime.BACKWARD},
    ),
}


def program_of(name: str, ranks: int, count: int, rank: int, chunk: ChunkPlan, **words: Any) -> Any:
    """(program, shape, plan) of a rank that has two units in each stage, and the chunk of its last one tied."""
    order = schedule(name, ranks, count)
    num_stages = len(order.placement)
    starts = tuple(range(0, 2 * num_stages, 2))
    stages = Stages(starts, 2 * num_stages, order.placement, (False, *[True] * (num_stages - 1)))
    here = sorted(run for stage in stages.on(rank) for run in stages.runs(stage))
    units = tuple(
        UnitUse(f"u{run}", (here.index(run),) if run in here else (), True, run, PAGE) for run in range(stages.num_runs)
    )
    chunks = tuple(ChunkUse(PAGE, True, PAGE, 2 * PAGE) for _ in here)
    shape = StepShape(units, chunks, (), starts, (0, *[64] * (num_stages - 1)))
    pipeline = PipelinePlan(ranks, name, order.placement, starts, copies_to_disk=bool(words.pop("copies", False)))
    words["activations"] = words.get("activations", ()) * stages.num_runs
    fields: dict[str, Any] = {"world_size": 1, "precision": "float32", **words}
    decisions = (*[chunk] * (len(here) - 1), replace(chunk, parameter_home=Home.HOST))
    plan = Plan(
        zero=0, micro_batches=count, clips_gradients=False, prefetch=1, chunks=decisions, pipeline=pipeline, **fields
    )
    return compile_stages(shape, plan, order, stages, rank, [len(here) - 1]), shape, plan


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb-v"])
def test_what_is_received_comes_while_the_pass_before_its_use_computes_and_no_earlier(name: str):
    program, shape, _ = program_of(name, 2, 5, 1, ChunkPlan())
    ends: dict[Any, int] = {}  # pass of a stage -> its last action
    for position, instruction in enumerate(program.instructions):
        action = instruction.action
        if action.kind.is_compute:
            ends[action.kind, shape.stage_of(action.index or 0), action.micro_batch] = position
        elif action.kind in (Kind.RECV_F, Kind.RECV_B):
            assert instruction.lane is Lane.NET
            assert instruction.after == tuple(list(ends.values())[-2:-1])
        elif action.kind in (Kind.SEND_F, Kind.SEND_B):
            assert instruction.lane is Lane.COMPUTE
            assert instruction.after == (max(ends.values()),)


@pytest.mark.parametrize("key", PLANS)
def test_programs_of_every_schedule_are_verified(key: str):
    chunk, words = PLANS[key]
    for name in NAMES:
        for ranks, count, rank in ((2, 5, 0), (4, 3, 3)):
            verify(*program_of(name, ranks, count, rank, chunk, **words))


def test_what_is_left_out_of_a_stages_program_is_found():
    program, shape, plan = program_of("zb-v", 2, 3, 0, ChunkPlan(), copies=True)
    for position, instruction in enumerate(program.instructions):
        if instruction.action.slot == TIED:
            continue  # which chunks other ranks have a part in is not a rank's own knowledge
        kept = [i for at, i in enumerate(program.instructions) if at != position]
        moved = [replace(i, after=tuple(at - (at > position) for at in i.after if at != position)) for i in kept]
        with pytest.raises(InvalidProgram):
            verify(replace(program, instructions=tuple(moved)), shape, plan)


def test_stages_that_share_a_chunk_are_reduced_when_both_are_done():
    shape = StepShape(
        (UnitUse("a", (0,)), UnitUse("b", (1,), True, 1), UnitUse("c", (0,), True, 2)),
        (ChunkUse(PAGE), ChunkUse(PAGE)),
        starts=(0, 1, 2),
    )
    actions = actions_from(["F0.0", "F1.0", "F2.0", "I2.0", "I1.0", "W1.0", "I0.0", "W0.0", "W2.0"])
    words = text(add_reduces(actions, shape))
    assert words[-2:] == ["W2.0", "REDUCE c0.0"]
    updated = text(add_updates(actions, shape, UpdateTime.BACKWARD))
    assert updated[-3:] == ["W2.0", "STEP c0", "NORM"]
