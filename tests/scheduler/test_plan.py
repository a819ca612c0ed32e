"""Plans: JSON that reads back, decisions that go together."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outgrow.memory.chunk import layout_chunk
from outgrow.scheduler.plan import (
    Activations,
    ChunkPlan,
    GatheredFor,
    Home,
    MicroBatchOrder,
    Plan,
    UpdateTime,
    plan_for_zero,
)

DECISIONS = st.sampled_from(
    [
        ChunkPlan(),
        ChunkPlan(optimizer_sharded=True),
        ChunkPlan(gradients_sharded=True, optimizer_sharded=True),
        ChunkPlan(GatheredFor.PASS, True, True),
        ChunkPlan(GatheredFor.USE, True, True),
        ChunkPlan(parameter_home=Home.DISK),
        ChunkPlan(optimizer_sharded=True, optimizer_home=Home.DISK),
        ChunkPlan(GatheredFor.USE, True, True, Home.DISK, Home.DISK),
    ]
)


def plan_with(clips_gradients: bool, update: UpdateTime, **fields: object) -> Plan:
    """A plan; what waits for the norm is updated after the backward."""
    update = UpdateTime.AFTER if clips_gradients else update
    return Plan(clips_gradients=clips_gradients, update=update, **fields)  # pyright: ignore[reportArgumentType]


PLANS = st.builds(
    plan_with,
    world_size=st.integers(1, 64),
    zero=st.integers(0, 3),
    micro_batches=st.integers(1, 16),
    precision=st.sampled_from(["float32", "bf16"]),
    clips_gradients=st.booleans(),
    prefetch=st.integers(0, 4),
    chunks=st.lists(DECISIONS, max_size=5).map(tuple),
    activations=st.lists(st.sampled_from(Activations), max_size=5).map(tuple),
    order=st.sampled_from(MicroBatchOrder),
    update=st.sampled_from(UpdateTime),
    unified=st.booleans(),
    cache_bytes=st.integers(0, 1 << 50),
    device_cache_bytes=st.integers(0, 1 << 50),
)
ON_DEVICE = ChunkPlan(parameter_home=Home.DEVICE, optimizer_home=Home.DEVICE)
LAYOUTS = [layout_chunk(i, f"u{i}", [(f"p{i}", torch.empty(3))], torch.float32, True) for i in range(3)]


@given(PLANS)
def test_json_reads_back(plan):
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    assert Plan.from_json(text).to_json() == text
    again = Plan.from_json(text)
    assert all(isinstance(chunk.gathered_for, GatheredFor) for chunk in again.chunks)
    assert all(isinstance(chunk.parameter_home, Home) for chunk in again.chunks)
    assert all(isinstance(word, Activations) for word in again.activations)
    assert isinstance(again.order, MicroBatchOrder)
    assert isinstance(again.update, UpdateTime)


def test_plans_from_before_there_was_a_disk_read_as_what_they_were():
    fields = json.loads(plan_for_zero(LAYOUTS, 3, 2).to_json())
    for name in ("activations", "order", "update", "unified", "cache_bytes", "device_cache_bytes"):
        del fields[name]
    for chunk in fields["chunks"]:
        del chunk["parameter_home"], chunk["optimizer_home"]
    assert Plan.from_json(json.dumps(fields)) == plan_for_zero(LAYOUTS, 3, 2)


def test_what_uses_the_disk():
    plan = plan_for_zero(LAYOUTS, 0, 1)
    assert not plan.uses_disk
    for chunk in (ChunkPlan(parameter_home=Home.DISK), ChunkPlan(optimizer_home=Home.DISK)):
        assert replace(plan, chunks=(ChunkPlan(), chunk, ChunkPlan())).uses_disk
    assert replace(plan, activations=(Activations.KEEP, Activations.OFFLOAD_DISK)).uses_disk
    assert not replace(plan, activations=(Activations.RECOMPUTE, Activations.OFFLOAD_HOST)).uses_disk


def test_what_is_at_home_on_a_device_with_memory_of_its_own():
    plan = replace(plan_for_zero(LAYOUTS, 0, 1), unified=False, chunks=(ON_DEVICE, ChunkPlan(), ChunkPlan()))
    assert Plan.from_json(plan.to_json()) == plan
    assert [plan.brings_up(chunk) for chunk in range(3)] == [False, True, True]
    assert [plan.updates_on_host(chunk) for chunk in range(3)] == [False, True, True]
    assert plan.sums_gradients
    assert not plan.uses_disk
    unified = plan_for_zero(LAYOUTS, 0, 1)
    assert not any(unified.brings_up(chunk) or unified.updates_on_host(chunk) for chunk in range(3))
    with pytest.raises(ValueError, match="that home is called 'host' there"):
        replace(plan, unified=True)


def test_activations_move_where_they_leave_the_memory_that_is_computed_in():
    plan = replace(plan_for_zero(LAYOUTS, 0, 1), activations=tuple(Activations))
    assert [plan.moves_activations(unit) for unit in range(4)] == [False, False, False, True]
    assert [replace(plan, unified=False).moves_activations(unit) for unit in range(4)] == [False, False, True, True]


def test_activations_are_kept_where_nothing_is_said():
    plan = plan_for_zero(LAYOUTS, 0, 1)
    assert plan.activations_of(2) is Activations.KEEP
    plan = replace(plan, activations=(Activations.KEEP, Activations.RECOMPUTE))
    assert plan.activations_of(1) is Activations.RECOMPUTE
    assert [word.is_offloaded for word in Activations] == [False, False, True, True, False]
    assert [word.is_recomputed for word in Activations] == [False, True, False, False, True]


def test_updates_inside_the_backward_cannot_wait_for_the_norm():
    with pytest.raises(ValueError, match=r"update='backward' cannot be with clip_grad_norm.*use update='after'"):
        Plan(1, 0, 1, "float32", True, 1, (), update=UpdateTime.BACKWARD)


@pytest.mark.parametrize(
    ("zero", "decision", "parameters_sharded"),
    [
        (0, ChunkPlan(GatheredFor.STEP, False, False), False),
        (1, ChunkPlan(GatheredFor.STEP, False, True), False),
        (2, ChunkPlan(GatheredFor.STEP, True, True), False),
        (3, ChunkPlan(GatheredFor.USE, True, True), True),
    ],
)
def test_zero_stages_are_points_of_the_space(zero, decision, parameters_sharded):
    plan = plan_for_zero(LAYOUTS, zero, 4, micro_batches=2, precision="bf16", clips_gradients=True, prefetch=3)
    assert plan == Plan(4, zero, 2, "bf16", True, 3, (decision,) * 3)
    assert all(chunk.parameters_sharded is parameters_sharded for chunk in plan.chunks)


@pytest.mark.parametrize("zero", [-1, 4, "3", 1.5, None])
def test_other_stages_are_refused(zero):
    with pytest.raises(ValueError, match="the stages are 0"):
        plan_for_zero(LAYOUTS, zero, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gradients_sharded": True}, "gradients are sharded but its optimizer slots are not"),
        ({"gathered_for": GatheredFor.USE, "optimizer_sharded": True}, "parameters are sharded but its gradients"),
        ({"gathered_for": GatheredFor.PASS}, "parameters are sharded but its gradients are not"),
        (
            {"optimizer_sharded": True, "parameter_home": Home.DISK},
            "gathered copy is never dropped cannot have its parameters at home on disk",
        ),
        ({"parameter_home": Home.DEVICE}, "at home on the device and its optimizer slots on the host"),
        ({"optimizer_home": Home.DEVICE}, "at home on the host and its optimizer slots on the device"),
    ],
)
def test_decisions_that_do_not_go_together_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ChunkPlan(**fields)


def changed(**fields: object) -> str:
    return json.dumps(json.loads(plan_for_zero(LAYOUTS, 3, 2).to_json()) | fields)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "7",
        "not json",
        changed(surprise=1),
        changed(chunks=7),
        changed(chunks=[{"gathered_for": "sometimes"}]),
        changed(chunks=[{}]),
        changed(chunks=[{"gathered_for": "step", "parameter_home": "cloud"}]),
        changed(chunks=[{"gathered_for": "step", "optimizer_home": 7}]),
        changed(order="zigzag"),
        changed(update="never"),
        changed(update="backward", clips_gradients=True),
        changed(activations=["forget"]),
        changed(activations="keep"),
        changed(activations=7),
        changed(chunks=[{"gathered_for": "use", "gradients_sharded": True}]),
        changed(chunks=[{"gathered_for": "use", "wings": 2}]),
        json.dumps({"world_size": 2, "chunks": []}),
    ],
)
def test_text_that_is_no_plan_is_refused(text):
    with pytest.raises(ValueError):
        Plan.from_json(text)
