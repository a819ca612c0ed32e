"""The fullest moment on a device with memory of its own, for a chain that can be added up by hand."""

from dataclasses import replace

import pytest
from chain import DEPTH, WEIGHT_BYTES, WIDTH, profile_of

from outgrow.scheduler.device_ledger import device_ledger
from outgrow.scheduler.ledger import HostFigures, Ledger, host_ledger
from outgrow.scheduler.memory_profile import MemoryProfile
from outgrow.scheduler.passes import compile_program
from outgrow.scheduler.plan import Activations, ChunkPlan, Home, MicroBatchOrder, Plan, UpdateTime
from outgrow.scheduler.program import ChunkUse, StepShape, UnitUse

SAMPLES = 512
BATCH_BYTES = 4 * WIDTH * SAMPLES
HOST = ChunkPlan()
DEVICE = ChunkPlan(parameter_home=Home.DEVICE, optimizer_home=Home.DEVICE)
SHAPE = StepShape(
    tuple(UnitUse(str(number), (number,), True, number, 3 * BATCH_BYTES) for number in range(DEPTH)),
    tuple(ChunkUse(WEIGHT_BYTES, True, WEIGHT_BYTES, 2 * WEIGHT_BYTES) for _ in range(DEPTH)),
)


@pytest.fixture(scope="module")
def profile() -> MemoryProfile:
    """Activations rule: the fullest moment is at the turn."""
    return profile_of(SAMPLES)


def ledgers(profile: MemoryProfile, chunk: ChunkPlan = HOST, **words: object) -> tuple[Ledger, Ledger]:
    """The device's and the host's."""
    plan = Plan(1, 0, 1, "float32", False, 1, (chunk,) * DEPTH, unified=False)
    plan = replace(plan, **words)  # pyright: ignore[reportArgumentType]
    program = compile_program(SHAPE, plan)
    each = dict.fromkeys(range(DEPTH), WEIGHT_BYTES)
    resident = dict.fromkeys(each, 3 * WEIGHT_BYTES)
    here, there = (resident, each) if chunk is DEVICE else ({}, {})
    device = HostFigures(0, here, there, 0, {}, True, 0)
    on_host = {} if chunk is DEVICE else each
    host = HostFigures(1000, {} if chunk is DEVICE else resident, on_host, 0, {}, True, 5)
    return (
        device_ledger(program, SHAPE, plan, profile, device, BATCH_BYTES),
        host_ledger(program, SHAPE, plan, profile, host),
    )


def test_the_parts_add_up_to_the_peak(profile: MemoryProfile) -> None:
    for ledger in ledgers(profile):
        assert sum(ledger.parts.values()) == ledger.peak_bytes
        assert ledger.where


def test_what_is_at_home_on_the_device_is_there_all_the_time(profile: MemoryProfile) -> None:
    device, host = ledgers(profile, DEVICE)
    assert device.parts["state"] == DEPTH * 3 * WEIGHT_BYTES
    assert device.parts["sums"] == DEPTH * WEIGHT_BYTES
    assert device.parts["buffers"] == 0
    assert host.parts["state"] == host.parts["buffers"] == host.parts["activations"] == 0


def test_what_is_at_home_on_the_host_takes_buffers_for_what_is_used_now_and_next(profile: MemoryProfile) -> None:
    device, host = ledgers(profile)
    assert device.parts["state"] == device.parts["sums"] == 0
    assert device.parts["buffers"] == 2 * WEIGHT_BYTES
    assert host.parts["state"] == DEPTH * 3 * WEIGHT_BYTES
    assert host.parts["activations"] == 0, "they are on the device"
    assert host.parts["gradients"] == DEPTH * WEIGHT_BYTES


def test_gradients_on_their_way_down_are_counted() -> None:
    """Those of the unit whose backward ran last may still be there; a unit's own are in its activations."""
    small = profile_of(4)  # gradients rule
    for update in UpdateTime:
        device, _ = ledgers(small, update=update)
        assert device.parts["gradients"] == WEIGHT_BYTES
        assert device.where in {f"B{unit}.0" for unit in range(DEPTH - 1)}


def test_activations_on_the_host_are_not_on_the_device(profile: MemoryProfile) -> None:
    kept, host_kept = ledgers(profile)
    moved, host_moved = ledgers(profile, activations=(Activations.OFFLOAD_HOST,) * DEPTH)
    assert moved.parts["activations"] < kept.parts["activations"]
    assert host_moved.parts["buffers"] >= host_kept.parts["buffers"] + (DEPTH - 2) * 3 * BATCH_BYTES
    recomputed, _ = ledgers(profile, activations=(Activations.RECOMPUTE,) * DEPTH)
    assert recomputed.peak_bytes < kept.peak_bytes


def test_inputs_of_all_micro_batches_count_where_they_take_turns(profile: MemoryProfile) -> None:
    sequential, _ = ledgers(profile, micro_batches=3)
    by_unit, _ = ledgers(profile, micro_batches=3, order=MicroBatchOrder.BY_UNIT)
    assert sequential.parts["inputs"] == BATCH_BYTES
    assert by_unit.parts["inputs"] == 3 * BATCH_BYTES
