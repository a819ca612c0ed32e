"""The measurement: it moves what it says through the lanes of training, and leaves nothing behind."""

import threading
from pathlib import Path

import pytest
import torch

from outgrow.memory import disk_speed
from outgrow.memory.direct_io import AlignedBuffer
from outgrow.memory.disk import DiskStore
from outgrow.memory.disk_lanes import Ticket
from outgrow.memory.disk_speed import measure_disk, measure_transfers
from outgrow.memory.errors import DiskFull, StoreError


def compute() -> None:
    """Without the interpreter, which those that move bytes need meanwhile."""
    torch.ones(256, 256) @ torch.ones(256, 256)


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
    half = 3 << 19
    assert moved == [(2 * (3 << 20) + half, (3 << 20) + half, 3)]  # the first pass of writes is not timed
    assert list(tmp_path.iterdir()) == []


def test_transfers_are_timed_one_after_the_other_alone_and_beside_work(tmp_path: Path) -> None:
    worked = []

    def work() -> None:
        worked.append(0)
        compute()

    kinds = measure_transfers(tmp_path, work, (4096, 16384), block_bytes=4096, depth=2)
    for each in kinds:
        assert [size for size, _ in each.alone] == [4096, 16384]
        assert all(seconds > 0 for _, seconds in each.alone)
        assert each.beside >= 1
        assert each.slowdown >= 1
    assert len(kinds) == 3, "reads, writes, and writes with a copy"
    assert len(worked) >= 1 + 2 * 3 * disk_speed._ROUNDS, "alone, and at once beside each kind"
    assert list(tmp_path.iterdir()) == []


def test_there_is_work_until_the_last_transfer_has_ended() -> None:
    worked = threading.Semaphore(0)

    class Beside:
        def wait(self) -> None:
            if threading.current_thread() is not threading.main_thread():
                for _ in range(5):
                    assert worked.acquire(timeout=10), "no work was done beside the transfer"

    def work() -> None:
        worked.release()
        compute()

    def move(_name: str, _buffer: AlignedBuffer) -> Ticket:
        return Beside()  # type: ignore[return-value]

    kind = disk_speed._Kind(move, [("c0:param", AlignedBuffer(4096))])
    for _ in range(3):
        kind.move_alone()
        kind.move_beside(work)
    assert kind.times().slowdown >= 1


def test_work_that_fails_ends_what_moves_beside_it(tmp_path: Path) -> None:
    count = 0

    def work() -> None:
        nonlocal count
        count += 1
        if count == 3:  # beside the first reads: alone before them, and once before everything
            raise RuntimeError("cannot go on")

    with pytest.raises(RuntimeError, match="cannot go on"):
        measure_transfers(tmp_path, work, (4096, 16384), block_bytes=4096, depth=2)
    assert not any(each.name.startswith("measure-disk") for each in threading.enumerate())
    assert list(tmp_path.iterdir()) == []


def test_it_raises_what_a_run_would(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="must exist"):
        measure_disk(tmp_path / "missing", num_bytes=1 << 20, block_bytes=4096, depth=1)
    with pytest.raises(DiskFull):
        measure_disk(tmp_path, num_bytes=1 << 45, block_bytes=1 << 30, depth=1)
