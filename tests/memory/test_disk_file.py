"""The file of a store: private, reserved, removed in time, and the kernel's refusals as typed errors."""

import errno
import os
import resource
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from faulty_io import EINVAL, EIO, FaultyIO, write_lost

from outgrow.memory.direct_io import AlignedBuffer, DirectIO
from outgrow.memory.disk_file import SlotFile, file_system_of, remove_stale_files
from outgrow.memory.errors import DiskFault, DiskFull, StoreError

MIB = 1 << 20


def open_file(folder: Path, num_bytes: int = MIB, io: DirectIO | None = None, run: str = "demo") -> SlotFile:
    return SlotFile(folder, run, 3, num_bytes, io or DirectIO())


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def _nothing_left_behind(tmp_path: Path) -> Iterator[None]:
    before = num_descriptors()
    yield
    assert num_descriptors() == before
    assert list(tmp_path.glob("outgrow-*")) == []


def forked(work: Callable[[], None], wait: bool = True) -> int:
    """Run `work` in a child process that then ends without any clean-up. Returns its id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    if wait:
        assert os.waitpid(pid, 0)[1] == 0
    return pid


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB where we may mount one; else this one, with files limited to 4 MiB. Both are real ends."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = os.geteuid() == 0 and not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, check=False
    ).returncode  # fmt: skip
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not mounted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MIB, limits[1]))
    yield folder
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_the_file_is_private_named_and_fully_reserved(tmp_path: Path) -> None:
    file = open_file(tmp_path, 3 * MIB, run="my run/1")
    status = os.stat(file.path)
    assert Path(file.path).name == f"outgrow-my_run_1-rank3-pid{os.getpid()}.chunks"
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_size == 3 * MIB
    assert status.st_blocks * 512 >= 3 * MIB
    file.close()
    assert not os.path.exists(file.path)
    file.close()


def test_o_direct_is_used_where_the_file_system_has_it(tmp_path: Path) -> None:
    try:
        fd = os.open(tmp_path / "probe", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    except OSError:
        accepted = False
    else:
        accepted = True
        os.close(fd)
    file = open_file(tmp_path)
    assert file.direct == accepted
    file.close()


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("misaligned", [0, 1, 512])
def test_any_length_at_any_address_comes_back(tmp_path: Path, direct: bool, misaligned: int) -> None:
    rng = np.random.default_rng(1)
    file = open_file(tmp_path, io=DirectIO(direct))
    scratch = AlignedBuffer(8192)
    for num_bytes in (1, 4095, 4096, 4097, 8192, 20000, 65536):
        sent, came = AlignedBuffer(num_bytes + misaligned), AlignedBuffer(num_bytes + misaligned)
        sent.view[misaligned:] = rng.bytes(num_bytes)
        file.write(sent.view[misaligned:], 16384, scratch)
        file.read(came.view[misaligned:], 16384, scratch)
        assert sent.view[misaligned:] == came.view[misaligned:]
    assert file.direct == direct
    file.close()


def test_two_stores_of_one_process_need_two_names(tmp_path: Path) -> None:
    file = open_file(tmp_path)
    with pytest.raises(StoreError, match="name one differently"):
        open_file(tmp_path)
    assert os.path.exists(file.path)
    other = open_file(tmp_path, run="other")
    other.close()
    file.close()


def test_files_of_dead_processes_are_removed_and_others_are_not(tmp_path: Path) -> None:
    forked(lambda: setattr(forked, "kept", open_file(tmp_path, run="dead")))  # ends without closing
    (stale,) = tmp_path.glob("outgrow-dead-*")
    (tmp_path / f"outgrow-reused-rank0-pid{os.getpid()}.chunks").write_bytes(b"a process of ours had this id before")
    (tmp_path / "notes.chunks").write_bytes(b"not ours")
    (tmp_path / "outgrow-folder.chunks").mkdir()
    (tmp_path / "outgrow-link.chunks").symlink_to(tmp_path / "notes.chunks")
    file = open_file(tmp_path, run="alive")
    assert not stale.exists()
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted(["notes.chunks", "outgrow-folder.chunks", "outgrow-link.chunks", Path(file.path).name])
    file.close()
    (tmp_path / "outgrow-folder.chunks").rmdir()
    (tmp_path / "outgrow-link.chunks").unlink()


def test_the_file_of_a_living_process_stays_until_it_is_killed(tmp_path: Path) -> None:
    reader, writer = os.pipe()

    def live() -> None:
        file = open_file(tmp_path, run="alive")
        os.write(writer, b"x")
        signal.pause()
        file.close()

    pid = forked(live, wait=False)
    assert os.read(reader, 1) == b"x"
    assert remove_stale_files(tmp_path) == []
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert len(remove_stale_files(tmp_path)) == 1
    os.close(reader)
    os.close(writer)


def test_a_fork_does_not_remove_its_parents_file(tmp_path: Path) -> None:
    file = open_file(tmp_path)
    forked(file._remove)
    assert os.path.exists(file.path)
    file.close()


def test_a_file_that_took_our_name_is_not_removed(tmp_path: Path) -> None:
    file = open_file(tmp_path)
    os.unlink(file.path)
    Path(file.path).write_bytes(b"someone else's")
    file.close()
    assert Path(file.path).read_bytes() == b"someone else's"
    os.unlink(file.path)


def test_a_sweep_between_creation_and_lock_is_survived(tmp_path: Path) -> None:
    class SweptIO(DirectIO):
        num_created = 0

        def create(self, path: str) -> int:
            fd = super().create(path)
            self.num_created += 1
            if self.num_created == 1:
                assert remove_stale_files(tmp_path) == [path]
            return fd

    io = SweptIO()
    file = open_file(tmp_path, io=io)
    assert io.num_created == 2
    assert os.path.exists(file.path)
    file.close()


def test_too_little_space_is_refused_with_the_numbers(tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match=r"needs 1,125,899,906,842,624 bytes and .* has [\d,]+ free, [\d,]+ too few"):
        open_file(tmp_path, 1 << 50)


def test_a_disk_that_fills_up_while_we_reserve_is_full(small_disk: Path) -> None:
    class RacedIO(DirectIO):
        def allocate(self, fd: int, num_bytes: int) -> None:
            with open(small_disk / "someone else's", "wb") as other:
                other.write(bytes(3 * MIB))
            super().allocate(fd, num_bytes if os.statvfs(small_disk).f_blocks < 2000 else 5 * MIB)

    with pytest.raises(DiskFull, match=r"could not reserve 3,145,728 bytes .*(ENOSPC|EFBIG)"):
        open_file(small_disk, 3 * MIB, RacedIO())
    assert [path.name for path in small_disk.iterdir()] == ["someone else's"]


def test_a_full_file_system_gives_enospc_on_write_where_nothing_was_reserved(small_disk: Path) -> None:
    class SparseIO(DirectIO):
        def allocate(self, fd: int, num_bytes: int) -> None:
            os.ftruncate(fd, num_bytes)

    limited = resource.getrlimit(resource.RLIMIT_FSIZE)[0] == 4 * MIB
    file = open_file(small_disk, 3 * MIB, SparseIO())
    if limited:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    else:
        (small_disk / "someone else's").write_bytes(bytes(2 * MIB))
    with AlignedBuffer(3 * MIB) as data, AlignedBuffer(4096) as scratch, pytest.raises(OSError) as caught:
        file.write(data.view, 0, scratch)
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
    file.close()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path, code: int) -> None:
    class RefusingIO(DirectIO):
        def create(self, path: str) -> int:
            raise OSError(code, os.strerror(code), path)

    with pytest.raises(StoreError, match=rf"rank 3, file .*{errno.errorcode[code]}.*must be writable"):
        open_file(tmp_path, io=RefusingIO())


def test_a_read_only_folder_is_a_typed_error(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir(mode=0o555)

    def attempt() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)
        with pytest.raises(StoreError, match="EACCES"):
            open_file(folder)

    forked(attempt)


def test_a_missing_folder_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"ENOENT.*must exist"):
        open_file(tmp_path / "unmounted")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match=r"ENOTDIR.*must exist"):
        open_file(tmp_path / "file")
    assert not (tmp_path / "unmounted").exists()


def test_a_disk_that_does_not_keep_the_first_block_is_refused(tmp_path: Path) -> None:
    lying, failing = FaultyIO(always=write_lost), FaultyIO(always=EIO)
    lying.arm()
    failing.arm()
    with pytest.raises(DiskFault, match="did not come back"):
        open_file(tmp_path, io=lying)
    with pytest.raises(DiskFault, match="EIO"):
        open_file(tmp_path, io=failing)


def test_einval_falls_back_once_to_buffered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    io = FaultyIO({0: EINVAL})
    file = open_file(tmp_path, io=io)
    assert file.direct
    io.arm()
    with AlignedBuffer(8192) as data, AlignedBuffer(8192) as came, AlignedBuffer(4096) as scratch:
        data.view[:] = b"ab" * 4096
        file.write(data.view, 4096, scratch)
        assert not file.direct
        file.read(came.view, 4096, scratch)
        assert data.view == came.view
        assert caplog.text.count("refuses O_DIRECT") == 1
        io.faults = {io.num_requests: EINVAL}
        with pytest.raises(OSError, match="Invalid argument"):  # buffered and still refused: not alignment
            file.write(data.view, 4096, scratch)
    file.close()


def test_a_file_system_that_refuses_the_flag_is_used_buffered(tmp_path: Path) -> None:
    class OldTmpfs(DirectIO):
        def set_direct(self, fd: int, direct: bool) -> None:
            if direct:
                raise OSError(errno.EINVAL, "Invalid argument")

    file = open_file(tmp_path, io=OldTmpfs())
    assert not file.direct
    file.close()


def test_memory_file_systems_are_named_and_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    assert file_system_of(Path("/proc")) == "proc"
    assert file_system_of(Path("/nowhere")) == "unknown"
    shm = Path("/dev/shm")
    file = open_file(shm if file_system_of(shm) == "tmpfs" else Path("/run"), 4096, run=f"test{os.getpid()}")
    assert "takes memory" in caplog.text
    file.close()


def test_buffered_transfers_leave_no_page_cache_behind(tmp_path: Path) -> None:
    calls = []

    class WatchedIO(DirectIO):
        def forget(self, fd: int, num_bytes: int, offset_bytes: int, written: bool) -> None:
            calls.append((num_bytes, offset_bytes, written))
            super().forget(fd, num_bytes, offset_bytes, written)

    file = open_file(tmp_path, io=WatchedIO(direct=False))
    with AlignedBuffer(MIB) as data, AlignedBuffer(4096) as scratch:
        data.tensor().random_(0, 256)
        file.write(data.view, 0, scratch)
        file.read(data.view, 0, scratch)
    assert calls[-2:] == [(MIB, 0, True), (MIB, 0, False)]
    file.close()


def test_sizes_are_checked(tmp_path: Path) -> None:
    for num_bytes in (0, 4097):
        with pytest.raises(ValueError, match="multiple of 4096"):
            open_file(tmp_path, num_bytes)
