"""The memory that a worker may use: the user's words for it, and what is there when none are given.

Owns sizes as text, their check, and detection from the cgroup or machine. Does not own what fills the budget.
"""

import re
from dataclasses import dataclass

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
    """Budgets per worker.

    Attributes:
        host: for the whole worker process as the kernel counts it, interpreter and libraries included.

    Raises:
        ValueError: a size that is none.
    """

    host: int | str | None = None

    def __post_init__(self) -> None:
        if self.host is not None:
            parse_bytes(self.host, "Memory(host)")

    @property
    def host_bytes(self) -> int | None:
        return None if self.host is None else parse_bytes(self.host, "Memory(host)")

    @classmethod
    def detect(cls, num_workers: int = 1) -> "Memory":
        """An equal share for each worker of what this machine or cgroup has, less RESERVE_SHARE."""
        total = psutil.virtual_memory().total
        limit = cgroup_limit_bytes()
        available = total if limit is None else min(total, limit)
        return cls(host=int(available * (1 - RESERVE_SHARE)) // max(num_workers, 1))
