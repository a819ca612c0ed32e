"""What the kernel says of this process, read from files of our own and, once, from the real ones."""

import mmap
from pathlib import Path

import pytest

from outgrow.memory import process
from outgrow.memory.process import (
    ProcessMemory,
    cgroup_limit_bytes,
    peak_host_bytes,
    read_process_memory,
    reset_peak,
)


class Files:
    """A file system of our own that stands for `/`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def at(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def write(self, path: str, text: str) -> None:
        self.at(path).parent.mkdir(parents=True, exist_ok=True)
        self.at(path).write_text(text)


@pytest.fixture
def files(tmp_path, monkeypatch) -> Files:
    files = Files(tmp_path)
    monkeypatch.setattr(process, "Path", files.at)
    return files


def test_version_2_takes_the_smallest_limit_on_the_way_to_the_root(files):
    files.write("/proc/self/cgroup", "0::/slice/job/worker\n")
    files.write("/sys/fs/cgroup/memory.max", "900\n")
    files.write("/sys/fs/cgroup/slice/memory.max", "500\n")
    files.write("/sys/fs/cgroup/slice/job/memory.max", "700\n")
    files.write("/sys/fs/cgroup/slice/job/worker/memory.max", "max\n")
    files.write("/sys/fs/memory.max", "1\n")  # above the root: not ours
    assert cgroup_limit_bytes() == 500


def test_version_1_counts_the_memory_controller_alone(files):
    files.write("/proc/self/cgroup", "5:cpu,cpuacct:/other\n4:memory,hugetlb:/job\n")
    files.write("/sys/fs/cgroup/memory/other/memory.limit_in_bytes", "100\n")
    files.write("/sys/fs/cgroup/memory/job/memory.limit_in_bytes", "300\n")
    assert cgroup_limit_bytes() == 300


def test_a_path_that_is_not_mounted_here_leaves_the_root(files):
    files.write("/proc/self/cgroup", "0::/outside/of/this/container\n")
    files.write("/sys/fs/cgroup/memory.max", "4096\n")
    assert cgroup_limit_bytes() == 4096


@pytest.mark.parametrize("text", ["max\n", "9223372036854771712\n", "", "a lot\n"])
def test_no_limit_is_none(files, text):
    files.write("/proc/self/cgroup", "0::/job\n")
    files.write("/sys/fs/cgroup/job/memory.max", text)
    assert cgroup_limit_bytes() is None


def test_without_cgroups_there_is_no_limit(files):
    assert cgroup_limit_bytes() is None


def test_the_smaller_of_both_versions_counts(files):
    files.write("/proc/self/cgroup", "1:memory:/a\n0::/b\n")
    files.write("/sys/fs/cgroup/memory/a/memory.limit_in_bytes", "200\n")
    files.write("/sys/fs/cgroup/b/memory.max", "150\n")
    assert cgroup_limit_bytes() == 150


def test_a_status_file_is_read_in_kibibytes(monkeypatch, tmp_path):
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmPeak:\t  999 kB\nVmHWM:\t  300 kB\nVmRSS:\t  200 kB\nRssShmem:\t  50 kB\n")
    monkeypatch.setattr(process, "_STATUS", status)
    assert read_process_memory() == ProcessMemory(200 * 1024, 300 * 1024, 50 * 1024)


def test_without_a_status_file_the_resident_set_stands_for_all(monkeypatch, tmp_path):
    monkeypatch.setattr(process, "_STATUS", tmp_path / "missing")
    memory = read_process_memory()
    assert memory.resident_bytes == memory.peak_bytes > 1 << 20
    assert memory.shared_bytes == 0


@pytest.mark.parametrize(
    ("peak", "shared", "owned", "expected"),
    [
        (1000, 0, 0, 1000),
        (1000, 400, 100, 700),  # of the shared pages it sees, a hundred bytes are this process's own
        (1000, 400, 900, 1000),  # owned, but never touched
        (300, 400, 100, 100),  # the counters are read at different moments
    ],
)
def test_shared_memory_counts_at_what_the_process_owns(monkeypatch, peak, shared, owned, expected):
    monkeypatch.setattr(process, "read_process_memory", lambda: ProcessMemory(peak, peak, shared))
    assert peak_host_bytes(owned) == expected


def test_the_peak_sees_memory_that_is_gone_again_and_can_be_reset():
    size = 192 << 20
    reset_peak()
    before = read_process_memory()
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        for page in range(0, size, mmap.PAGESIZE):
            memory[page] = 1
        assert read_process_memory().resident_bytes > before.resident_bytes + size * 0.8
    assert read_process_memory().peak_bytes > before.resident_bytes + size * 0.8
    reset_peak()
    assert read_process_memory().peak_bytes < before.resident_bytes + size * 0.5


def test_a_kernel_that_refuses_a_reset_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setattr(process, "Path", lambda _: tmp_path / "no folder" / "clear_refs")
    reset_peak()
