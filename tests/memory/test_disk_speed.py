"""The measurement: it moves what it says through the lanes of training, and leaves nothing behind."""

import threading
from pathlib import Path

import pytest

from outgrow.memory import disk_speed
from outgrow.memory.disk import DiskStore
from outgrow.memory.disk_speed import measure_disk
from outgrow.memory.errors import DiskFull, StoreError


def test_it_says_what_it_measured_and_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []

    class WatchedStore(DiskStore):
        def close(self, timeout_s: float | None = None) -> None:
            statistics = self.statistics()
            moved.append((statistics.write.num_bytes, statistics.read.num_bytes, statistics.read.peak_num_in_flight))
            super().close(timeout_s)

    monkeypatch.setattr(disk_speed, "DiskStore", WatchedStore)
    speed = measure_disk(tmp_path, num_bytes=3 << 20, block_bytes=64 << 10, depth=2)
    assert speed.read_bytes_per_s > 0
    assert speed.write_bytes_per_s > 0
    assert speed.both_bytes_per_s > 0
    assert (speed.num_bytes, speed.block_bytes, speed.depth) == (3 << 20, 64 << 10, 2)
    assert speed.slowdown == 1.0  # of nothing
    half = 3 << 19
    assert moved == [(2 * (3 << 20) + half, (3 << 20) + half, 3)]  # the first pass of writes is not timed
    assert list(tmp_path.iterdir()) == []


def test_other_work_is_timed_alone_and_while_bytes_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr(disk_speed.time, "perf_counter", lambda: now_s)

    def work() -> None:  # on a clock of its own: three seconds alone, six while a lane moves bytes
        nonlocal now_s
        now_s += 6 if any(each.name == "measure-disk" for each in threading.enumerate()) else 3

    def moving() -> None: ...

    assert disk_speed._slowdown(work, moving) == 2.0
    assert not any(each.name == "measure-disk" for each in threading.enumerate())
    monkeypatch.undo()
    speed = measure_disk(tmp_path, num_bytes=3 << 20, block_bytes=64 << 10, depth=2, beside=lambda: None)
    assert speed.slowdown >= 1.0
    assert list(tmp_path.iterdir()) == []


def test_it_raises_what_a_run_would(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="must exist"):
        measure_disk(tmp_path / "missing", num_bytes=1 << 20, block_bytes=4096, depth=1)
    with pytest.raises(DiskFull):
        measure_disk(tmp_path, num_bytes=1 << 45, block_bytes=1 << 30, depth=1)
