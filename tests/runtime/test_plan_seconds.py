"""Costs that are remembered are those that would be worked out."""

from typing import Any

import pytest
from steps import PAGE, chain, plan_of

from outgrow.runtime.plan_seconds import remembered
from outgrow.scheduler.cost import Costs, TimeProfile, UnitSeconds
from outgrow.scheduler.hardware import DiskFigures, Hardware, NetFigures, Transfers
from outgrow.scheduler.passes import compile_program

THREE = chain((0,), (1,), (2,))
WRITES = Transfers(2 * PAGE, 0.25, 1.5, 0.5)
DISK = DiskFigures(Transfers(4 * PAGE, 0.125, 1.5, 0.25), WRITES, WRITES, 1.0)
MACHINE = Hardware("here", 2, 16 * PAGE, 32 * PAGE, 1024, 0.5, 0.25, 0.0, 0.0, DISK, NetFigures(PAGE, 0.5, PAGE, 0.5))
PROFILE = TimeProfile(tuple(UnitSeconds(1.0 + n, 2.0 + n, 0.5, 0.75) for n in range(3)), 0.5, 0.25, 1.25)


@pytest.mark.parametrize(
    "words",
    [
        {"on_disk": "optimizer"},
        {"on_disk": "optimizer", "order": "by-unit"},
        {"ranks": 2},
        {"update": "backward", "prefetch": 1},
    ],
)
def test_every_action_costs_what_it_would_alone(words: dict[str, Any]) -> None:
    plan = plan_of(THREE, micro_batches=3, **words)
    costs = Costs(THREE, plan, PROFILE, MACHINE, (512,) * 3)
    cost = remembered(costs)
    instructions = compile_program(THREE, plan).instructions
    assert [cost(each) for each in instructions] == [costs(each) for each in instructions]
    assert len({id(cost(each)) for each in instructions}) < len(instructions), "some are remembered"
