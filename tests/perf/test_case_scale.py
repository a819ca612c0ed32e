"""What the case makes of its runs."""

from pathlib import Path

import pytest

from outgrow.memory import disk_speed
from outgrow.memory.disk_speed import DiskSpeed
from outgrow.perf import case_scale
from outgrow.perf.case_scale import largest_count
from outgrow.perf.confined import Job, Outcome
from outgrow.perf.models import CONFIGS
from outgrow.perf.suite import Options


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8, 9, 31, 32, 33])
@pytest.mark.parametrize("first", [1, 4, 8, 26])
def test_the_largest_is_found(limit: int, first: int) -> None:
    tried: list[int] = []

    def trains(count: int) -> bool:
        tried.append(count)
        return count <= limit

    assert largest_count(trains, first) == limit
    assert len(tried) == len(set(tried)), "nothing runs twice"


def test_perhaps_not_even_one_trains() -> None:
    assert largest_count(lambda count: False, 4) is None
    with pytest.raises(ValueError, match="has a block"):
        largest_count(lambda count: True, 0)


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


def test_the_search_takes_one_step_each(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(job: Job, limit_bytes: int | None = None) -> Outcome:
        assert (job.num_steps, limit_bytes) == (1, 4 << 30)
        return Outcome("trained" if job.model["num_blocks"] <= 5 else "refused", step_s=(1.0,))

    monkeypatch.setattr(case_scale, "run_confined", run)
    monkeypatch.setattr(case_scale, "disk_folder", lambda given: tmp_path)
    findings = case_scale.run(Options(configs=("3B",), num_blocks=4, largest=True), lambda line: None)
    assert findings.figures[0].note == "5 blocks"
    assert "6 blocks: refused" in findings.notes[0]
