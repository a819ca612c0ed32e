"""The store with a disk that works: what comes back is what was written last, in every order, size and memory."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from faulty_io import FaultyIO, Gate
from held import held

from outgrow.memory.direct_io import AlignedBuffer, DirectIO
from outgrow.memory.disk import DiskStore, ExtentSpec
from outgrow.memory.errors import DoesNotFit, LaneTimeout, StoreError

BLOCK = 8192


def make(folder: Path, sizes: dict[str, int], **settings) -> DiskStore:
    settings = {"block_bytes": BLOCK, "depth": 3, "deadline_s": 20.0} | settings
    return DiskStore(folder, "demo", 0, [ExtentSpec(*item) for item in sizes.items()], **settings)


def random_bytes(num_bytes: int, seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(num_bytes)


@pytest.fixture(autouse=True)
def _all_is_given_back(tmp_path: Path) -> Iterator[None]:
    before = held()
    yield
    assert held().since(before) == []
    assert list(tmp_path.glob("outgrow-*")) == []


@pytest.mark.parametrize("direct", [True, False])
def test_round_trips_of_all_sizes_and_kinds_of_memory(tmp_path: Path, direct: bool) -> None:
    rng = np.random.default_rng(7)
    edges = [1, 2, 4095, 4096, 4097, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 1]
    sizes = edges + rng.integers(1, 3 * BLOCK + 2, 30).tolist()
    with make(tmp_path, {f"c{i}:param": size for i, size in enumerate(sizes)}, io=DirectIO(direct)) as store:
        data = [rng.bytes(size) for size in sizes]
        for i, source in enumerate(data):
            store.write(f"c{i}:param", source)
        for i, source in enumerate(data):
            buffer, tensor, array = (
                AlignedBuffer(len(source)),
                torch.zeros(len(source), dtype=torch.uint8),
                bytearray(source),
            )
            array[:] = bytes(len(source))
            for target in (buffer, tensor, memoryview(array)):
                store.read(f"c{i}:param", target)
            store.drain()
            assert buffer.view == source
            assert tensor.numpy().tobytes() == source
            assert array == source
            buffer.close()
        assert store.statistics().direct == direct
        assert store.statistics().write.num_bytes == sum(sizes)
        assert store.statistics().read.num_bytes == 3 * sum(sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_keep_their_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (3, 1000, dtype.itemsize), dtype=torch.uint8)
    source = bits.view(dtype).reshape(3, 1000)  # NaNs with payloads included
    with make(tmp_path, {"c0:param": source.nbytes}) as store:
        store.write("c0:param", source)
        target = torch.zeros_like(source)
        assert store.read("c0:param", target).wait().num_bytes == source.nbytes
        assert torch.equal(target.view(torch.uint8), source.view(torch.uint8))
        with AlignedBuffer(source.nbytes) as buffer:
            store.read("c0:param", buffer).wait()
            assert torch.equal(buffer.tensor(dtype).view(torch.uint8), source.view(torch.uint8).flatten())


def test_a_thousand_requests_at_once_from_several_threads(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    sizes = rng.integers(1, 3 * BLOCK + 2, 1000).tolist()
    data = [rng.bytes(size) for size in sizes]
    came = [bytearray(size) for size in sizes]
    with make(tmp_path, {f"c{i}": size for i, size in enumerate(sizes)}, depth=8, in_flight_bytes=20 * BLOCK) as store:

        def client(which: int) -> None:
            for i in range(which, 1000, 4):
                store.write(f"c{i}", data[i])
                store.read(f"c{i}", came[i])

        threads = [threading.Thread(target=client, args=(which,)) for which in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        store.drain()
        statistics = store.statistics()
    assert all(bytes(a) == b for a, b in zip(came, data, strict=True))
    for lane in (statistics.read, statistics.write):
        assert lane.num_requests == 1000
        assert lane.num_in_flight == lane.in_flight_bytes == 0
        assert lane.peak_in_flight_bytes <= 20 * BLOCK
        assert lane.peak_num_in_flight > 1
        assert lane.busy_s > 0


def test_a_read_sees_the_write_that_was_asked_for_before_it(tmp_path: Path) -> None:
    gate, io = Gate(), FaultyIO()
    old, new, target = random_bytes(3 * BLOCK, 1), random_bytes(3 * BLOCK, 2), bytearray(3 * BLOCK)
    with make(tmp_path, {"c0:param": 3 * BLOCK}, io=io) as store:
        store.write("c0:param", old).wait()
        io.faults = {0: gate}
        io.arm()
        store.write("c0:param", new)
        read = store.read("c0:param", target)
        with pytest.raises(LaneTimeout, match=r"READ c0:param .*behind 1 earlier"):
            read.wait(0.05)
        gate.open()
        read.wait()
        assert target == new
        assert store.generation("c0:param") == 2


def test_a_write_leaves_the_reads_asked_for_before_it_alone(tmp_path: Path) -> None:
    gate, io = Gate(), FaultyIO()
    old, new, target = random_bytes(3 * BLOCK, 1), random_bytes(3 * BLOCK, 2), bytearray(3 * BLOCK)
    with make(tmp_path, {"c0:param": 3 * BLOCK}, io=io) as store:
        store.write("c0:param", old).wait()
        io.faults = {0: gate}
        io.arm()
        read = store.read("c0:param", target)
        assert gate.reached.wait(10)
        write = store.write("c0:param", new)
        with pytest.raises(LaneTimeout, match=r"WRITE c0:param .*behind 1 earlier"):
            write.wait(0.05)
        gate.open()
        read.wait()
        assert target == old
        store.read("c0:param", target).wait()
        assert target == new


def test_a_random_walk_of_requests_always_reads_the_last_write(tmp_path: Path) -> None:
    rng = np.random.default_rng(11)
    names = [f"c{i}:param" for i in range(5)]
    sizes = dict(zip(names, [1, 5000, BLOCK, 2 * BLOCK + 17, 3 * BLOCK], strict=True))
    last = {name: random_bytes(size, 0) for name, size in sizes.items()}
    checks = []
    with make(tmp_path, sizes) as store:
        for name in names:
            store.write(name, last[name])
        for step in range(600):
            name = names[rng.integers(len(names))]
            if rng.random() < 0.4:
                last[name] = random_bytes(sizes[name], step + 1)
                store.write(name, last[name])
            else:
                target = bytearray(sizes[name])
                store.read(name, target)
                checks.append((target, last[name]))
        store.drain()
    assert len(checks) > 300
    assert all(target == expected for target, expected in checks)


def test_the_layout_is_aligned_known_and_within_its_limit(tmp_path: Path) -> None:
    sizes = {"c0:param": 1, "c0:exp_avg": 4097, "a3.0": 4096}
    with make(tmp_path, sizes, limit_bytes=16384) as store:
        assert store.file_bytes == os.stat(store.path).st_size == 16384
        places = [store.place(name) for name in sizes]
        assert [place.offset_bytes for place in places] == [0, 4096, 12288]
        assert [(place.chunk, place.slot) for place in places] == [("c0", "param"), ("c0", "exp_avg"), ("a3.0", "")]
    with pytest.raises(DoesNotFit, match="needs 16,384 bytes and its limit is 16,383, 1 too few"):
        make(tmp_path, sizes, limit_bytes=16383)


def test_neighbours_are_not_touched(tmp_path: Path) -> None:
    sizes = {f"c{i}": 5000 for i in range(3)}
    with make(tmp_path, sizes) as store:
        for name in sizes:
            store.write(name, b"x" * 5000)
        with AlignedBuffer(5000) as buffer:  # written with its padding
            buffer.padded[:] = b"y" * len(buffer.padded)
            for _ in range(3):
                store.write("c1", buffer).wait()
        for name, letter in (("c0", b"x"), ("c1", b"y"), ("c2", b"x")):
            target = bytearray(5000)
            store.read(name, target).wait()
            assert target == letter * 5000


def test_an_empty_store_waits_for_nothing(tmp_path: Path) -> None:
    with make(tmp_path, {}) as store:
        store.drain()
        store.drain(0.0)
    store.close()


def test_mistakes_are_refused_before_anything_moves(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="named twice"):
        DiskStore(tmp_path, "demo", 0, [ExtentSpec("c0", 1), ExtentSpec("c0", 1)])
    with pytest.raises(ValueError, match="multiple of 4096"):
        make(tmp_path, {"c0": 1}, block_bytes=5000)
    with pytest.raises(ValueError, match="depth"):
        make(tmp_path, {"c0": 1}, depth=0)
    for name, num_bytes in (("", 1), ("c0 param", 1), ("c0", 0)):
        with pytest.raises(ValueError, match="extent"):
            ExtentSpec(name, num_bytes)
    with make(tmp_path, {"c0": 10}) as store:
        with pytest.raises(ValueError, match="no extent 'c1'"):
            store.read("c1", bytearray(10))
        with pytest.raises(ValueError, match="has 10 bytes, the memory given 11"):
            store.write("c0", bytes(11))
        with pytest.raises(ValueError, match="read-only"):
            store.read("c0", memoryview(bytes(10)))
        assert store.statistics().read.num_requests == store.statistics().write.num_requests == 0


def test_what_was_never_written_cannot_be_read(tmp_path: Path) -> None:
    with make(tmp_path, {"c0:param": 10, "c1:param": 10}) as store:
        store.write("c0:param", bytes(10)).wait()
        with pytest.raises(
            StoreError, match=r"run demo, rank 0, chunk c1, slot param, .*offset 4096: .*never been written"
        ):
            store.read("c1:param", bytearray(10)).wait()


def test_requests_hold_the_callers_memory_only_while_they_run(tmp_path: Path) -> None:
    with make(tmp_path, {"c0": BLOCK}) as store:
        buffer = AlignedBuffer(BLOCK)
        kept = [store.write("c0", buffer).wait(), store.read("c0", buffer).wait()]
        assert buffer.close()
        assert all(ticket.done for ticket in kept)


def test_closing_keeps_the_first_error_and_cancels_the_rest(tmp_path: Path) -> None:
    io, gate = FaultyIO(), Gate()
    store = make(tmp_path, {"c0": BLOCK, "c1": BLOCK}, io=io, depth=1, deadline_s=0.05)
    tickets = []

    def use() -> None:
        with store:
            io.always = gate
            io.arm()
            tickets.append(store.write("c0", bytes(BLOCK)))
            assert gate.reached.wait(10)
            tickets.append(store.write("c1", bytes(BLOCK)))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use()
    running, queued = tickets
    with pytest.raises(StoreError, match="cancelled"):
        queued.wait()
    assert not running.done  # the kernel still has it: its memory must not be used, its descriptor not closed
    assert os.fstat(store._file._fd).st_nlink == 0
    assert not os.path.exists(store.path)
    gate.open()
    store.close(20.0)
    assert running.done


def test_a_fork_is_told_that_the_store_is_not_its_own(tmp_path: Path) -> None:
    with make(tmp_path, {"c0": 10}) as store:
        pid = os.fork()
        if pid == 0:
            try:
                store.write("c0", bytes(10))
            except StoreError as error:
                os._exit(0 if "fork" in str(error) else 2)
            os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
        store.write("c0", bytes(10)).wait()


def test_a_soak_leaves_memory_descriptors_and_threads_flat(tmp_path: Path) -> None:
    def anonymous_bytes() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    def cycles(count: int) -> None:
        for cycle in range(count):
            with (
                make(tmp_path, {f"c{i}": 3 * BLOCK + i for i in range(4)}) as store,
                AlignedBuffer(3 * BLOCK) as buffer,
            ):
                for _ in range(5):
                    for i in range(4):
                        store.write(f"c{i}", bytes(3 * BLOCK + i))
                        store.read(f"c{i}", bytearray(3 * BLOCK + i))
                    store.drain()
                store.write("c0", buffer)
                if cycle % 2:
                    store.drain()

    cycles(10)
    before, before_bytes = held(), anonymous_bytes()
    cycles(40)
    assert held().since(before) == []
    assert anonymous_bytes() - before_bytes < 4 << 20
