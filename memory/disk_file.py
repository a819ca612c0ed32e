"""The one file of a store: its name, its reserved bytes, and how the kernel's errors become ours.

Owns creation (private to the user, exclusive, preallocated, O_DIRECT tried and fallen back from), the removal of files
that dead processes left behind, and whole transfers at aligned offsets from any memory. It does not know what lies
where (`disk.py`), nor threads (`disk_lanes.py`).

A file belongs to the living process that holds its lock (flock). The kernel drops the lock when the process ends,
however it ends, so a file whose lock can be taken is stale. Unlike process ids, which are used again and differ between
containers that share a folder, a lock cannot be mistaken for another's.
"""

import errno
import fcntl
import logging
import os
import re
import stat
import threading
import weakref
from pathlib import Path

import numpy as np

from .direct_io import ALIGN_BYTES, AlignedBuffer, DirectIO, address_of, pread_full, pwrite_full, round_up
from .errors import DiskFault, DiskFull, Place, StoreError

__all__ = ["SlotFile", "file_system_of", "remove_stale_files", "store_error"]

_log = logging.getLogger(__name__)

_PATTERN = "outgrow-*.chunks"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_IN_MEMORY = {"tmpfs", "ramfs"}


class SlotFile:
    """A new, preallocated, private file in `folder`; gone when closed, or when the process ends by itself.

    Raises DiskFull with the numbers if it does not fit, StoreError if the folder cannot be used, ValueError.
    """

    def __init__(self, folder: str | Path, run: str, rank: int, num_bytes: int, io: DirectIO) -> None:
        if num_bytes <= 0 or num_bytes % ALIGN_BYTES:
            raise ValueError(f"the file's size must be a positive multiple of {ALIGN_BYTES} bytes, not {num_bytes}")
        folder = Path(folder).absolute()
        label = re.sub(r"[^A-Za-z0-9._-]", "_", run)[:100]
        self.path = str(folder / f"outgrow-{label}-rank{rank}-pid{os.getpid()}.chunks")
        self.num_bytes = num_bytes
        self.place = Place(run, rank, self.path)
        self.direct = False
        self._io = io
        self._mode_lock = threading.Lock()
        remove_stale_files(folder)
        self._check_space(folder)
        self.file_system = file_system_of(folder)
        if self.file_system in _IN_MEMORY:
            _log.warning(
                "the disk tier's folder %s is a %s: what is stored there takes memory", folder, self.file_system
            )
        self._fd = self._create()
        identity = os.fstat(self._fd)
        self._remove = weakref.finalize(self, _remove_own, self.path, identity.st_ino, os.getpid())
        try:
            self._reserve(folder)
            self._probe()
        except BaseException:
            self.close()
            raise

    def read(self, view: memoryview, offset_bytes: int, scratch: AlignedBuffer) -> None:
        """Fill `view` (any length, any address) from an aligned offset. Raises OSError or EOFError."""
        self._check_alive()
        head = self._aligned_bytes(view)
        if head:
            self._transfer(False, view[:head], offset_bytes)
        for start in range(head, len(view), scratch.num_bytes):
            count = min(scratch.num_bytes, len(view) - start)
            self._transfer(False, scratch.padded[: round_up(count)], offset_bytes + start)
            _copy(scratch.view[:count], view[start : start + count])

    def write(self, view: memoryview, offset_bytes: int, scratch: AlignedBuffer) -> None:
        """Write `view` (any length, any address) at an aligned offset, padded to pages. Raises OSError or EOFError."""
        self._check_alive()
        head = self._aligned_bytes(view)
        if head:
            self._transfer(True, view[:head], offset_bytes)
        for start in range(head, len(view), scratch.num_bytes):
            count = min(scratch.num_bytes, len(view) - start)
            _copy(view[start : start + count], scratch.view[:count])
            self._transfer(True, scratch.padded[: round_up(count)], offset_bytes + start)

    def close(self) -> None:
        """Remove the file and close it. Nothing may be in flight. May be repeated."""
        self._remove()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._io.close(fd)

    def abandon(self) -> None:
        """Remove the file's name, but leave it open: a transfer that never came back still uses it."""
        self._remove()

    def _transfer(self, write: bool, view: memoryview, offset_bytes: int) -> None:
        was_direct = self.direct
        move = pwrite_full if write else pread_full
        try:
            move(self._io, self._fd, view, offset_bytes)
        except OSError as error:
            if error.errno != errno.EINVAL or not was_direct:
                raise
            self._go_buffered(error)
            move(self._io, self._fd, view, offset_bytes)
        if not self.direct:
            self._io.forget(self._fd, len(view), offset_bytes, write)

    def _go_buffered(self, error: OSError) -> None:
        with self._mode_lock:
            if self.direct:
                _log.warning(
                    "%s refuses O_DIRECT (%s); going on through the page cache, which is slower", self.path, error
                )
                self._io.set_direct(self._fd, False)
                self.direct = False

    def _check_alive(self) -> None:
        """The kernel lets us go on in a file that someone removed or cut; we do not."""
        status = self._io.status(self._fd)
        if status.st_nlink == 0:
            raise FileNotFoundError(errno.ENOENT, "the file was removed while the run was using it", self.path)
        if status.st_size < self.num_bytes:
            raise EOFError(f"the file was cut to {status.st_size:,} of {self.num_bytes:,} bytes")

    def _check_space(self, folder: Path) -> None:
        try:
            free = os.statvfs(folder)
        except OSError as error:
            raise store_error(error, f"look into the folder {folder}", self.place) from error
        free_bytes = free.f_bavail * free.f_frsize
        if free_bytes < self.num_bytes:
            raise DiskFull(
                f"the store needs {self.num_bytes:,} bytes and {folder} has {free_bytes:,} free, "
                f"{self.num_bytes - free_bytes:,} too few; free that much or name another folder", self.place,
            )  # fmt: skip

    def _reserve(self, folder: Path) -> None:
        try:
            self._io.allocate(self._fd, self.num_bytes)
        except OSError as error:
            raise store_error(error, f"reserve {self.num_bytes:,} bytes in {folder}", self.place) from error

    def _create(self) -> int:
        """Create and lock the file; again if a sweep of another process took it for stale before it was locked."""
        while True:
            try:
                fd = self._io.create(self.path)
            except FileExistsError as error:
                raise StoreError(
                    "another store of this process has this run and rank; close what has it open, or name one "
                    "differently", self.place
                ) from error  # fmt: skip
            except OSError as error:
                raise store_error(error, "create the file", self.place) from error
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
            except OSError as error:
                _log.warning("%s cannot be locked (%s): if this process is killed, remove it by hand", self.path, error)
            if os.fstat(fd).st_nlink:
                return fd
            self._io.close(fd)

    def _probe(self) -> None:
        """Move one block each way with O_DIRECT, and see that it comes back; else through the page cache."""
        with AlignedBuffer(ALIGN_BYTES) as sent, AlignedBuffer(ALIGN_BYTES) as came:
            sent.view[:] = bytes(range(256)) * (ALIGN_BYTES // 256)
            try:
                if self._io.direct:
                    self.direct = True
                    try:
                        self._io.set_direct(self._fd, True)
                    except OSError as error:
                        if error.errno != errno.EINVAL:
                            raise
                        self._go_buffered(error)
                self._transfer(True, sent.padded, 0)
                self._transfer(False, came.padded, 0)
            except (OSError, EOFError) as error:
                raise store_error(error, "write and read the first block", self.place) from error
            if sent.view != came.view:
                raise DiskFault("the first block did not come back as it was written; use another disk", self.place)

    def _aligned_bytes(self, view: memoryview) -> int:
        """How much of `view`, from its start, can be moved directly."""
        return len(view) // ALIGN_BYTES * ALIGN_BYTES if address_of(view) % ALIGN_BYTES == 0 else 0


def remove_stale_files(folder: Path) -> list[str]:
    """Remove the files of this user's dead processes in `folder`; returns their paths. Never raises."""
    removed = []
    try:
        candidates = sorted(folder.glob(_PATTERN))
    except OSError:
        return []
    for path in candidates:
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            status = os.fstat(fd)
            if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while its owner lives
                path.unlink()
                removed.append(str(path))
                _log.info("removed %s (%s bytes), left behind by a dead process", path, f"{status.st_size:,}")
        except OSError:
            continue
        finally:
            os.close(fd)
    return removed


def store_error(error: BaseException, doing: str, place: Place) -> StoreError:
    """The typed error for what the kernel said while `doing` something at `place`."""
    if isinstance(error, EOFError):
        return DiskFault(f"could not {doing}: {error}. Something else changed the file; start from a checkpoint", place)
    if not isinstance(error, OSError):
        return StoreError(f"could not {doing}: {error!r}. Start from a checkpoint", place)
    said = f"could not {doing}: {errno.errorcode.get(error.errno or 0, error.errno)}, {error.strerror}"
    if error.errno in _FULL:
        return DiskFull(f"{said}. Free space, raise the quota or name another folder", place)
    if error.errno in (errno.ENOENT, errno.ENOTDIR) and place.offset_bytes is None:
        return StoreError(f"{said}. The folder must exist: create it, or mount its disk", place)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StoreError(f"{said}. The folder must be writable: change its mode, or name another one", place)
    return DiskFault(
        f"{said}. See the kernel's log; check the disk, or name another folder and start from a checkpoint", place
    )


def file_system_of(folder: Path) -> str:
    """The type of the file system below `folder` as the kernel names it (`ext4`, `tmpfs`, …), or `unknown`."""
    try:
        device = os.stat(folder).st_dev
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in lines:  # id parent major:minor root mount-point options ... - type source options
        head, _, tail = line.partition(" - ")
        if head.split()[2] == wanted:
            return tail.split()[0]
    return "unknown"


def _remove_own(path: str, inode: int, pid: int) -> None:
    """Remove `path` if it is still our file, and we are still the process that made it (not a fork of it)."""
    try:
        if os.getpid() == pid and os.stat(path, follow_symlinks=False).st_ino == inode:
            os.unlink(path)
    except OSError as error:
        _log.debug("%s was gone before it was removed: %s", path, error)


def _copy(source: memoryview, target: memoryview) -> None:
    """Copy without the interpreter lock."""
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))
