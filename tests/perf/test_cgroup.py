"""The cgroup helper on folders that look like the kernel's: what it writes, reads and refuses."""

from pathlib import Path

import pytest

from outgrow.perf.cgroup import CgroupUnavailable, MemoryCgroup


@pytest.fixture
def version_1(tmp_path: Path) -> Path:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    return tmp_path


@pytest.fixture
def version_2(tmp_path: Path) -> Path:
    (tmp_path / "cgroup.controllers").write_text("cpu io memory pids\n")
    (tmp_path / "cgroup.subtree_control").write_text("cpu\n")
    return tmp_path


def _empty(folder: Path) -> None:
    """The kernel's files vanish with their folder; ours do not."""
    for file in folder.iterdir():
        file.unlink()


def test_version_1(version_1: Path) -> None:
    with MemoryCgroup(1000, version_1) as group:
        folder = group.join_file.parent
        assert folder.parent == version_1 / "memory"
        assert group.version == 1
        assert (folder / "memory.limit_in_bytes").read_text() == "1000"
        (folder / "memory.max_usage_in_bytes").write_text("900\n")
        (folder / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
        assert group.peak_bytes() == 900
        assert group.num_killed() == 2
        _empty(folder)
    assert not folder.exists()


def test_version_2(version_2: Path) -> None:
    with MemoryCgroup(1000, version_2) as group:
        folder = group.join_file.parent
        assert folder.parent == version_2
        assert group.version == 2
        assert (version_2 / "cgroup.subtree_control").read_text() == "+memory"
        assert (folder / "memory.max").read_text() == "1000"
        (folder / "memory.events").write_text("low 0\nhigh 0\nmax 5\noom 1\noom_kill 1\noom_group_kill 0\n")
        assert group.peak_bytes() is None, "an older kernel"
        (folder / "memory.peak").write_text("950\n")
        assert group.peak_bytes() == 950
        assert group.num_killed() == 1
        _empty(folder)
    assert not folder.exists()


def test_nobody_was_killed_where_the_kernel_does_not_count(version_1: Path) -> None:
    with MemoryCgroup(1000, version_1) as group:
        folder = group.join_file.parent
        (folder / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\n")
        assert group.num_killed() == 0
        _empty(folder)


def test_without_a_controller_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu io\n")
    with pytest.raises(CgroupUnavailable, match="neither version 1 nor version 2"):
        MemoryCgroup(1000, tmp_path)


def test_without_the_rights_it_says_so(version_1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(CgroupUnavailable, match=r"Permission denied; it takes the rights of root"):
        MemoryCgroup(1000, version_1)
    assert [path.name for path in (version_1 / "memory").iterdir()] == ["memory.limit_in_bytes"]
