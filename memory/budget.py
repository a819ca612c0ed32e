"""The memory that a worker may use: the user's words for it, and what is there when none are given.

Owns sizes as text, their check, and detection from the cgroup or machine. Does not own what fills the budget.
"""

import os
import re
from dataclasses import dataclass, replace

import psutil

from .process import cgroup_limit_bytes

__all__ = ["Memory", "format_bytes", "parse_bytes"]

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {f"{_letter}iB": 1 << (10 * _power), f"{_letter}B": 10 ** (3 * _power), _letter: 1 << (10 * _power)}
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)\s*$", re.IGNORECASE)

RESERVE_SHARE = 0.1
"""Share of the machine that detection leaves to everything else."""


def parse_bytes(size: int | str, what: str = "size") -> int:
    """Bytes from `"2GiB"`, `"500MB"`, `"1.5 GiB"` or a number.

    Raises:
        ValueError: no size, or one that is not positive.
    """
    if isinstance(size, str):
        match = _SIZE.match(size)
        unit = match[2] if match else None
        factor = next(
            (value for key, value in _UNITS.items() if unit is not None and key.lower() == unit.lower()), None
        )
        if match is None or factor is None:
            raise ValueError(f"{what}={size!r} is no size; write e.g. '2GiB', '500MB' or a number of bytes")
        size = int(float(match[1]) * factor)
    if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
        raise ValueError(f"{what}={size!r}: a size is a positive number of bytes, or text such as '2GiB'")
    return size


def format_bytes(num_bytes: float) -> str:
    """For people: `1.50 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024 or unit == "GiB":
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.2f} {unit}"
        num_bytes /= 1024
    raise AssertionError("unreachable")


@dataclass(frozen=True, slots=True)
class Memory:
    """Budgets per worker: `Memory(host="6GiB", disk="/scratch", disk_limit="200GiB")`.

    Attributes:
        device: of accelerator memory, what is computed in; on a machine without an accelerator it needs
            `unified=False`. None: this machine's memory is all there is, and device and host are the same.
        host: for the whole worker process as the kernel counts it, interpreter and libraries included.
        disk: a folder on the disk that may hold what does not fit into memory; None: nothing goes to disk.
        disk_limit: the most that a worker may store there; None: what is free.
        unified: whether device and host are the same bytes; False forces memory apart and real copies: where there is
            no accelerator, a part of this process's memory plays the device, with `device` as its budget beside `host`.
            None: whether `device` is not given.

    Raises:
        ValueError: a size that is none, or settings that do not go together.
    """

    device: int | str | None = None
    host: int | str | None = None
    disk: str | os.PathLike[str] | None = None
    disk_limit: int | str | None = None
    unified: bool | None = None

    def __post_init__(self) -> None:
        for name in ("device", "host", "disk_limit"):
            value = getattr(self, name)
            if value is not None:
                parse_bytes(value, f"Memory({name})")
        if self.disk is None and self.disk_limit is not None:
            raise ValueError(f"Memory(disk_limit={self.disk_limit!r}) without disk=: give the folder that it limits")
        if self.disk is not None and (not isinstance(self.disk, str | os.PathLike) or not os.fspath(self.disk)):
            raise ValueError(f"Memory(disk={self.disk!r}): the path of a folder on a disk, e.g. disk='/scratch'")
        if self.unified not in (None, True, False):
            raise ValueError(f"Memory(unified={self.unified!r}): True, False, or None for what the machine is")
        if self.unified and self.device is not None:
            raise ValueError(
                f"Memory(device={self.device!r}, unified=True): on a unified machine device and host are the same "
                "bytes; give host= alone, or unified=False"
            )

    @property
    def is_separate(self) -> bool:
        """Whether device and host are memory apart from each other, so that moving between them copies."""
        return self.unified is False or self.device is not None

    @property
    def host_bytes(self) -> int | None:
        return None if self.host is None else parse_bytes(self.host, "Memory(host)")

    @property
    def device_bytes(self) -> int | None:
        return None if self.device is None else parse_bytes(self.device, "Memory(device)")

    @property
    def disk_limit_bytes(self) -> int | None:
        return None if self.disk_limit is None else parse_bytes(self.disk_limit, "Memory(disk_limit)")

    @property
    def disk_folder(self) -> str | None:
        return None if self.disk is None else os.fspath(self.disk)

    def filled(self, num_workers: int = 1) -> "Memory":
        """With a host budget in any case: the one that was given, or a worker's share of what is there."""
        return self if self.host is not None else replace(self, host=Memory.detect(num_workers).host)

    @classmethod
    def detect(cls, num_workers: int = 1) -> "Memory":
        """An equal share for each worker of what this machine or cgroup has, less RESERVE_SHARE."""
        total = psutil.virtual_memory().total
        limit = cgroup_limit_bytes()
        available = total if limit is None else min(total, limit)
        return cls(host=int(available * (1 - RESERVE_SHARE)) // max(num_workers, 1))
