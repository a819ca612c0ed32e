"""The store with a disk that fails: every fault is seen, named and delivered; nothing hangs, leaks or reads wrong."""

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from faulty_io import (
    EDQUOT,
    EINVAL,
    EIO,
    ENOSPC,
    Fault,
    FaultyIO,
    Gate,
    bit_flipped,
    fails_with,
    nothing_moved,
    short_by_half,
    write_lost,
)
from held import held

from outgrow.memory.direct_io import AlignedBuffer, DirectIO
from outgrow.memory.disk import DiskStore, ExtentSpec
from outgrow.memory.errors import ChunkCorrupted, DiskFault, DiskFull, LaneTimeout, OutgrowError, StoreError

BLOCK = 8192
SIZES = {"c0:param": 2 * BLOCK, "c0:exp_avg": BLOCK + 1, "c1:param": 100}


def make(folder: Path, io: DirectIO | None = None, **settings) -> DiskStore:
    specs = [ExtentSpec(name, num_bytes) for name, num_bytes in SIZES.items()]
    settings = {"block_bytes": BLOCK, "depth": 2, "deadline_s": 20.0} | settings
    return DiskStore(folder, "demo", 2, specs, io=io, **settings)


def content(name: str, generation: int) -> bytes:
    return np.random.default_rng([generation, *name.encode()]).bytes(SIZES[name])


@pytest.fixture(autouse=True)
def _all_is_given_back(tmp_path: Path) -> Iterator[None]:
    before = held()
    yield
    now = replace(held(), maps=before.maps)  # the log that was caught refers to errors, and they to their buffers
    assert now.since(before) == []
    assert list(tmp_path.rglob("outgrow-*")) == []


def run_sequence(store: DiskStore, generations: tuple[int, ...] = (1, 2)) -> list[OutgrowError]:
    """Write and read every extent, one request at a time. Returns the errors; a wrong number fails at once."""
    errors: list[OutgrowError] = []
    for generation in generations:
        for name in SIZES:
            for attempt in ("write", "read"):
                target = bytearray(SIZES[name])
                try:
                    if attempt == "write":
                        store.write(name, content(name, generation)).wait()
                    else:
                        store.read(name, target).wait()
                        assert target == content(name, generation)
                except OutgrowError as error:
                    errors.append(error)
    return errors


NUM_REQUESTS = 2 * 2 * (2 + 2 + 1)  # generations x (write, read) x blocks of all extents


@pytest.mark.parametrize(
    ("fault", "allowed", "healed"),
    [
        (EIO, DiskFault, "reads"),
        (fails_with(errno.ENODEV), DiskFault, "never"),
        (ENOSPC, DiskFull, "never"),
        (EDQUOT, DiskFull, "never"),
        (nothing_moved, DiskFault, "writes"),
        (bit_flipped, ChunkCorrupted, "never"),
        (write_lost, ChunkCorrupted, "reads"),
        (short_by_half, StoreError, "always"),
        (EINVAL, StoreError, "always"),
    ],
    ids=["EIO", "ENODEV", "ENOSPC", "EDQUOT", "zero", "flip", "lost", "short", "EINVAL"],
)
def test_a_fault_on_every_request_of_a_sequence_is_healed_or_named(
    tmp_path: Path, fault: Fault, allowed: type[StoreError], healed: str
) -> None:
    """One store, one fault on request n, for every n: what is not healed is raised with its place, and passes."""
    counting = FaultyIO()
    with make(tmp_path, counting) as store:
        counting.arm()
        assert run_sequence(store) == []
    num_requests = counting.num_requests
    assert num_requests == NUM_REQUESTS
    num_raised = 0
    for n in range(num_requests):
        io = FaultyIO({n: fault})
        with make(tmp_path, io, depth=1) as store:
            io.arm()
            errors = run_sequence(store)
            assert io.num_faults == 1
            num_raised += bool(errors)
            for error in errors:
                assert isinstance(error, StoreError)
                assert error.place is not None
                assert (error.place.run, error.place.rank, error.place.path) == ("demo", 2, store.path)
                assert f"{error.place.chunk}:{error.place.slot}" in SIZES
                assert error.place.offset_bytes is not None
            if errors:
                assert isinstance(errors[0], allowed)
                assert len(errors) <= 2  # the write, and the read of what it left unknown
            io.faults = {}
            assert run_sequence(store, (3,)) == []  # the fault has passed: the next generation is good again
            store.drain()
    expected = {"always": [0], "never": [num_requests], "reads": [num_requests // 2], "writes": [num_requests // 2]}
    assert num_raised in expected[healed]


def test_errors_name_what_who_where_and_what_to_do(tmp_path: Path) -> None:
    io = FaultyIO(always=ENOSPC)
    with make(tmp_path, io) as store:
        io.arm()
        with pytest.raises(DiskFull) as caught:
            store.write("c0:exp_avg", content("c0:exp_avg", 1)).wait()
        offset = 2 * BLOCK
        assert str(caught.value) in {
            f"run demo, rank 2, chunk c0, slot exp_avg, file {store.path}, offset {offset + start}: could not write "
            f"{size:,} bytes: ENOSPC, No space left on device. Free space, raise the quota or name another folder"
            for start, size in ((0, BLOCK), (BLOCK, 1))
        }
        with pytest.raises(StoreError, match=r"slot exp_avg.*its last write failed.*ENOSPC.*Write it again"):
            store.read("c0:exp_avg", bytearray(BLOCK + 1)).wait()


def test_eio_that_stays_is_raised_after_one_more_attempt(tmp_path: Path) -> None:
    io = FaultyIO(always=EIO)
    with make(tmp_path, io) as store:
        store.write("c1:param", content("c1:param", 1)).wait()
        io.arm()
        with pytest.raises(DiskFault, match=r"chunk c1, slot param.*could not read 100 bytes: EIO"):
            store.read("c1:param", bytearray(100)).wait()
        assert io.num_requests == 2


def test_a_bit_flipped_in_the_file_is_found_wherever_it_is(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    with make(tmp_path) as store:
        for name, num_bytes in SIZES.items():
            store.write(name, content(name, 1)).wait()
            start = store.place(name).offset_bytes
            assert start is not None
            for offset in [0, num_bytes - 1, *rng.integers(0, num_bytes, 10).tolist()]:
                with open(store.path, "r+b") as file:
                    file.seek(start + offset)
                    good = file.read(1)
                    file.seek(start + offset)
                    file.write(bytes([good[0] ^ 1 << int(rng.integers(8))]))
                with pytest.raises(
                    ChunkCorrupted, match=r"its bytes changed \(xxh3 expected [0-9a-f]{16}, actual"
                ) as caught:
                    store.read(name, bytearray(num_bytes)).wait()
                assert caught.value.place is not None
                assert caught.value.place.offset_bytes == start + offset // BLOCK * BLOCK
                with open(store.path, "r+b") as file:
                    file.seek(start + offset)
                    file.write(good)
                store.read(name, bytearray(num_bytes)).wait()


def test_a_lost_write_is_told_from_a_flipped_bit(tmp_path: Path) -> None:
    io = FaultyIO(always=write_lost)
    with make(tmp_path, io) as store:
        store.write("c1:param", content("c1:param", 1)).wait()
        io.arm()
        store.write("c1:param", content("c1:param", 2)).wait()
        with pytest.raises(ChunkCorrupted, match="generation 2: it still holds generation 1: a write was lost"):
            store.read("c1:param", bytearray(100)).wait()


def test_memory_changed_while_it_is_written_is_found(tmp_path: Path) -> None:
    """The caller broke the contract: what is on disk is neither old nor new, and must not come back as either."""
    gate, io = Gate(), FaultyIO()
    source = AlignedBuffer(2 * BLOCK)

    def held_back(transfer: Callable[[memoryview], int], view: memoryview, write: bool) -> int:
        num_bytes = transfer(view)
        gate(lambda _: 0, view, write)  # the device has it, and has not said so
        return num_bytes

    with make(tmp_path, io) as store:
        io.always = held_back
        io.arm()
        write = store.write("c0:param", source)
        assert gate.reached.wait(10)
        source.view[5] = 1
        source.view[BLOCK + 5] = 1
        gate.open()
        write.wait()
        with pytest.raises(ChunkCorrupted):
            store.read("c0:param", bytearray(2 * BLOCK)).wait()
    source.close()


def test_a_file_cut_short_is_found_before_anything_is_used(tmp_path: Path) -> None:
    with make(tmp_path) as store:
        for name in SIZES:
            store.write(name, content(name, 1)).wait()
        os.truncate(store.path, BLOCK)
        for name, num_bytes in SIZES.items():
            with pytest.raises(DiskFault, match=r"the file was cut to 8,192 of 32,768 bytes.*start from a checkpoint"):
                store.read(name, bytearray(num_bytes)).wait()
            with pytest.raises(DiskFault, match="was cut"):
                store.write(name, content(name, 2)).wait()


def test_a_folder_that_vanishes_is_found_at_the_next_request(tmp_path: Path) -> None:
    folder = tmp_path / "scratch"
    folder.mkdir()
    with make(folder) as store:
        store.write("c1:param", content("c1:param", 1)).wait()
        shutil.rmtree(folder)
        for ticket in (store.read("c1:param", bytearray(100)), store.write("c0:param", content("c0:param", 1))):
            with pytest.raises(DiskFault, match="ENOENT, the file was removed while the run was using it"):
                ticket.wait()


def test_a_disk_slower_than_promised_is_named_and_may_still_finish(tmp_path: Path) -> None:
    io, gate = FaultyIO(), Gate()
    with make(tmp_path, io, deadline_s=0.05) as store:
        io.always = gate
        io.arm()
        ticket = store.write("c0:param", content("c0:param", 1))
        for wait in (ticket.wait, store.drain):
            with pytest.raises(LaneTimeout) as caught:
                wait()
            text = str(caught.value)
            assert "run demo, rank 2, file " in text
            assert "WRITE c0:param (16,384 bytes, 0 of 2 blocks done)" in text
            assert "not done after 0.05 s" in text
            assert "slower than promised" in text
        gate.open()
        ticket.wait(20.0)
        store.drain(20.0)


def test_every_waiter_of_every_lane_is_released_when_the_disk_dies(tmp_path: Path) -> None:
    io, gate = FaultyIO(), Gate()
    caught: list[str] = []

    def dying(transfer, view: memoryview, write: bool) -> int:
        gate(lambda part: 0, view, write)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with make(tmp_path, io, in_flight_bytes=2 * BLOCK) as store:
        for name in SIZES:
            store.write(name, content(name, 1)).wait()
        io.always = dying
        io.arm()

        def client(name: str) -> None:
            for move in (store.read, store.write, store.read):
                try:
                    move(name, bytearray(SIZES[name])).wait()
                except StoreError as error:
                    caught.append(type(error).__name__)

        threads = [threading.Thread(target=client, args=(name,)) for name in SIZES for _ in range(3)]
        for thread in threads:
            thread.start()
        assert gate.reached.wait(10)
        gate.open()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        assert len(caught) == 27  # 9 clients x 3 requests, each with its own error
        assert store.statistics().read.num_in_flight == store.statistics().write.num_in_flight == 0
        store.drain()  # all errors were delivered


def test_failing_over_and_over_leaks_nothing(tmp_path: Path) -> None:
    with make(tmp_path, FaultyIO(always=EIO)) as store:
        io = store._file._io
        assert isinstance(io, FaultyIO)
        io.arm()
        for _ in range(200):
            buffer = AlignedBuffer(2 * BLOCK)
            with pytest.raises(DiskFault):
                store.write("c0:param", buffer).wait()
            assert buffer.close()  # nobody keeps it, not even the error
        assert len(store._lanes._undelivered) == 0


def test_a_disk_that_comes_to_refuse_o_direct_is_used_through_the_page_cache(tmp_path: Path) -> None:
    io = FaultyIO({3: EINVAL})
    with make(tmp_path, io) as store:
        io.arm()
        assert run_sequence(store) == []
        assert not store.statistics().direct
