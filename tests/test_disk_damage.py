"""Training in a folder where things happen that no one planned: bytes change, files vanish, the disk is full, slow or
not there."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from disk_runs import (
    From,
    expected,
    files,
    make,
    names_the_place,
    net,
    nothing_is_left,
    same_weights,
    small_file_system,
    train,
)
from faulty_io import FaultyIO, Gate

from outgrow.memory.errors import (
    ChunkCorrupted,
    DiskFault,
    DiskFull,
    DoesNotFit,
    LaneTimeout,
    OutgrowError,
    StateLost,
    StoreError,
)
from outgrow.runtime.engine import Engine


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path, one_thread: None) -> Iterator[None]:
    expected()
    with nothing_is_left(tmp_path):
        yield


def trained(folder: Path, **settings: Any) -> tuple[Engine, Path]:
    """An engine after two right steps, and its file."""
    engine = make(folder, **settings)
    assert train(engine, 1, 2) == expected()[0][:2]
    (path,) = files(folder)
    return engine, path


def set_deadline(engine: Engine, deadline_s: float) -> None:
    """How long it waits for its disk from now on: what a slow machine must not pass is left its time."""
    assert engine._tier is not None
    for store in engine._tier._stores:
        store._lanes._deadline_s = deadline_s


def extents(engine: Engine) -> list[tuple[str, int]]:
    """Every extent's name and offset, asked of the store itself."""
    assert engine._tier is not None
    (store,) = engine._tier._stores
    found = [(name, store.place(name).offset_bytes or 0) for name in store._extents]
    assert [offset for _, offset in found] == sorted(offset for _, offset in found)
    return found


def change(path: Path, offset_bytes: int, content: bytes | None = None) -> None:
    """Put `content` there, or flip one bit, from outside."""
    fd = os.open(path, os.O_RDWR)
    try:
        byte = content if content is not None else bytes([os.pread(fd, 1, offset_bytes)[0] ^ 1])
        os.pwrite(fd, byte, offset_bytes)
        os.fsync(fd)
    finally:
        os.close(fd)


# ---- bytes that change


def test_a_bit_that_flips_in_any_extent_is_found_before_it_is_used(tmp_path: Path) -> None:
    engine, _ = trained(tmp_path)
    names = [name for name, _ in extents(engine)]
    engine.close()
    for number, name in enumerate(names):
        engine, path = trained(tmp_path)
        engine.state_dict()  # nothing is left to be written over it
        ends = [*(offset for _, offset in extents(engine)), path.stat().st_size]
        start, stop = list(pairwise(ends))[number]
        change(path, start + (stop - start) // 3)
        with pytest.raises(ChunkCorrupted) as caught:
            train(engine, 3, 3)
        assert names_the_place(caught.value, path)
        assert f"{caught.value.place.chunk}:{caught.value.place.slot}" == name
        assert caught.value.place.offset_bytes == start
        del caught
        if name.endswith("param"):
            with pytest.raises((ChunkCorrupted, StateLost)):
                engine.state_dict()
        with pytest.raises((ChunkCorrupted, StateLost)):
            train(engine, 3, 3)
        engine.close()
    assert len(names) == 8


def test_a_write_that_was_lost_is_found_though_its_bytes_were_right_once(tmp_path: Path) -> None:
    """The block of the step before is put back, with what then was its right checksum."""
    engine, path = trained(tmp_path)
    engine.state_dict()
    before = path.read_bytes()
    train(engine, 3, 3)
    engine.state_dict()
    named = extents(engine)
    for (name, start), stop in zip(named, [*(offset for _, offset in named[1:]), len(before)], strict=True):
        now = path.read_bytes()[start:stop]
        assert now != before[start:stop], "the step changed nothing"
        change(path, start, before[start:stop])
        if name.endswith("param"):
            with pytest.raises(ChunkCorrupted, match="it still holds generation 3: a write was lost"):
                engine.state_dict()
        else:
            with pytest.raises(ChunkCorrupted, match="it still holds generation 2: a write was lost"):
                engine._tier.read(name, engine._tier.staging(name).tensor()).wait()
        change(path, start, now)
    assert train(engine, 4, 4) == expected()[0][3:]
    assert same_weights(engine.state_dict(), expected()[1])
    engine.close()


# ---- files and folders that vanish


def test_a_file_that_vanishes_or_shrinks_is_found_at_the_next_request(tmp_path: Path) -> None:
    def remove(path: Path) -> None:
        path.unlink()

    def remove_folder(path: Path) -> None:
        shutil.rmtree(path.parent)

    def cut(path: Path) -> None:
        os.truncate(path, 4096)

    for happens, word in ((remove, "removed"), (remove_folder, "removed"), (cut, "was cut to 4,096 of")):
        folder = tmp_path / "scratch"
        folder.mkdir(exist_ok=True)
        engine, path = trained(folder)
        happens(path)
        with pytest.raises(DiskFault, match=word) as caught:
            train(engine, 3, 3)
        assert names_the_place(caught.value, path)
        with pytest.raises(OutgrowError):
            engine.state_dict()
        engine.close()
        assert not path.exists()
        del caught
    engine = make(folder)
    assert train(engine, 1, 4) == expected()[0]
    engine.close()


def test_a_folder_that_cannot_be_used_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(StoreError, match=r"run demo, rank 0, file .*ENOENT.*create it, or mount its disk"):
        make(tmp_path / "nowhere")
    with pytest.raises(StoreError, match=r"ENOTDIR.*must exist"):
        make(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"mine"
    assert not (tmp_path / "nowhere").exists()


def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    """A read-only file system where we may mount one, else the kernel's own."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro,size=4m", "tmpfs", str(folder)], capture_output=True, check=False
    ).returncode  # fmt: skip
    try:
        with pytest.raises(StoreError, match=r"run demo, rank 0, file .*(EROFS|EACCES|EPERM|ENOENT|needs)") as caught:
            make(folder if mounted else "/proc")
        assert not mounted or "must be writable" in str(caught.value)
        del caught
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


# ---- a disk that is full


def test_a_disk_too_small_is_refused_with_the_numbers_before_anything_is_trained(tmp_path: Path) -> None:
    with small_file_system(tmp_path / "small", num_bytes=1 << 20) as folder:
        with pytest.raises(DiskFull, match=r"run demo, rank 0.*(needs|reserve) 1,634,304 bytes"):
            make(folder, model=lambda: net(256))
        assert list(folder.iterdir()) == []


def test_a_disk_that_fills_up_later_does_not_matter(tmp_path: Path) -> None:
    """All blocks were reserved before step 1."""
    losses, weights = expected()
    with small_file_system(tmp_path / "small", num_bytes=1 << 20) as folder:
        engine = make(folder)
        with pytest.raises(OSError):
            (folder / "someone else's").write_bytes(bytes(2 << 20))  # as far as it goes
        assert (folder / "someone else's").stat().st_size > 0
        assert train(engine, 1, 4) == losses
        assert same_weights(engine.state_dict(), weights)
        engine.close()


def test_a_limit_too_small_is_refused_with_the_numbers(tmp_path: Path) -> None:
    engine = make(tmp_path)
    (path,) = files(tmp_path)
    num_bytes = path.stat().st_size
    engine.close()
    words = rf"run demo, rank 0: the disk tier needs {num_bytes:,} bytes and its limit is {num_bytes - 1:,}, 1 too few"
    with pytest.raises(DoesNotFit, match=words):
        make(tmp_path, disk_limit=num_bytes - 1)
    engine = make(tmp_path, disk_limit=num_bytes)
    assert train(engine, 1, 4) == expected()[0]
    engine.close()


# ---- a disk slower than promised


@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
def test_a_disk_that_hangs_is_an_error_at_the_deadline_and_the_late_transfer_meets_nobody(
    tmp_path: Path, write: bool
) -> None:
    losses, weights = expected()
    gate = Gate()
    disk = From(gate, write, n=1, times=1)
    io = FaultyIO(always=disk)
    engine = make(tmp_path, io)
    assert train(engine, 1, 2) == losses[:2]
    (path,) = files(tmp_path)
    set_deadline(engine, 0.5)
    io.arm()
    with pytest.raises(LaneTimeout) as caught:
        train(engine, 3, 3)
    text = str(caught.value)
    for words in ("run demo, rank 0", str(path), "WRITE c" if write else "READ c", "not done after 0.5 s"):
        assert words in text
    assert "deadline" in text
    del caught
    for ask in (lambda: train(engine, 3, 3), engine.state_dict):  # it hangs still: its buffer must not be used again
        with pytest.raises((LaneTimeout, StateLost)):
            ask()
    set_deadline(engine, 20.0)
    gate.open()
    try:
        assert train(engine, 3, 4) == losses[2:]
        assert same_weights(engine.state_dict(), weights)
    except StateLost:
        assert write
    engine.close()


def test_an_engine_on_a_hanging_disk_can_be_closed(tmp_path: Path) -> None:
    gate = Gate()
    io = FaultyIO(always=From(gate, write=False, times=1))
    engine = make(tmp_path, io)
    assert train(engine, 1, 2) == expected()[0][:2]
    set_deadline(engine, 0.5)
    io.arm()
    with pytest.raises(LaneTimeout):
        train(engine, 3, 3)
    with pytest.raises(LaneTimeout, match="READ c"):
        engine.close()
    assert files(tmp_path) == [], "its name is gone at once, its space with the transfer"
    set_deadline(engine, 20.0)
    gate.open()
    engine.close()
