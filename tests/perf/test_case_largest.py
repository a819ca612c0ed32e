"""The search for the largest model, and what is made of what it finds."""

from dataclasses import asdict
from pathlib import Path

import pytest

from outgrow.perf import case_largest, case_scale
from outgrow.perf.case_largest import largest_count
from outgrow.perf.confined import Job, Outcome
from outgrow.perf.figures import Figure
from outgrow.perf.models import CONFIGS, GPTConfig
from outgrow.perf.suite import Findings, Options

PEER_BLOCKS = {"plain": 26, "deepspeed": 84}


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8, 9, 31, 32, 33])
@pytest.mark.parametrize("first", [1, 4, 8, 26])
def test_the_largest_is_found(limit: int, first: int) -> None:
    tried: list[int] = []

    def trains(count: int) -> bool:
        tried.append(count)
        return count <= limit

    assert largest_count(trains, first) == limit
    assert len(tried) == len(set(tried)), "nothing runs twice"


@pytest.mark.parametrize("limit", [1, 3, 19, 25, 26, 40, 51, 52, 53, 300])
def test_a_tolerance_ends_the_search_early(limit: int) -> None:
    tried: list[int] = []

    def trains(count: int) -> bool:
        tried.append(count)
        return count <= limit

    found = largest_count(trains, 26, tolerance=0.1)
    assert found is not None
    assert found in tried
    least_bad = min(count for count in tried if count > limit)
    assert found <= limit < least_bad <= max(found + 1, 1.1 * found)
    if limit == 53:
        assert tried == [26, 52, 104, 78, 65, 58, 55]


def test_perhaps_not_even_one_trains() -> None:
    assert largest_count(lambda count: False, 4) is None
    with pytest.raises(ValueError, match="has a block"):
        largest_count(lambda count: True, 0)
    with pytest.raises(ValueError, match="tolerance"):
        largest_count(lambda count: True, 1, tolerance=-0.1)
    with pytest.raises(ValueError, match="growth"):
        largest_count(lambda count: True, 1, growth=1.0)


def test_it_grows_by_at_least_one() -> None:
    assert largest_count(lambda count: count <= 7, 1, growth=1.1) == 7


def searched(
    monkeypatch: pytest.MonkeyPatch, folder: Path, our_blocks: int = 30, present: bool = True
) -> tuple[Findings, list[Job]]:
    """What the command makes of runs that are made up, and the runs. Each leaves a file behind, as killed ones do."""
    jobs: list[Job] = []

    def run(job: Job, limit_bytes: int | None = None) -> Outcome:
        assert (job.num_steps, limit_bytes, job.budget_bytes) == (1, 4 << 30, 4 << 30)
        assert job.folder is not None
        assert not list(Path(job.folder).iterdir()), "every run has an empty folder"
        assert len(list(Path(job.folder).parent.iterdir())) == 1, "nothing of earlier runs takes up the disk"
        (Path(job.folder) / "left").write_bytes(b"state")
        jobs.append(job)
        most = PEER_BLOCKS.get(job.who, our_blocks)
        return Outcome("trained" if job.model["num_blocks"] <= most else "killed", "or not", step_s=(1.5,), plan="all")

    monkeypatch.setattr(case_largest, "run_confined", run)
    monkeypatch.setattr(case_largest, "find_spec", lambda name: object() if present else None)
    monkeypatch.setattr(case_scale, "disk_folder", lambda given: folder)
    findings = case_scale.run(Options(configs=("3B",), largest=True), lambda line: None)
    assert not list(folder.iterdir())
    return findings, jobs


def by_name(findings: Findings) -> dict[str, Figure]:
    return {each.name: each for each in findings.figures}


def billions(num_blocks: int, **sizes: int) -> float:
    return GPTConfig(**{**asdict(CONFIGS["3B"]), "num_blocks": num_blocks, **sizes}).num_parameters / 1e9


def test_all_three_are_searched_within_one_budget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    findings, jobs = searched(monkeypatch, tmp_path)
    figures = by_name(findings)
    shape = {"width": 768, "num_heads": 12}
    ours, plain, theirs = billions(30), billions(26, **shape), billions(84, **shape)
    assert figures["Outgrow"].samples == (ours,)
    assert figures["plain PyTorch"].samples == (plain,)
    assert figures["DeepSpeed"].samples == (theirs,)
    assert figures["Outgrow / plain PyTorch"].samples == (ours / plain,)
    assert figures["Outgrow / DeepSpeed"].samples == (ours / theirs,)
    assert figures["Outgrow"].note == f"30 blocks 3072 wide; not 32 ({billions(32):.2f} billion): killed or not"
    assert figures["Outgrow, a step"].samples == (1.5,)
    tokens = {(job.model["batch_size"], job.model["length"], job.model["num_tokens"]) for job in jobs}
    assert tokens == {(1, 256, 32000)}, "the same batch for all"
    assert {job.activations for job in jobs if job.who != "engine"} == {"recompute"}
    assert {job.activations for job in jobs if job.who == "engine"} == {None}
    assert [job.model["num_blocks"] for job in jobs if job.who == "engine"] == [26, 52, 39, 32, 29, 30]
    assert [job.model["num_blocks"] for job in jobs if job.who == "plain"] == [28, 14, 21, 24, 26, 27]
    assert [job.model["num_blocks"] for job in jobs if job.who == "deepspeed"] == [79, 98, 88, 83, 85, 84]
    assert "10%" in findings.notes[0]


def test_an_end_is_told_by_the_line_that_says_the_most(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(job: Job, limit_bytes: int | None = None) -> Outcome:
        if job.who == "engine":
            return Outcome("failed", message="ended with 1: Traceback\n  File\nDiskFull: the store needs 99 bytes")
        return Outcome("refused", message="does not fit\nWhat helps: more")

    monkeypatch.setattr(case_largest, "run_confined", run)
    monkeypatch.setattr(case_largest, "find_spec", lambda name: object())
    monkeypatch.setattr(case_scale, "disk_folder", lambda given: tmp_path)
    figures = by_name(case_scale.run(Options(configs=("3B",), largest=True), lambda line: None))
    assert figures["Outgrow"].note.endswith("failed DiskFull: the store needs 99 bytes")
    assert figures["plain PyTorch"].note.endswith("refused does not fit")


def test_deepspeed_may_be_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    findings, jobs = searched(monkeypatch, tmp_path, present=False)
    figures = by_name(findings)
    assert (figures["DeepSpeed"].samples, figures["DeepSpeed"].note) == ((), "missing: deepspeed")
    assert not figures["Outgrow / DeepSpeed"].samples
    assert figures["Outgrow / plain PyTorch"].samples
    assert {job.who for job in jobs} == {"plain", "engine"}


def test_ours_may_not_train_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figures = by_name(searched(monkeypatch, tmp_path, our_blocks=0)[0])
    assert not figures["Outgrow"].samples
    assert figures["Outgrow"].note.startswith("not even one block 3072 wide; 1 (")
    assert not figures["Outgrow / plain PyTorch"].samples
    assert "Outgrow, a step" not in figures
