"""Lanes, dependencies and buffers of programs with moves: by hand, then played in random orders by a walker."""

import random
from dataclasses import replace

import pytest
from steps import PAGE, chain, plan_of, random_plan, random_shape
from walker import Walker

from outgrow.memory.arena import most_alive_bytes
from outgrow.parallel.actions import Action, Kind
from outgrow.scheduler.passes import compile_program
from outgrow.scheduler.plan import Plan
from outgrow.scheduler.program import Lane, Program, StepShape

TWO = chain((0,), (1,))


def waits(program: Program) -> list[tuple[str, str, list[str]]]:
    actions = program.actions()
    return [(str(i.action), str(i.lane), [str(actions[before]) for before in i.after]) for i in program.instructions]


# ---- by hand


def test_a_program_with_everything_on_disk_by_hand():
    program = compile_program(TWO, plan_of(TWO, update="backward", prefetch=1))
    assert program.num_carried == 2
    assert waits(program) == [
        ("WRITE c0:param", "write", []),
        ("WRITE c0:optim", "write", []),
        ("READ c0:param", "read", []),
        ("READ c1:param", "read", []),
        ("F0.0", "compute", ["READ c0:param"]),
        ("READ c1:optim", "read", []),
        ("F1.0", "compute", ["READ c1:param"]),
        ("B1.0", "compute", ["READ c1:param", "F1.0"]),
        ("STEP c1", "compute", ["READ c1:param", "READ c1:optim", "F1.0", "B1.0"]),
        ("WRITE c1:param", "write", ["READ c1:param", "STEP c1"]),
        ("WRITE c1:optim", "write", ["READ c1:optim", "STEP c1"]),
        ("READ c0:optim", "read", ["WRITE c0:optim"]),
        ("B0.0", "compute", ["READ c0:param", "F0.0"]),
        ("STEP c0", "compute", ["WRITE c0:param", "READ c0:param", "F0.0", "READ c0:optim", "B0.0"]),
        ("NORM", "compute", ["STEP c1", "STEP c0"]),
    ]


def test_two_ranks_gather_from_the_shard_and_drop_it_on_the_lane_of_the_gather():
    program = compile_program(TWO, plan_of(TWO, "parameters", ranks=2))
    by_action = {action: (lane, after) for action, lane, after in waits(program)}
    assert by_action["DROP c0:param"] == ("net", ["READ c0:param", "GATHER c0.0"])
    assert by_action["DROP c0.0"][0] == "compute"
    assert "READ c1:param" in by_action["GATHER c1.0"][1]
    assert "GATHER c0.0" in by_action["F0.0"][1]
    assert "READ c0:param" not in by_action["F0.0"][1], "what is gathered is all that computing waits for"


def test_a_backward_action_waits_until_the_gradients_of_the_one_before_the_last_are_away():
    """Else a rank that is ahead of its peers would pile them up."""
    shape = chain((0,), (1,), (2,))
    program = compile_program(shape, plan_of(shape, "optimizer", ranks=2))
    after = {action: before for action, _, before in waits(program)}
    assert "REDUCE c2.0" in after["B0.0"]
    assert "REDUCE c1.0" not in after["B0.0"], "the exchange goes on meanwhile"
    assert "REDUCE c2.0" not in after["B1.0"]
    alone = compile_program(shape, replace(plan_of(shape, "optimizer"), precision="bf16"))
    assert not any(
        before.startswith("REDUCE") for action, _, found in waits(alone) for before in found if "B" in action
    )


def test_a_read_waits_for_all_that_used_its_bytes_before():
    shape = chain((0,), (1,), (2,))
    program = compile_program(shape, plan_of(shape, "parameters", update="backward"))
    places = {buffer.name: buffer.start_bytes for buffer in program.buffers}
    assert places == {"c0:param": 0, "c1:param": 0, "c2:param": 0}, "one page is enough"
    assert program.arena_bytes("host") == PAGE
    actions = program.actions()
    for position, action in enumerate(actions):
        if action.kind is Kind.READ and position > program.num_carried:
            before = [p for p in range(position) if actions[p].kind in (Kind.DROP, Kind.WRITE)]
            assert before[-1] in program.instructions[position].after, f"{action} at {position}"


def test_sizes_of_moves_and_buffers():
    shape = chain((0,), (1,), pages=3)
    program = compile_program(shape, plan_of(shape))
    sizes = {str(i.action): i.num_bytes for i in program.instructions if i.num_bytes}
    assert sizes["READ c0:param"] == sizes["WRITE c1:param"] == 3 * PAGE
    assert sizes["READ c0:optim"] == sizes["WRITE c1:optim"] == 6 * PAGE
    assert {buffer.name: buffer.num_bytes for buffer in program.buffers} == {
        "c0:param": 3 * PAGE,
        "c1:param": 3 * PAGE,
        "c0:optim": 6 * PAGE,
        "c1:optim": 6 * PAGE,
    }


def test_moves_are_on_lanes_of_their_own():
    program = compile_program(TWO, plan_of(TWO))
    lanes = {(i.action.kind, i.lane) for i in program.instructions if i.action.kind in (Kind.READ, Kind.WRITE)}
    assert lanes == {(Kind.READ, Lane.READ), (Kind.WRITE, Lane.WRITE)}


# ---- played


def play(shape: StepShape, plan: Plan, rng: random.Random, *programs: Program) -> Walker:
    walker = Walker(shape, plan, rng)
    for program in programs:
        walker.play(program)
    return walker


@pytest.mark.parametrize("seed", range(400))
def test_every_use_finds_its_slot_whatever_the_timing(seed):
    """A first step, two more, and what is left to write after the last."""
    rng = random.Random(seed)
    shape = random_shape(rng)
    plan = random_plan(rng, shape)
    program = compile_program(shape, plan)
    steps = (program.without_carried(), program, program, program.only_carried())
    play(shape, plan, rng, *steps).finish()


@pytest.mark.parametrize("seed", range(150))
def test_buffers_lie_in_an_arena_of_little_more_than_is_alive(seed):
    rng = random.Random(seed)
    shape = random_shape(rng)
    plan = random_plan(rng, shape)
    program = compile_program(shape, plan)
    alive = spans(program)
    sizes = {buffer.name: buffer.num_bytes for buffer in program.buffers}
    assert program.arena_bytes("host") >= most_alive_bytes(sizes, alive)
    everything = sum(sizes.values())
    assert program.arena_bytes("host") <= everything
    if plan.cache_bytes == 1 << 30:  # then nothing is read twice in a step
        reads = program.actions(Kind.READ)
        assert len(reads) == len(set(reads)), "all of it fits"


def spans(program: Program) -> dict[str, list[tuple[int, int]]]:
    """Buffer -> from each READ to the DROP or WRITE that ends it."""
    alive: dict[str, list[tuple[int, int]]] = {buffer.name: [] for buffer in program.buffers}
    begun: dict[str, int] = {}
    for position, action in enumerate(program.actions()):
        name = f"c{action.index}:{action.slot}"
        if action.kind is Kind.READ:
            begun[name] = position
        elif action.kind in (Kind.WRITE, Kind.DROP) and action.slot is not None and name in begun:
            alive[name].append((begun.pop(name), position))
    for name, first in begun.items():  # its WRITE is carried over
        alive[name].append((first, len(program.instructions)))
    return alive


def test_the_walker_sees_what_is_wrong():
    """Each of these programs lacks one dependency or move that it needs."""
    plan = plan_of(TWO, update="backward", prefetch=1)
    program = compile_program(TWO, plan)
    caught = 0
    for position, instruction in enumerate(program.instructions):
        for before in instruction.after:
            lacking = replace(instruction, after=tuple(p for p in instruction.after if p != before))
            broken = replace(
                program,
                instructions=(*program.instructions[:position], lacking, *program.instructions[position + 1 :]),
            )
            caught += any(fails(TWO, plan, broken, seed) for seed in range(12))
    assert caught >= 6, "the other dependencies follow from lanes and from each other"
    for position in range(program.num_carried, len(program.instructions)):
        if program.instructions[position].action.kind in (Kind.READ, Kind.WRITE, Kind.STEP):
            assert fails(TWO, plan, without(program, position), 0), program.instructions[position].action


def fails(shape: StepShape, plan: Plan, program: Program, seed: int) -> bool:
    steps = (program.without_carried(), program, program.only_carried())
    try:
        play(shape, plan, random.Random(seed), *steps).finish()
    except AssertionError:
        return True
    return False


def without(program: Program, gone: int) -> Program:
    """The program without one instruction; what waited for it waits for what it waited for."""
    rest = []
    for position, instruction in enumerate(program.instructions):
        if position == gone:
            continue
        after = {p for p in instruction.after if p != gone}
        if gone in instruction.after:
            after |= set(program.instructions[gone].after)
        rest.append(replace(instruction, after=tuple(sorted(p - (p > gone) for p in after))))
    return Program(tuple(rest), program.buffers, program.num_carried)


def test_carried_writes_are_those_that_nothing_in_their_own_step_waits_for():
    shape = chain((0,), (1,), (2,))
    program = compile_program(shape, plan_of(shape, prefetch=1))
    carried = program.only_carried().actions(Kind.WRITE)
    assert [str(a) for a in carried] == ["WRITE c1:param", "WRITE c1:optim", "WRITE c2:param", "WRITE c2:optim"]
    rest = program.without_carried()
    assert not set(carried) & set(rest.actions())
    assert rest.buffers == program.buffers
    assert Action.parse("WRITE c0:param") in rest.actions()
