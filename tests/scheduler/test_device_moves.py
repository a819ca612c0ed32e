"""Programs for a device with memory of its own: UP, DOWN, SAVE, LOAD and DROP on the text form, then played."""

import random
from dataclasses import replace

import pytest
from steps import PAGE, chain, plan_of, random_plan, random_shape, read, separate, text, with_saved
from walker import Walker

from outgrow.parallel.actions import Action, Kind
from outgrow.scheduler.moves import add_uploads, copies_of, optimum_moved_bytes
from outgrow.scheduler.passes import add_gathers, compile_program, order_micro_batches
from outgrow.scheduler.plan import Activations, ChunkPlan, Home, Plan
from outgrow.scheduler.program import Lane, Program, StepShape

TWO = chain((0,), (1,))
THREE = chain((0,), (1,), (2,))
HOST = ChunkPlan()
DEVICE = ChunkPlan(parameter_home=Home.DEVICE, optimizer_home=Home.DEVICE)


def apart(plan: Plan, *chunks: ChunkPlan, **changes: object) -> Plan:
    """The plan on a device with memory of its own; `chunks` instead of those that it has."""
    return replace(plan, unified=False, chunks=chunks or plan.chunks, **changes)  # pyright: ignore[reportArgumentType]


def check(program: Program, expected: str) -> None:
    assert text(program.actions()) == text(read(expected))


def lanes(program: Program) -> dict[str, str]:
    return {str(i.action): str(i.lane) for i in program.instructions}


def waits(program: Program, action: str) -> set[str]:
    actions = program.actions()
    position = actions.index(Action.parse(action))
    return {str(actions[before]) for before in program.instructions[position].after}


# ---- by hand


def test_parameters_at_home_on_the_host_come_up_and_gradients_go_down():
    program = compile_program(TWO, apart(plan_of(TWO), HOST, HOST))
    check(
        program,
        """UP c0:param, F0.0, DROP c0:device, UP c1:param, F1.0, B1.0, DROP c1:device, DOWN c1.0:grad, REDUCE c1.0
        UP c0:param, B0.0, DROP c0:device, DOWN c0.0:grad, REDUCE c0.0, NORM, STEP c0, STEP c1""",
    )
    assert {b.name: b.tier for b in program.buffers} == {
        "c0:device": "device", "c1:device": "device", "c0:grad": "host", "c1:grad": "host",
    }  # fmt: skip
    assert program.arena_bytes("device") == program.arena_bytes("host") == PAGE, "one at a time"
    found = lanes(program)
    assert found["UP c0:param"] == Lane.H2D
    assert found["DOWN c1.0:grad"] == found["REDUCE c1.0"] == Lane.D2H
    assert found["DROP c0:device"] == Lane.COMPUTE
    assert waits(program, "F1.0") == {"UP c1:param"}
    assert waits(program, "UP c1:param") == {"UP c0:param", "DROP c0:device"}
    assert waits(program, "REDUCE c1.0") == {"DOWN c1.0:grad"}
    assert "DOWN c1.0:grad" not in waits(program, "B0.0"), "computing goes on meanwhile"


def test_what_is_at_home_on_the_device_does_not_move():
    program = compile_program(TWO, apart(plan_of(TWO), DEVICE, DEVICE))
    check(program, "F0.0, F1.0, B1.0, REDUCE c1.0, B0.0, REDUCE c0.0, NORM, STEP c0, STEP c1")
    assert program.buffers == ()
    assert set(lanes(program).values()) == {Lane.COMPUTE}


def test_from_disk_over_the_host_to_the_device():
    program = compile_program(TWO, apart(plan_of(TWO, update="backward"), device_cache_bytes=0))
    rest = program.without_carried()
    check(
        rest,
        """READ c0:param, UP c0:param, DROP c0:param, F0.0, DROP c0:device
        READ c1:param, UP c1:param, F1.0, B1.0, DROP c1:device, DOWN c1.0:grad, REDUCE c1.0
        READ c1:optim, STEP c1, WRITE c1:param, WRITE c1:optim
        READ c0:param, UP c0:param, B0.0, DROP c0:device, DOWN c0.0:grad, REDUCE c0.0, READ c0:optim, STEP c0, NORM""",
    )
    assert lanes(rest)["DROP c0:param"] != Lane.COMPUTE, "computing does not wait for it"


def test_with_room_on_the_device_each_chunk_comes_up_once_a_step():
    for micro_batches, order in ((1, "sequential"), (3, "sequential"), (3, "by-unit")):
        plan = plan_of(THREE, micro_batches=micro_batches, order=order, prefetch=1)
        program = compile_program(THREE, apart(plan, HOST, HOST, HOST, device_cache_bytes=1 << 30))
        assert len(program.actions(Kind.UP)) == 3
        assert len(program.actions(Kind.DOWN)) == 3 * micro_batches


def test_ups_are_so_many_uses_ahead():
    program = compile_program(THREE, apart(plan_of(THREE, prefetch=1), HOST, HOST, HOST))
    moves = [a for a in program.actions() if a.kind in (Kind.UP, Kind.F, Kind.B)]
    assert text(moves) == text(
        read("UP c0:param, UP c1:param, F0.0, UP c2:param, F1.0, F2.0, B2.0, UP c0:param, B1.0, B0.0")
    )


def test_several_ranks_gather_on_the_device():
    sharded = plan_of(TWO, ranks=2, update="backward")
    chunks = tuple(replace(c, parameter_home=Home.HOST, optimizer_home=Home.HOST) for c in sharded.chunks)
    program = compile_program(TWO, apart(sharded, *chunks))
    check(
        program,
        """UP c0:param, GATHER c0.0, DROP c0:device, F0.0, UP c1:param, GATHER c1.0, DROP c1:device, DROP c0.0
        F1.0, B1.0, DOWN c1.0:grad, REDUCE c1.0, STEP c1
        UP c0:param, GATHER c0.0, DROP c0:device, DROP c1.0, B0.0, DOWN c0.0:grad, REDUCE c0.0, STEP c0, DROP c0.0
        NORM""",
    )
    assert lanes(program)["DROP c0:device"] == lanes(program)["REDUCE c0.0"] == Lane.NET


@pytest.mark.parametrize(
    ("word", "lane", "tiers"),
    [
        (Activations.OFFLOAD_HOST, ("d2h", "h2d"), {"a0.0": "host", "a0.0:device": "device"}),
        (Activations.OFFLOAD_DISK, ("write", "read"), {"a0.0": "host", "a0.0:device": "device"}),
    ],
)
def test_activations_leave_the_device(word: Activations, lane: tuple[str, str], tiers: dict[str, str]) -> None:
    shape = replace(THREE, units=tuple(replace(unit, saved_bytes=PAGE) for unit in THREE.units))
    plan = apart(plan_of(shape), DEVICE, DEVICE, DEVICE, activations=(word, Activations.KEEP, Activations.KEEP))
    program = compile_program(shape, plan)
    check(
        program,
        """F0.0, SAVE a0.0, F1.0, F2.0, B2.0, REDUCE c2.0, B1.0, REDUCE c1.0, LOAD a0.0, B0.0, REDUCE c0.0, NORM
        STEP c0, STEP c1, STEP c2""",
    )
    assert {b.name: b.tier for b in program.buffers} == tiers
    assert (lanes(program)["SAVE a0.0"], lanes(program)["LOAD a0.0"]) == lane


def test_what_is_saved_to_the_host_keeps_its_bytes_until_it_is_loaded():
    shape = replace(THREE, units=tuple(replace(unit, saved_bytes=PAGE) for unit in THREE.units))
    plan = apart(plan_of(shape), DEVICE, DEVICE, DEVICE)
    to_host = compile_program(shape, replace(plan, activations=(Activations.OFFLOAD_HOST,) * 3))
    to_disk = compile_program(shape, replace(plan, activations=(Activations.OFFLOAD_DISK,) * 3))
    assert to_host.arena_bytes("host") == 2 * PAGE, "the last unit's stay where they are"
    assert to_disk.arena_bytes("host") == PAGE
    assert to_host.arena_bytes("device") == to_disk.arena_bytes("device") == PAGE


def test_on_a_unified_machine_nothing_goes_up_or_down():
    plan = plan_of(THREE, "optimizer")
    program = compile_program(THREE, replace(plan, activations=(Activations.OFFLOAD_HOST,) * 3))
    assert not [a for a in program.actions() if a.kind in (Kind.UP, Kind.DOWN, Kind.SAVE, Kind.LOAD)]


# ---- any plan


def any_case(seed: int) -> tuple[StepShape, Plan, random.Random]:
    rng = random.Random(seed)
    shape = with_saved(random_shape(rng), rng)
    return shape, separate(rng, shape, random_plan(rng, shape)), rng


def play(shape: StepShape, plan: Plan, rng: random.Random, program: Program) -> None:
    walker = Walker(shape, plan, rng)
    for part in (program.without_carried(), program, program, program.only_carried()):
        walker.play(part)
    walker.finish()


@pytest.mark.parametrize("seed", range(400))
def test_every_use_finds_its_data_on_the_device_whatever_the_timing(seed: int) -> None:
    shape, plan, rng = any_case(seed)
    play(shape, plan, rng, compile_program(shape, plan))


def test_the_walker_sees_what_is_wrong_between_host_and_device():
    """Programs that lack a dependency or a move that they need."""
    shape = replace(TWO, units=tuple(replace(unit, saved_bytes=PAGE) for unit in TWO.units))
    plan = apart(plan_of(shape, prefetch=1), HOST, HOST, activations=(Activations.OFFLOAD_HOST,) * 2)
    program = compile_program(shape, plan)
    caught: set[Kind] = set()
    for position, instruction in enumerate(program.instructions):
        for before in instruction.after:
            lacking = replace(instruction, after=tuple(p for p in instruction.after if p != before))
            parts = (*program.instructions[:position], lacking, *program.instructions[position + 1 :])
            broken = replace(program, instructions=parts)
            if any(fails(shape, plan, broken, seed) for seed in range(12)):
                caught |= {instruction.action.kind, program.instructions[before].action.kind}
    assert caught >= {Kind.UP, Kind.DOWN, Kind.SAVE, Kind.LOAD, Kind.REDUCE, Kind.F, Kind.B}


def fails(shape: StepShape, plan: Plan, program: Program, seed: int) -> bool:
    try:
        play(shape, plan, random.Random(seed), program)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("seed", range(80))
def test_no_step_can_bring_less_to_the_device(seed: int) -> None:
    rng = random.Random(seed)
    shape = random_shape(rng)
    shape = replace(shape, chunks=tuple(replace(use, param_bytes=PAGE) for use in shape.chunks))
    plan = separate(rng, shape, random_plan(rng, shape))
    plan = replace(plan, prefetch=0, micro_batches=rng.randint(1, 2))
    actions = order_micro_batches(shape, plan.micro_batches, plan.order)
    if plan.world_size > 1:
        actions = add_gathers(actions, shape, plan)
    least = max((PAGE * len(copies_of(action, shape, plan)) for action in actions), default=0)
    capacity = least + rng.randint(0, 2) * PAGE
    moved = add_uploads(actions, shape, replace(plan, device_cache_bytes=capacity))
    ups = [action for action in moved.actions if action.kind is Kind.UP]
    assert PAGE * len(ups) == optimum_moved_bytes(actions, shape, plan, capacity, copies_of)


@pytest.mark.parametrize("seed", range(60))
def test_programs_read_back_from_their_text(seed: int) -> None:
    shape, plan, _ = any_case(seed)
    program = compile_program(shape, plan)
    assert Program.parse(program.text()) == program
