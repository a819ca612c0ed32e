"""What the case makes of its contestants' answers."""

from typing import Any

import pytest

from outgrow.perf import case_offload
from outgrow.perf.bound import Bandwidth, Moved
from outgrow.perf.case_offload import smallest_multiple
from outgrow.perf.cgroup import CgroupUnavailable
from outgrow.perf.confined import Job, Outcome
from outgrow.perf.figures import Figure
from outgrow.perf.member_offload import OffloadReport
from outgrow.perf.suite import Options

MIB = 1 << 20
NOTHING = Moved(0, 0, {})


@pytest.mark.parametrize("threshold", [448, 449, 512, 700, 1088])
def test_the_smallest_that_is_enough_is_found_in_few_tries(threshold: int) -> None:
    tried: list[int] = []

    def is_enough(value: int) -> bool:
        tried.append(value)
        return value >= threshold

    found = smallest_multiple(is_enough, 448, 1088, 64)
    assert found == min(value for value in range(448, 1089, 64) if value >= threshold)
    assert len(tried) <= 5


def test_where_the_greatest_is_not_enough_there_is_none() -> None:
    assert smallest_multiple(lambda value: False, 448, 1088, 64) is None
    with pytest.raises(ValueError, match="multiple of 64"):
        smallest_multiple(lambda value: True, 448, 1100, 64)


def figure(figures: list[Figure], name: str) -> Figure:
    (found,) = [each for each in figures if each.name == name]
    return found


def answer(seconds: float, loss: float, moved: Moved = NOTHING) -> OffloadReport:
    return OffloadReport(seconds, loss, 100 * MIB, moved, (300, 200) if moved.read_bytes else (0, 0))


def test_ratio_and_agreement_are_taken_round_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: dict[str, list[Any]] = {"in memory": [answer(1.0, 3.0), answer(2.0, 2.5)],
                                   "on disk": [answer(2.0, 3.0), answer(2.0, 2.5000001)]}  # fmt: skip
    losses = {name: [each.loss for each in reports] for name, reports in turns.items()}
    asked: list[Options] = []
    monkeypatch.setattr(
        case_offload, "_measure", lambda pair, options, say: (asked.append(options), (turns, losses))[1]
    )
    figures = case_offload._compute_bound("S", 2048, "/folder", Options(), lambda line: None)
    case_offload._compute_bound("S", 2048, "/folder", Options(num_rounds=2, num_warmup=20), lambda line: None)
    assert asked == [Options(num_warmup=8), Options(num_rounds=2, num_warmup=20)], "heaps have grown before that"
    assert figure(figures, "on disk").samples == (1024.0, 1024.0)
    assert figure(figures, "on disk / in memory").samples == (0.5, 1.0)
    assert figure(figures, "state read / least").samples == (), "nothing was read"
    assert figure(figures, "steps whose losses differ").samples == (1.0,)
    assert figure(figures, "steps whose losses differ").is_met is False


def test_the_share_of_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = Moved(300, 100, {"read": 3.0})
    turns: dict[str, list[Any]] = {
        "in memory": [answer(1.0, 3.0), answer(5.0, 2.5)],
        "on disk": [answer(4.0, 3.0, moved), answer(6.25, 2.5, moved)],
        "disk lanes": [Bandwidth(100.0, 100.0, 100.0), Bandwidth(100.0, 100.0, 50.0)],
    }
    losses = {name: [3.0, 2.5] for name in ("in memory", "on disk")}
    monkeypatch.setattr(case_offload, "_measure", lambda *_: (turns, losses))
    figures = case_offload._disk_bound("S", "/folder", Options(), lambda line: None)
    assert figure(figures, "bound / on disk").samples == (0.75, 0.8)
    assert figure(figures, "shared bound / on disk").samples == (1.0, 1.28)
    assert "by both" in figure(figures, "shared bound / on disk").note
    assert "by compute" in figure(figures, "bound / on disk").note
    assert figure(figures, "state read / least").samples == (1.5,)
    assert figure(figures, "steps whose losses differ").is_met is True


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int | None]]:
    """Runs that train from 600 MiB on, are refused from 500 on, and killed below that."""
    asked: list[tuple[str, int | None]] = []

    def run(job: Job, limit_bytes: int | None = None) -> Outcome:
        mib = None if limit_bytes is None else limit_bytes // MIB
        asked.append((job.who, mib))
        assert limit_bytes == job.budget_bytes or job.who == "plain"
        if job.who == "plain" or (mib is not None and mib < 500):
            return Outcome(end="killed", message="by the kernel")
        if mib is not None and mib < 600:
            return Outcome(end="refused", message="too little")
        return Outcome("trained", step_s=(2.0, 1.0), losses=(3.0, 2.0), resident_peak_bytes=550 * MIB)

    monkeypatch.setattr(case_offload, "run_confined", run)
    return asked


def test_budgets_are_tried_down_to_the_smallest(kernel: list[tuple[str, int | None]]) -> None:
    figures, notes = case_offload._within_budgets("S", {"batch_size": 8, "length": 256}, "/folder", lambda line: None)
    assert figure(figures, "768 MiB: peak / budget").samples == (550 / 768,)
    assert figure(figures, "smallest budget").samples == (640.0 * MIB,)
    assert figure(figures, "plain PyTorch in 768 MiB is killed").is_met is True
    assert figure(figures, "steps whose losses differ").is_met is True
    assert len(kernel) == len(set(kernel)), "nothing runs twice"
    assert "576 refused" in notes[0]
    assert len(notes) == sum(mib is not None and mib < 500 for who, mib in kernel if who == "engine") + 1


def test_a_resident_set_above_the_budget_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = Outcome("trained", step_s=(1.0,), losses=(3.0,), resident_peak_bytes=531 * MIB)
    monkeypatch.setattr(case_offload, "run_confined", lambda job, limit_bytes=None: outcome)
    _, notes = case_offload._within_budgets("S", {"batch_size": 8, "length": 256}, "/folder", lambda line: None)
    assert "S, 512 MiB: trained, but the resident set was 19 MiB above the budget." in notes
    assert not any("576 MiB: trained, but" in note for note in notes)


def test_without_a_cgroup_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Outcome:
        raise CgroupUnavailable("no controller")

    monkeypatch.setattr(case_offload, "run_confined", refuse)
    figures, _ = case_offload._within_budgets("S", {"batch_size": 8, "length": 256}, "/folder", lambda line: None)
    assert [(each.samples, each.note) for each in figures] == [((), "not measured: no controller")]


def test_other_configurations_are_refused() -> None:
    with pytest.raises(ValueError, match="no configuration 'XXL' here; there are M, S"):
        case_offload.run(Options(configs=("XXL",)), lambda line: None)
