import pytest

from outgrow.runtime.machine import cgroup_limits, num_cores, probe_disk


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_cgroup_v2_takes_the_tightest_limit_on_the_way_up(tmp_path):
    write(tmp_path, {"self": "0::/a/b\n"})
    root = tmp_path / "fs"
    write(
        root,
        {
            "cgroup.controllers": "cpu memory",
            "a/b/memory.max": "max\n",
            "a/b/memory.current": "5000\n",
            "a/b/cpu.max": "max 100000\n",
            "a/memory.max": "1000000\n",
            "a/cpu.max": "150000 100000\n",
        },
    )
    limits = cgroup_limits(root, tmp_path / "self")
    assert (limits.version, limits.memory_bytes, limits.used_bytes, limits.cores) == (2, 1000000, 5000, 1.5)


def test_cgroup_v1(tmp_path):
    write(tmp_path, {"self": "4:memory:/job\n3:cpu,cpuacct:/job\n"})
    root = tmp_path / "fs"
    write(
        root,
        {
            "memory/job/memory.limit_in_bytes": "2000000\n",
            "memory/job/memory.usage_in_bytes": "7\n",
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
            "cpu/job/cpu.cfs_quota_us": "200000\n",
            "cpu/job/cpu.cfs_period_us": "100000\n",
        },
    )
    limits = cgroup_limits(root, tmp_path / "self")
    assert (limits.version, limits.memory_bytes, limits.used_bytes, limits.cores) == (1, 2000000, 7, 2.0)


def test_a_container_that_hides_its_path_has_its_limits_at_the_root(tmp_path):
    write(tmp_path, {"self": "0::/not/visible\n", "fs/cgroup.controllers": "", "fs/memory.max": "42\n"})
    assert cgroup_limits(tmp_path / "fs", tmp_path / "self").memory_bytes == 42


def test_no_cgroup(tmp_path):
    assert cgroup_limits(tmp_path / "fs", tmp_path / "none").version == 0
    assert num_cores() >= 1


def test_probe_leaves_nothing_behind(tmp_path):
    probe = probe_disk(tmp_path, 8 << 20)
    assert probe.write_bytes_per_s > 0
    assert probe.read_bytes_per_s > 0
    assert list(tmp_path.iterdir()) == []


def test_probe_says_when_a_folder_cannot_be_written(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        probe_disk(tmp_path / "none")
