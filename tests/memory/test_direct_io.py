"""Aligned buffers, and the loops that make whole transfers out of short ones."""

import errno
import mmap
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from faulty_io import EIO, FaultyIO, nothing_moved, short_by_half

from outgrow.memory.direct_io import (
    ALIGN_BYTES,
    AlignedBuffer,
    DirectIO,
    address_of,
    bytes_of,
    pread_full,
    pwrite_full,
    round_up,
)


class Mapping:
    """The kernel's own record of one buffer's memory, whatever the rest of the process maps and unmaps meanwhile.

    The memory is marked as not inherited by forked processes, as nothing else here is: so the kernel never joins it
    with a neighbour, and memory that gets the same address later is not taken for it.
    """

    def __init__(self, buffer: AlignedBuffer) -> None:
        first = address_of(buffer.padded)
        self._range = f"{first:08x}-{first + len(buffer.padded):08x}"
        mapped = buffer.padded.obj
        assert isinstance(mapped, mmap.mmap)
        mapped.madvise(mmap.MADV_DONTFORK)

    def resident_bytes(self) -> int | None:
        """Bytes of it that lie in memory; None once it is unmapped."""
        found = False
        resident_bytes = 0
        for line in Path("/proc/self/smaps").read_text().splitlines():
            name, *fields = line.split()
            if not name.endswith(":"):
                found = name == self._range
            elif found and name == "Rss:":
                resident_bytes = int(fields[0]) * 1024
            elif found and name == "VmFlags:" and "dc" in fields:
                return resident_bytes
        return None


@pytest.fixture
def fd(tmp_path: Path):
    fd = DirectIO().create(str(tmp_path / "file"))
    DirectIO().set_direct(fd, True)
    yield fd
    os.close(fd)


def test_round_up() -> None:
    assert [round_up(n) for n in (0, 1, 4095, 4096, 4097)] == [0, 4096, 4096, 4096, 8192]


@pytest.mark.parametrize("num_bytes", [1, 4096, 5000, (1 << 20) + 1])
def test_a_buffer_is_exact_aligned_and_shared_with_its_tensors(num_bytes: int) -> None:
    with AlignedBuffer(num_bytes) as buffer:
        assert len(buffer.view) == num_bytes
        assert len(buffer.padded) == round_up(num_bytes)
        assert address_of(buffer.view) % ALIGN_BYTES == 0
        tensor = buffer.tensor()
        tensor[-1] = 7
        assert buffer.view[num_bytes - 1] == 7
        for dtype in (torch.float32, torch.bfloat16, torch.int64):
            assert buffer.tensor(dtype).numel() == num_bytes // dtype.itemsize
            assert buffer.tensor(dtype).untyped_storage().data_ptr() == tensor.data_ptr()


def test_memory_lives_as_long_as_its_last_tensor_and_no_longer() -> None:
    buffer = AlignedBuffer(1 << 20)
    mapping = Mapping(buffer)
    tensor = buffer.tensor(torch.float32)[5:10]
    tensor.fill_(3)
    assert not buffer.close()
    assert mapping.resident_bytes()
    assert tensor.tolist() == [3.0] * 5  # would be a crash if it were unmapped
    with pytest.raises(ValueError, match="closed"):
        _ = buffer.view
    del tensor
    assert mapping.resident_bytes() is None
    assert buffer.close()


def test_closing_returns_the_memory() -> None:
    buffer = AlignedBuffer(8 << 20)
    mapping = Mapping(buffer)
    assert mapping.resident_bytes() == 0
    buffer.tensor().fill_(1)
    assert mapping.resident_bytes() == 8 << 20
    assert buffer.close()
    assert mapping.resident_bytes() is None


@pytest.mark.parametrize(("num_bytes", "is_huge"), [(16 << 20, True), (1 << 20, False)])
def test_large_buffers_ask_for_huge_pages(num_bytes: int, is_huge: bool) -> None:
    with AlignedBuffer(num_bytes) as buffer:
        assert ("hg" in flags_of(address_of(buffer.view))) == (is_huge and has_huge_pages())


def has_huge_pages() -> bool:
    return Path("/sys/kernel/mm/transparent_hugepage").exists()


def flags_of(address: int) -> list[str]:
    """What the kernel keeps of the mapping that an address lies in."""
    is_inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *words = line.split()
        if "-" in key and not key.endswith(":"):
            first, last = (int(bound, 16) for bound in key.split("-"))
            is_inside = first <= address < last
        elif is_inside and key == "VmFlags:":
            return words
    raise AssertionError(f"nothing is mapped at {address:#x}")


def test_bytes_of_shares_memory_or_refuses() -> None:
    tensor = torch.zeros(3, 4, dtype=torch.bfloat16, requires_grad=True)
    assert len(bytes_of(tensor)) == 24
    scalar = torch.zeros((), dtype=torch.float64)
    bytes_of(scalar)[7] = 0x40
    assert scalar.item() == 2.0
    assert len(bytes_of(memoryview(np.zeros(6, np.float32)))) == 24
    assert bytes_of(b"ab").readonly
    with pytest.raises(ValueError, match="contiguous"):
        bytes_of(torch.zeros(4, 4).t()[:2])
    with pytest.raises(ValueError, match="meta"):
        bytes_of(torch.zeros(4, device="meta"))
    with pytest.raises(ValueError, match="gaps"):
        bytes_of(memoryview(bytearray(10))[::2])


def test_a_buffer_needs_bytes() -> None:
    with pytest.raises(ValueError, match="at least 1 byte"):
        AlignedBuffer(0)


def test_the_file_is_private_and_new(tmp_path: Path) -> None:
    io = DirectIO()
    fd = io.create(str(tmp_path / "x"))
    assert os.fstat(fd).st_mode & 0o777 == 0o600
    io.close(fd)
    with pytest.raises(FileExistsError):
        io.create(str(tmp_path / "x"))
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        io.create(str(tmp_path / "link"))


def test_short_transfers_are_finished(fd: int) -> None:
    with AlignedBuffer(5 * ALIGN_BYTES) as source, AlignedBuffer(5 * ALIGN_BYTES) as target:
        source.view[:] = np.random.default_rng(0).bytes(source.num_bytes)
        io = FaultyIO({0: short_by_half, 1: short_by_half, 3: short_by_half, 4: short_by_half})
        io.arm()
        pwrite_full(io, fd, source.view, ALIGN_BYTES)
        assert io.num_requests == 3
        pread_full(io, fd, target.view, ALIGN_BYTES)
        assert io.num_faults == 4
        assert source.view == target.view


@pytest.mark.parametrize("fault", [nothing_moved, lambda transfer, view, write: 100])
def test_no_progress_is_a_fault_and_not_a_hang(fd: int, fault) -> None:
    io = FaultyIO(always=fault)
    io.arm()
    with AlignedBuffer(2 * ALIGN_BYTES) as buffer:
        with pytest.raises(OSError, match="in a row") as caught:
            pwrite_full(io, fd, buffer.view, 0)
        assert caught.value.errno == errno.EIO
        with pytest.raises((OSError, EOFError)):
            pread_full(io, fd, buffer.view, 0)


def test_a_read_past_the_end_says_where(fd: int) -> None:
    os.ftruncate(fd, ALIGN_BYTES)
    with AlignedBuffer(3 * ALIGN_BYTES) as buffer:
        with pytest.raises(EOFError, match="ends at byte 4096, 8192 bytes too early"):
            pread_full(DirectIO(), fd, buffer.view, 0)


def test_eio_is_tried_again_once_for_reads_and_never_for_writes(fd: int) -> None:
    os.ftruncate(fd, ALIGN_BYTES)
    with AlignedBuffer(ALIGN_BYTES) as buffer:
        once = FaultyIO({0: EIO})
        once.arm()
        pread_full(once, fd, buffer.view, 0)
        assert once.num_requests == 2
        twice = FaultyIO({0: EIO, 1: EIO})
        twice.arm()
        with pytest.raises(OSError, match="Input/output"):
            pread_full(twice, fd, buffer.view, 0)
        writing = FaultyIO({0: EIO})
        writing.arm()
        with pytest.raises(OSError, match="Input/output"):
            pwrite_full(writing, fd, buffer.view, 0)
        assert writing.num_requests == 1
