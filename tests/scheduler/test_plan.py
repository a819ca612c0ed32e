"""Plans: JSON that reads back, decisions that go together."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outgrow.memory.chunk import layout_chunk
from outgrow.scheduler.plan import ChunkPlan, GatheredFor, Plan, plan_for_zero

DECISIONS = st.sampled_from(
    [
        ChunkPlan(),
        ChunkPlan(optimizer_sharded=True),
        ChunkPlan(gradients_sharded=True, optimizer_sharded=True),
        ChunkPlan(GatheredFor.PASS, True, True),
        ChunkPlan(GatheredFor.USE, True, True),
    ]
)
PLANS = st.builds(
    Plan,
    world_size=st.integers(1, 64),
    zero=st.integers(0, 3),
    micro_batches=st.integers(1, 16),
    precision=st.sampled_from(["float32", "bf16"]),
    clips_gradients=st.booleans(),
    prefetch=st.integers(0, 4),
    chunks=st.lists(DECISIONS, max_size=5).map(tuple),
)
LAYOUTS = [layout_chunk(i, f"u{i}", [(f"p{i}", torch.empty(3))], torch.float32, True) for i in range(3)]


@given(PLANS)
def test_json_reads_back(plan):
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    assert Plan.from_json(text).to_json() == text
    assert all(isinstance(chunk.gathered_for, GatheredFor) for chunk in Plan.from_json(text).chunks)


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
        changed(chunks=[{"gathered_for": "use", "gradients_sharded": True}]),
        changed(chunks=[{"gathered_for": "use", "wings": 2}]),
        json.dumps({"world_size": 2, "chunks": []}),
    ],
)
def test_text_that_is_no_plan_is_refused(text):
    with pytest.raises(ValueError):
        Plan.from_json(text)
