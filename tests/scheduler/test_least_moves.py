"""The fewest bytes that steps can read: against the search over whole slots, and against programs."""

import random
from dataclasses import replace

import pytest
from steps import PAGE, chain, plan_of, random_plan, random_shape

from outgrow.parallel.actions import Action, Kind
from outgrow.scheduler.least_moves import least_read_bytes
from outgrow.scheduler.moves import items_of, optimum_moved_bytes
from outgrow.scheduler.passes import compile_program
from outgrow.scheduler.plan import Home

FORWARD = list(range(8))


def forwards(units: list[int]) -> list[Action]:
    return [Action(Kind.F, unit, moment) for moment, unit in enumerate(units)]


@pytest.mark.parametrize(("capacity", "num_pages"), [(8, 0), (7, 1), (4, 4), (1, 8)])
def test_a_zigzag_reads_what_does_not_fit_once_each_way(capacity: int, num_pages: int) -> None:
    shape = chain(*((c,) for c in range(8)), frozen=tuple(range(8)))
    actions = forwards(FORWARD + FORWARD[::-1])
    least = least_read_bytes(actions, shape, plan_of(shape), capacity * PAGE)
    assert least == (2 * num_pages if capacity > 1 else 14) * PAGE


def test_a_part_of_a_slot_may_stay() -> None:
    shape = chain((0,), (1,), frozen=(0, 1))
    least = least_read_bytes(forwards([0, 1]), shape, plan_of(shape), PAGE + PAGE // 4)
    assert least == 2 * (PAGE - PAGE // 4), "a quarter of each stays"


def test_an_action_that_needs_more_than_there_is() -> None:
    shape = chain((0, 1), frozen=(0, 1))
    with pytest.raises(ValueError, match="an action needs 8,192 bytes of slots, and there is room for 4,096"):
        least_read_bytes(forwards([0]), shape, plan_of(shape), PAGE)


@pytest.mark.parametrize("seed", range(60))
def test_no_search_over_whole_slots_finds_fewer(seed: int) -> None:
    rng = random.Random(seed)
    shape = random_shape(rng)
    plan = replace(random_plan(rng, shape), world_size=1, micro_batches=rng.randint(1, 2))
    actions = compile_program(shape, replace(plan, prefetch=0)).actions()
    largest = max((sum(size(item, shape) for item in items_of(a, shape, plan)) for a in actions), default=0)
    capacity = largest + rng.randint(0, 2) * PAGE
    assert least_read_bytes(actions, shape, plan, capacity) <= optimum_moved_bytes(actions, shape, plan, capacity)


def size(item, shape) -> int:
    chunk = shape.chunks[item.chunk]
    return chunk.optim_bytes if item.slot == "optim" else chunk.param_bytes


@pytest.mark.parametrize("seed", range(60))
def test_no_program_reads_less(seed: int) -> None:
    rng = random.Random(500 + seed)
    shape = random_shape(rng)
    plan = replace(random_plan(rng, shape), world_size=1)
    program = compile_program(shape, plan)
    reads = sum(each.num_bytes for each in program.instructions if each.action.kind is Kind.READ)
    assert reads >= least_read_bytes(program.actions(), shape, plan, program.arena_bytes("host"))
    if any(chunk.parameter_home is Home.DISK for chunk in plan.chunks):
        assert least_read_bytes(program.actions(), shape, plan, 1 << 40) == 0, "everything stays"
