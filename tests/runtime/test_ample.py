"""In ample memory freed blocks stay from step to step, as far as was said before the first one."""

from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from outgrow.memory.budget import Memory
from outgrow.memory.process import read_process_memory
from outgrow.parallel.actions import Kind
from outgrow.runtime import planning, prepared
from outgrow.runtime.assessing import Assessor
from outgrow.runtime.engine import Engine
from outgrow.scheduler.assessment import Assessment
from outgrow.scheduler.plan import Plan
from outgrow.scheduler.spare import FAR

BATCH = torch.ones(4, 64), torch.ones(4, 64)


def predicted_engine(host_bytes: int, is_fused: bool | None = None) -> Engine:
    return Engine(
        nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)),
        optimizer=partial(torch.optim.AdamW, lr=0.1, fused=is_fused),
        loss=nn.functional.mse_loss,
        memory=Memory(host=host_bytes),
        predict=True,
        example=BATCH,
    )


def test_a_prediction_counts_the_freed_blocks_that_stay_and_they_are_held_to_it() -> None:
    budget = 4 * read_process_memory().resident_bytes
    engine = predicted_engine(budget)
    try:
        assert engine.prediction is not None
        (tier,) = engine.prediction.tiers
        assert tier.budget_bytes == budget
        assert tier.peak_bytes < budget
        assert sum(tier.parts.values()) == tier.peak_bytes
        made_bytes = tier.peak_bytes - sum(tier.parts[name] for name in ("process", "reserve", "freed blocks"))
        assert 0 < tier.parts["freed blocks"] <= 0.2 * made_bytes
        assert engine.plan.keeps_freed
        engine.step(BATCH)
        assert engine._heap is not None
        before = engine._heap.num_returns
        spare = tier.peak_bytes - read_process_memory().resident_bytes
        engine._heap.make_room(spare + (8 << 20))
        assert engine._heap.num_returns == before + 1
        engine._heap.make_room(1 << 20)
        assert engine._heap.num_returns == before + 1
    finally:
        engine.close()


class Room:
    """Writes down how many steps ended, and with which budget it was made."""

    made: ClassVar[list["Room"]] = []

    def __init__(self, budget_bytes: int | None) -> None:
        self.budget_bytes, self.num_steps = budget_bytes, 0
        self.made.append(self)

    def end_step(self) -> None:
        self.num_steps += 1


@pytest.mark.parametrize(
    ("offload", "host", "is_predicted", "ends"),
    [("all", None, False, [3]), ("none", None, False, [0]), ("all", None, True, [0]), ("all", 0.25, False, [])],
    ids=["on-disk", "in-memory", "foretold", "tight"],
)
def test_where_a_disk_is_used_and_nothing_bounds_freed_blocks_there_is_room_for_the_next_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offload: str, host: float | None, is_predicted: bool, ends: list
) -> None:
    monkeypatch.setattr(prepared, "HeapRoom", Room)
    monkeypatch.setattr(Room, "made", [])
    host_bytes = (4 if host is None else 1 + host) * read_process_memory().resident_bytes
    model = nn.Sequential(*(nn.Linear(64 if host is None else 1024, 64 if host is None else 1024) for _ in range(3)))
    batch = tuple(each.repeat(1, model[0].in_features // 64) for each in BATCH)
    engine = Engine(
        model,
        optimizer=partial(torch.optim.AdamW, lr=0.1),
        loss=nn.functional.mse_loss,
        memory=Memory(host=int(host_bytes), disk=str(tmp_path)),
        offload=offload,
        predict=is_predicted,
    )
    try:
        for _ in range(3):
            engine.step(batch)
    finally:
        engine.close()
    assert [room.num_steps for room in Room.made] == ends
    assert all(room.budget_bytes == int(host_bytes) for room in Room.made)


class Heap:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.most_bytes = 0

    def begin_step(self) -> None:
        self.told.append("step")

    def end_steps(self) -> None:
        self.told.append("end")

    def make_room(self, growth_bytes: int) -> None:
        assert growth_bytes >= 0
        self.most_bytes = max(self.most_bytes, growth_bytes)


def test_freed_blocks_stay_between_steps_and_go_back_before_anything_else() -> None:
    engine = predicted_engine(4 * read_process_memory().resident_bytes)
    heap = Heap()
    try:
        engine._heap = heap  # pyright: ignore[reportAttributeAccessIssue]
        engine.step(BATCH)
        assert heap.told == [], "the first step makes what stays"
        engine.step(BATCH)
        engine.step(BATCH)
        assert heap.told == ["step", "step"]
        engine.state_dict()
        assert heap.told.pop() == "end"
        with engine.gathered():
            assert heap.told.pop() == "end"
        with suppress(RuntimeError):
            engine.step((torch.ones(4, 3), torch.ones(4, 3)))  # of another width
        assert heap.told == ["step"] * 3 + ["end"]
    finally:
        engine.close()
    assert heap.told.pop() == "end"


@pytest.mark.parametrize("is_fused", [True, False])
def test_what_an_update_makes_is_announced(is_fused: bool) -> None:
    """A fused one makes slots, the first time; another one takes memory each time."""
    engine = predicted_engine(4 * read_process_memory().resident_bytes, is_fused)
    heap = Heap()
    try:
        engine._heap = heap  # pyright: ignore[reportAttributeAccessIssue]
        assert engine.predicted is not None
        big = 1 << 40
        updates = [phase for phase in engine.predicted.growth_bytes if phase[0] == "STEP"]
        engine.predicted.growth_bytes[updates[0]] = big  # pyright: ignore[reportIndexIssue]
        engine.step(BATCH)
        assert heap.most_bytes == big
        heap.most_bytes = 0
        engine.step(BATCH)
        assert (heap.most_bytes == big) != is_fused
    finally:
        engine.close()


@pytest.mark.parametrize("predict", [False, True])
def test_what_is_on_disk_is_read_once_a_step_and_early(predict: bool, tmp_path: Path) -> None:
    """The room is there: nothing is dropped that this step uses again."""
    engine = Engine(
        nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)]),
        optimizer=partial(torch.optim.AdamW, lr=0.1, fused=True),
        loss=nn.functional.mse_loss,
        memory=Memory(host=4 * read_process_memory().resident_bytes, disk=tmp_path),
        offload="all",
        micro_batches=2,
        predict=predict,
        example=BATCH,
    )
    try:
        assert engine.plan.prefetch == FAR
        assert engine.plan.keeps_freed == predict
        assert engine.program is not None
        reads = [(each.index, each.slot) for each in engine.program.actions(Kind.READ)]
        assert len(reads) == len(set(reads)) == 2 * len(engine.plan.chunks)
    finally:
        engine.close()


def test_what_does_not_fit_that_way_is_read_as_late_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def boundless(plan: Plan, *_: object) -> Plan:
        tried.append(plan)
        return replace(plan, prefetch=7)

    def with_a_peak(self: Assessor, plan: Plan) -> Assessment:
        found = assess(self, plan)
        excess = 1 << 50 if plan.prefetch == 7 else 0
        return replace(found, ledger=replace(found.ledger, peak_bytes=found.ledger.peak_bytes + excess))

    tried: list[Plan] = []
    assess = Assessor.assess
    monkeypatch.setattr(planning, "without_bounds", boundless)
    monkeypatch.setattr(Assessor, "assess", with_a_peak)
    engine = predicted_engine(4 * read_process_memory().resident_bytes)
    try:
        assert tried
        assert engine.plan.prefetch == tried[0].prefetch == 1
        assert engine.plan.keeps_freed, "the memory is ample all the same"
    finally:
        engine.close()
