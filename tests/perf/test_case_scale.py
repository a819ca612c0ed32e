"""What the case makes of its runs."""

from pathlib import Path

import pytest

from outgrow.memory import disk_speed
from outgrow.memory.disk_speed import DiskSpeed
from outgrow.perf import case_scale
from outgrow.perf.confined import Job, Outcome
from outgrow.perf.models import CONFIGS
from outgrow.perf.suite import Options


def test_the_large_model_has_three_billion_parameters() -> None:
    assert 3.0e9 < CONFIGS["3B"].num_parameters < 3.2e9


def test_steps_are_held_against_disk_and_extrapolated_compute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(job: Job, limit_bytes: int | None = None) -> Outcome:
        assert limit_bytes == job.budget_bytes
        if limit_bytes is None:  # in memory: 1 s and 2 s a block
            seconds = 1.0 + 2.0 * job.model["num_blocks"]
            return Outcome("trained", step_s=(99.0, seconds, seconds), losses=(1.0,) * 3)
        assert limit_bytes == 2 << 30
        return Outcome(
            "trained", step_s=(10.0, 20.0), losses=(3.0, 2.0), read_bytes=(400, 1500), write_bytes=(1, 1),
            resident_peak_bytes=1 << 30,
        )  # fmt: skip

    monkeypatch.setattr(case_scale, "run_confined", run)
    monkeypatch.setattr(case_scale, "disk_folder", lambda given: tmp_path)
    monkeypatch.setattr(
        disk_speed, "measure_disk", lambda folder: DiskSpeed(100.0, 100.0, 100.0, True, "ext4", 1, 1, 1)
    )
    options = Options(num_rounds=2, configs=("3B",), num_blocks=4, budget="2GiB")
    figures = {each.name: each for each in case_scale.run(options, lambda line: None).figures}
    assert figures["compute of the bound"].samples == (9.0,)
    assert figures["bound / a step"].samples == (0.9, 0.75)
    assert figures["shared bound / a step"].samples == (0.9, 0.7505)
    assert figures["peak / budget"].samples == (0.5,)
