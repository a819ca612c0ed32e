"""Jobs and outcomes as text, how a run's end is told, and one real process of a tiny model."""

import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from outgrow.perf import confined
from outgrow.perf.confined import Job, Outcome, last_outcome, run_confined

MODEL = {"num_blocks": 2, "width": 16, "num_heads": 2, "num_tokens": 32, "length": 8, "batch_size": 4}
SOME = Outcome(
    startup_s=1.5, step_s=(0.5, 0.25), losses=(3.5, 3.25), read_bytes=(1, 2), write_bytes=(3, 4),
    busy_s=(("read", 0.5),), resident_peak_bytes=9, predicted_bytes=8, plan="all",
)  # fmt: skip


class FakeGroup:
    """A cgroup that only remembers."""

    killed = 0

    def __init__(self, limit_bytes: int) -> None:
        self.join_file = Path(f"/group/{limit_bytes}")

    def peak_bytes(self) -> int:
        return 77

    def num_killed(self) -> int:
        return self.killed

    def __enter__(self) -> "FakeGroup":
        return self

    def __exit__(self, *_: object) -> None: ...


def test_outcomes_round_trip() -> None:
    assert Outcome.from_json(SOME.to_json()) == SOME


def test_the_last_whole_outcome_counts() -> None:
    output = f"a library's remark\n{Outcome().to_json()}\n{SOME.to_json()}\n{SOME.to_json()[:40]}"
    assert last_outcome(output) == SOME
    assert last_outcome("nothing\n") == Outcome()


def test_jobs_are_checked() -> None:
    with pytest.raises(ValueError, match="got another 1"):
        Job("another", MODEL, 1)
    with pytest.raises(ValueError, match="has a step"):
        Job("plain", MODEL, 0)
    with pytest.raises(ValueError, match="a folder"):
        Job("deepspeed", MODEL, 1)
    with pytest.raises(ValueError, match="got keep"):
        Job("plain", MODEL, 1, activations="keep")


def test_peaks_are_told_in_words() -> None:
    outcome = Outcome(resident_peak_bytes=3 << 20, predicted_bytes=4 << 20)
    assert outcome.peaks == "VmHWM 3 MiB, predicted 4 MiB"


@pytest.mark.parametrize(("num_killed", "end"), [(1, "killed"), (0, "failed")])
def test_only_the_kernel_s_word_counts_as_killed(monkeypatch: pytest.MonkeyPatch, num_killed: int, end: str) -> None:
    def killed(*_: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
        assert b'"join_file": "/group/1000"' in options["input"]
        return subprocess.CompletedProcess([], -signal.SIGKILL, SOME.to_json().encode() + b"\n")

    monkeypatch.setattr(confined.subprocess, "run", killed)
    monkeypatch.setattr(confined, "MemoryCgroup", FakeGroup)
    monkeypatch.setattr(FakeGroup, "killed", num_killed)
    outcome = run_confined(Job("engine", MODEL, 1), 1000)
    assert outcome.end == end
    assert outcome.losses == SOME.losses, "what was done until then"
    assert outcome.group_peak_bytes == 77


def test_a_real_process_trains_on_disk_as_in_memory(tmp_path: Path) -> None:
    job = Job("engine", MODEL, num_steps=2, micro_batches=2)
    free = run_confined(job)
    on_disk = run_confined(Job("engine", MODEL, 2, 2, budget_bytes=2 << 30, folder=str(tmp_path), offload="all"))
    assert (free.end, on_disk.end) == ("trained", "trained"), (free.message, on_disk.message)
    assert free.losses == on_disk.losses
    assert free.read_bytes == (0, 0)
    assert min(on_disk.read_bytes) > 0
    assert min(on_disk.write_bytes) > 0
    assert on_disk.resident_peak_bytes > 100 << 20
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_a_real_process_is_refused_what_does_not_fit(tmp_path: Path) -> None:
    outcome = run_confined(Job("engine", MODEL, 1, budget_bytes=50 << 20, folder=str(tmp_path)))
    assert outcome.end == "refused", outcome
    assert "budget" in outcome.message


def test_of_several_ranks_the_worst_counts_and_the_greatest_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = {0: "failed", 1: "killed", 2: "trained"}
    meetings = set()

    def run(job: Job, limit_bytes: int | None) -> Outcome:
        assert limit_bytes == 1000
        assert job.num_ranks == 3
        meetings.add(job.meeting_file)
        peak_bytes = 100 * (3 - job.rank)
        return Outcome(end=ends[job.rank], resident_peak_bytes=peak_bytes, group_peak_bytes=peak_bytes, losses=(1.0,))

    monkeypatch.setattr(confined, "_run_rank", run)
    outcome = run_confined(Job("engine", MODEL, 1, num_ranks=3), 1000)
    assert (outcome.end, outcome.resident_peak_bytes, outcome.group_peak_bytes) == ("killed", 300, 300)
    assert len(meetings) == 1
    ends.update({0: "trained", 1: "trained"})
    assert run_confined(Job("engine", MODEL, 1, num_ranks=3), 1000).end == "trained"
    with pytest.raises(ValueError, match="got plain on 2"):
        Job("plain", MODEL, 1, num_ranks=2)
