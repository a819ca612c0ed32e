"""A memory cgroup with a limit: the kernel's word on what a process and its children hold.

Owns making, reading and removing one, in version 1 and 2. It does not own the processes in it: a process joins by
writing its number to `join_file`, best before it loads anything, as only what it takes from then on is counted.

Groups are made directly below where the controller is mounted, which takes the rights to do so (root, or a container
of one's own). No rlimit stands in for it: RLIMIT_AS counts addresses, not memory, and RLIMIT_RSS does nothing on Linux.
"""

import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from ..memory.errors import OutgrowError

__all__ = ["CgroupUnavailable", "MemoryCgroup"]

_ROOT = Path("/sys/fs/cgroup")
_LEAVE_S = 5.0  # how long a killed process may take to leave


class CgroupUnavailable(OutgrowError):
    """No memory cgroup can be made here; the message says what was tried."""


class MemoryCgroup:
    """A fresh group. A context manager: leaving it removes the group, whose processes must have ended.

    Args:
        limit_bytes: of memory, page cache included; swap is not given any.
        root: where cgroups are mounted.

    Raises:
        CgroupUnavailable: there is no memory controller that a group can be made in.
    """

    def __init__(self, limit_bytes: int, root: Path = _ROOT) -> None:
        name = f"outgrow-perf-{os.getpid()}-{threading.get_native_id()}"  # a thread has one at a time
        if (root / "memory" / "memory.limit_in_bytes").exists():
            self._is_v2, parent = False, root / "memory"
        elif "memory" in _words(root / "cgroup.controllers"):
            self._is_v2, parent = True, root
        else:
            raise CgroupUnavailable(f"no memory controller below {root}: neither version 1 nor version 2 is mounted")
        self._folder = parent / name
        try:
            if self._is_v2 and "memory" not in _words(root / "cgroup.subtree_control"):
                (root / "cgroup.subtree_control").write_text("+memory")
            self._folder.mkdir(exist_ok=True)
            for file, value, is_needed in self._settings(limit_bytes):
                if is_needed or (self._folder / file).exists():
                    (self._folder / file).write_text(str(value))
        except OSError as error:
            with suppress(OSError):
                self._folder.rmdir()
            raise CgroupUnavailable(
                f"a memory cgroup cannot be made at {self._folder}: {error}; it takes the rights of root there"
            ) from error

    def _settings(self, limit_bytes: int) -> list[tuple[str, int, bool]]:
        """File, value, and whether it must be there: the swap files exist only on kernels that account for it."""
        if self._is_v2:
            return [("memory.max", limit_bytes, True), ("memory.swap.max", 0, False)]
        return [("memory.limit_in_bytes", limit_bytes, True), ("memory.swappiness", 0, False)]

    @property
    def join_file(self) -> Path:
        """A process that writes its number here is in the group from then on."""
        return self._folder / "cgroup.procs"

    @property
    def version(self) -> int:
        return 2 if self._is_v2 else 1

    def peak_bytes(self) -> int | None:
        """The most that the group held so far; None on kernels of version 2 before 5.19, which do not keep it."""
        try:
            return int((self._folder / ("memory.peak" if self._is_v2 else "memory.max_usage_in_bytes")).read_text())
        except FileNotFoundError:
            return None

    def num_killed(self) -> int:
        """Processes that the kernel killed because the group was at its limit."""
        file = self._folder / ("memory.events" if self._is_v2 else "memory.oom_control")
        for line in file.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == "oom_kill":
                return int(value)
        return 0

    def close(self) -> None:
        """Remove the group. Raises OSError where a process is still in it."""
        deadline = time.monotonic() + _LEAVE_S
        while True:
            try:
                self._folder.rmdir()
            except FileNotFoundError:
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
