"""A plan in memory that takes all that it could ever hold."""

from dataclasses import replace

import pytest
from steps import chain, plan_of

from outgrow.memory.direct_io import round_up
from outgrow.parallel.actions import Kind
from outgrow.scheduler.assessment import Open
from outgrow.scheduler.passes import compile_program
from outgrow.scheduler.plan import Activations, ChunkPlan, Plan
from outgrow.scheduler.program import StepShape
from outgrow.scheduler.spare import without_bounds

OPEN = Open(homes=False, activations=False, order=False, update=False)


def on_disk(micro_batches: int = 2) -> tuple[StepShape, Plan]:
    shape = chain(*[(chunk,) for chunk in range(6)])
    return shape, plan_of(shape, micro_batches=micro_batches, prefetch=1, update="backward")


def num_reads(shape: StepShape, plan: Plan) -> list[int]:
    """Of the parameters of each chunk, in a step."""
    reads = compile_program(shape, plan).actions(Kind.READ)
    return [sum(each.index == chunk and each.slot == "param" for each in reads) for chunk in range(len(plan.chunks))]


def test_parameters_are_read_once_a_step_however_many_micro_batches_there_are() -> None:
    shape, plan = on_disk()
    assert num_reads(shape, plan)[0] > 1
    assert set(num_reads(shape, without_bounds(plan, OPEN, shape))) == {1}


def test_reads_come_two_uses_ahead_or_farther_where_they_did() -> None:
    shape, plan = on_disk()
    assert [without_bounds(replace(plan, prefetch=far), OPEN, shape).prefetch for far in (0, 1, 2, 3)] == [2, 2, 2, 3]


def test_activations_on_their_way_count_for_every_micro_batch() -> None:
    shape, plan = on_disk(micro_batches=3)
    shape = replace(shape, units=tuple(replace(unit, saved_bytes=1 << 20) for unit in shape.units))
    plan = replace(plan, activations=(Activations.OFFLOAD_DISK,) * len(shape.units))
    state_bytes = sum(round_up(chunk.param_bytes) + round_up(chunk.optim_bytes) for chunk in shape.chunks)
    found = without_bounds(plan, OPEN, shape)
    assert found.cache_bytes == state_bytes + 3 * len(shape.units) * (1 << 20)


@pytest.mark.parametrize("far", [0, 1])
def test_what_was_given_whole_or_moves_nothing_stays_as_it_is(far: int) -> None:
    shape, plan = on_disk()
    plan = replace(plan, prefetch=far)
    assert without_bounds(plan, replace(OPEN, may_adapt=False), shape) == plan
    in_memory = replace(plan, chunks=tuple(ChunkPlan() for _ in plan.chunks))
    assert without_bounds(in_memory, OPEN, shape) == in_memory
