"""Five hundred steps with everything on disk: memory, descriptors, threads and mappings stay what they were."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from disk_runs import BY_UNIT, batch, expected, held, make, nothing_is_left

from outgrow.memory.process import read_process_memory
from outgrow.runtime.engine import Engine

WARM_UP_STEPS = 100
MARGIN_BYTES = 2 << 20
"""About 5 KB a step: less than any of this model's matrices, its slots or a buffer that a request would leave over."""


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path) -> Iterator[None]:
    expected()
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with nothing_is_left(tmp_path):
        yield
    torch.set_num_threads(num_threads)


def resident_bytes() -> int:
    return read_process_memory().resident_bytes


@pytest.mark.parametrize("settings", [{}, BY_UNIT], ids=["sequential", "by-unit"])
def test_five_hundred_steps_take_no_more_than_a_hundred(tmp_path: Path, settings: dict[str, Any]) -> None:
    engine = make(tmp_path, **settings)
    last = [0.0]

    def go_on(steps: range) -> None:
        for step in steps:
            last[0] = engine.step(batch(step % 10)).loss

    go_on(range(WARM_UP_STEPS))
    first_loss, held_before, before_bytes = last[0], held(), resident_bytes()
    go_on(range(WARM_UP_STEPS, 500))
    grown_bytes = resident_bytes() - before_bytes
    assert held() == held_before
    assert grown_bytes < MARGIN_BYTES, f"{grown_bytes:,} bytes more after 400 more steps"
    assert last[0] < first_loss / 2, "it does not learn"
    statistics = engine._tier.statistics()[0]
    assert statistics.read.num_failed == statistics.write.num_failed == 0
    assert statistics.read.in_flight_bytes == statistics.write.in_flight_bytes == 0
    engine.close()


def test_engines_that_come_and_go_leave_nothing(tmp_path: Path) -> None:
    def come_and_go(num_engines: int) -> None:
        for _ in range(num_engines):
            engine: Engine = make(tmp_path)
            engine.step(batch(1))
            engine.close()

    come_and_go(10)
    before, before_bytes = held(), resident_bytes()
    come_and_go(30)
    assert held() == before
    assert resident_bytes() - before_bytes < MARGIN_BYTES
