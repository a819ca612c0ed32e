"""Five hundred steps with everything on disk: memory, descriptors, threads and mappings stay what they were."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
from disk_runs import BY_UNIT, batch, expected, make, nothing_is_left
from held import held
from ranks import run_ranks

from outgrow.memory.process import read_process_memory

WARM_UP_STEPS = 100
MARGIN_BYTES = 2 << 20
"""About 5 KB a step: less than any of this model's matrices, its slots or a buffer that a request would leave over."""


def resident_bytes() -> int:
    return read_process_memory().resident_bytes


def five_hundred_steps(_rank: int, settings: dict[str, Any]) -> None:
    expected()
    with tempfile.TemporaryDirectory() as folder, nothing_is_left(Path(folder)):
        engine = make(folder, **settings)
        last = [0.0]

        def go_on(steps: range) -> None:
            for step in steps:
                last[0] = engine.step(batch(step % 10)).loss

        go_on(range(WARM_UP_STEPS))
        first_loss, held_before, before_bytes = last[0], held(), resident_bytes()
        go_on(range(WARM_UP_STEPS, 500))
        grown_bytes = resident_bytes() - before_bytes
        left = held().since(held_before)
        assert not left, left
        assert grown_bytes < MARGIN_BYTES, f"{grown_bytes:,} bytes more after 400 more steps"
        assert last[0] < first_loss / 2, "it does not learn"
        statistics = engine._tier.statistics()[0]
        assert statistics.read.num_failed == statistics.write.num_failed == 0
        assert statistics.read.in_flight_bytes == statistics.write.in_flight_bytes == 0
        engine.close()


def engines_come_and_go(_rank: int) -> None:
    expected()
    with tempfile.TemporaryDirectory() as folder, nothing_is_left(Path(folder)):

        def come_and_go(num_engines: int) -> None:
            for _ in range(num_engines):
                engine = make(folder)
                engine.step(batch(1))
                engine.close()

        come_and_go(10)
        before, before_bytes = held(), resident_bytes()
        come_and_go(30)
        left = held().since(before)
        assert not left, left
        assert resident_bytes() - before_bytes < MARGIN_BYTES


# In a process of their own: what other tests left over in this one, and give back meanwhile, is no part of it.


@pytest.mark.parametrize("settings", [{}, BY_UNIT], ids=["sequential", "by-unit"])
def test_five_hundred_steps_take_no_more_than_a_hundred(settings: dict[str, Any]) -> None:
    run_ranks(five_hundred_steps, 1, settings)


def test_engines_that_come_and_go_leave_nothing() -> None:
    run_ranks(engines_come_and_go, 1)
