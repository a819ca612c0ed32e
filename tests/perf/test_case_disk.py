"""The disk case on a file of a few MiB: what is asked of both sides, and what is made of their answers."""

import json
from pathlib import Path

import pytest

from outgrow.memory.errors import OutgrowError
from outgrow.perf import case_disk
from outgrow.perf.suite import Options

MIB = 1 << 20


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case_disk, "_EXTENT_BYTES", 2 * MIB)
    monkeypatch.setattr(case_disk, "_NUM_EXTENTS", 4)
    monkeypatch.setattr(case_disk, "_FILE_BYTES", 8 * MIB)
    monkeypatch.setattr(case_disk, "BLOCKS_MIB", (1,))
    monkeypatch.setattr(case_disk, "DEPTHS", (2,))
    monkeypatch.setattr(case_disk, "file_system_of", lambda path: "ext4")


def test_both_sides_are_asked_for_the_same(small: None) -> None:
    command = case_disk.fio_command(Path("/d/f"), "both", 4 * MIB, 8)
    assert {"--direct=1", f"--bs={4 * MIB}", "--iodepth=8", "--filename=/d/f"} <= set(command)
    reading = command[command.index("--name=read") : command.index("--name=write")]
    writing = command[command.index("--name=write") :]
    assert reading == ["--name=read", "--rw=read", "--offset=0", f"--size={4 * MIB}"]
    assert writing == ["--name=write", "--rw=write", f"--offset={4 * MIB}", f"--size={4 * MIB}"]
    assert case_disk.fio_command(Path("/d/f"), "read", MIB, 1)[-4:] == [
        "--name=read", "--rw=read", "--offset=0", f"--size={8 * MIB}",
    ]  # fmt: skip


def test_the_rate_of_several_jobs_is_all_bytes_over_the_longest() -> None:
    idle = {"io_bytes": 0, "runtime": 0}
    jobs = [
        {"jobname": "read", "error": 0, "read": {"io_bytes": 3000, "runtime": 2000}, "write": idle},
        {"jobname": "write", "error": 0, "read": idle, "write": {"io_bytes": 5000, "runtime": 4000}},
    ]
    assert case_disk.fio_rate("fio: a warning\n" + json.dumps({"jobs": jobs})) == 2000
    jobs[1]["error"] = 28
    with pytest.raises(OutgrowError, match="write with error 28"):
        case_disk.fio_rate(json.dumps({"jobs": jobs}))


def test_without_fio_a_raw_loop_takes_its_place(small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(case_disk.shutil, "which", lambda name: None)
    findings = case_disk.run(Options(num_rounds=2, num_warmup=1, folder=str(tmp_path)), lambda line: None)
    assert [figure.group.split()[0] for figure in findings.figures] == ["read", "write", "both", "checksum", "checksum"]
    for figure in findings.figures[:3]:
        assert figure.name == "1 MiB, depth 2: ours / a raw loop"
        assert len(figure.samples) == 2
        assert min(figure.samples) > 0
        assert figure.target is not None
    assert "fio is not installed" in findings.notes[-1]
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_turns_alternate() -> None:
    asked = []

    class Side:
        def __init__(self, name: str) -> None:
            self.name = name

        def move(self, mode: str) -> float:
            asked.append(self.name)
            return float(len(asked))

    rates = case_disk._measure(Side("a"), Side("b"), "read", Options(num_rounds=2, num_warmup=1))
    assert "".join(asked) == "abbaab"
    assert rates == ((4.0, 5.0), (3.0, 6.0))


def test_a_folder_in_memory_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(case_disk, "file_system_of", lambda path: "tmpfs")
    with pytest.raises(ValueError, match="is a tmpfs: it lies in memory"):
        case_disk.run(Options(folder=str(tmp_path)), lambda line: None)
    with pytest.raises(ValueError, match="name a folder with --folder"):
        case_disk.run(Options(), lambda line: None)
    with pytest.raises(ValueError, match="no such folder"):
        case_disk.run(Options(folder=str(tmp_path / "missing")), lambda line: None)
