"""What a machine can do, in numbers: measured, or described by a file.

Owns the record and its JSON. Does not own the measurement (`runtime/probing.py`) nor what becomes of it (`cost.py`).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from .storage_replay import Fresh

__all__ = ["DiskFigures", "Hardware", "NetFigures", "Transfers"]


@dataclass(frozen=True, slots=True)
class Transfers:
    """Transfers of one kind through the lane that training uses, one after the other, checksums included.

    Attributes:
        bytes_per_s: alone, beside `latency_s`.
        latency_s: what a transfer takes beside its bytes.
        beside: times as long that one takes while all threads compute, to which lanes give way.
        cores_share: of what all threads compute with, the part that the lane takes meanwhile: checksums, copies, and
            the kernel's work for a request.

    Raises:
        ValueError: a bandwidth that is not positive, a negative latency, a transfer that is faster beside computing.
    """

    bytes_per_s: float
    latency_s: float
    beside: float
    cores_share: float

    def __post_init__(self) -> None:
        _check_positive(self, "latency_s", "cores_share")
        if self.beside < 1:
            raise ValueError(f"{self}: no transfer is faster while all threads compute")

    def seconds(self, num_bytes: int) -> float:
        """Of one, alone."""
        return self.latency_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class DiskFigures:
    """A disk.

    Attributes:
        read, write: of state, and reads of activations.
        save: of activations, which are copied first.
        both_capacity: how much is done when both directions run, in units of one alone: 1 where they share, 2 where
            they do not meet.

    Raises:
        ValueError: a capacity that is none.
    """

    read: Transfers
    write: Transfers
    save: Transfers
    both_capacity: float

    def __post_init__(self) -> None:
        if not 1 <= self.both_capacity <= 2:
            raise ValueError(f"{self}: two directions do as much as one to two of them alone")

    def scaled(self, factor: float) -> "DiskFigures":
        """A disk of so many times the bandwidth."""

        def scaled(each: Transfers) -> Transfers:
            return replace(each, bytes_per_s=factor * each.bytes_per_s)

        return DiskFigures(scaled(self.read), scaled(self.write), scaled(self.save), self.both_capacity)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "DiskFigures":
        """From what `asdict` makes of it."""
        transfers = (Transfers(**fields[name]) for name in ("read", "write", "save"))
        return cls(*transfers, both_capacity=fields["both_capacity"])


@dataclass(frozen=True, slots=True)
class NetFigures:
    """Exchange between the ranks while all of them compute: seconds = latency + bytes / bandwidth, for one action.

    Attributes:
        gather_bytes_per_s, reduce_bytes_per_s: of whole chunks, fitted over several sizes.
        gather_latency_s, reduce_latency_s: likewise.
        cores_share: of what a rank's threads compute with, the part that an exchange takes meanwhile.

    Raises:
        ValueError: a bandwidth that is not positive, or a negative latency.
    """

    gather_bytes_per_s: float
    gather_latency_s: float
    reduce_bytes_per_s: float
    reduce_latency_s: float
    cores_share: float = 0.0

    def __post_init__(self) -> None:
        _check_positive(self, "gather_latency_s", "reduce_latency_s", "cores_share")


@dataclass(frozen=True, slots=True)
class Hardware:
    """One machine, as one rank with its threads finds it.

    Attributes:
        name: of the machine, its processor and its cores, as the cache knows it.
        num_threads: that a rank computes with.
        copy_bytes_per_s: of a copy in memory, counted once.
        sum_bytes_per_s: of adding one tensor to another, counted once.
        update_elems_per_s: parameters that a fused AdamW updates, beside `update_latency_s`.
        action_s: what an action takes beside its work.
        turn_s: what it takes to hand over to another micro-batch's thread.
        fault_s_per_byte: what the kernel takes to give memory that was not there, and to take it back.
        huge_fault_s_per_byte: likewise, of blocks with room for huge pages.
        disk: None where none was measured.
        net: None on one rank.
        update_latency_s: what an update of a chunk takes beside its elements.

    Raises:
        ValueError: a number that is not positive.
    """

    name: str
    num_threads: int
    copy_bytes_per_s: float
    sum_bytes_per_s: float
    update_elems_per_s: float
    action_s: float
    turn_s: float
    fault_s_per_byte: float
    huge_fault_s_per_byte: float
    disk: DiskFigures | None = None
    net: NetFigures | None = None
    update_latency_s: float = 0.0

    def __post_init__(self) -> None:
        _check_positive(self, "update_latency_s", "action_s", "turn_s", "fault_s_per_byte", "huge_fault_s_per_byte")

    def fault_seconds(self, fresh: Fresh) -> float:
        """What fresh pages take."""
        return self.fault_s_per_byte * fresh.paged_bytes + self.huge_fault_s_per_byte * fresh.huge_bytes

    def to_json(self) -> str:
        """The figures as JSON text; `from_json` reads it back."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Hardware":
        """Read figures.

        Raises:
            ValueError: text that holds none: keys missing, unknown, or numbers that cannot be.
        """
        try:
            fields = json.loads(text)
            disk, net = fields.get("disk"), fields.get("net")
            parts = {"disk": disk and DiskFigures.from_fields(disk), "net": net and NetFigures(**net)}
            return cls(**{**fields, **parts})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"these are no figures of a machine: {type(error).__name__}: {error}") from error


def _check_positive(record: object, *may_be_zero: str) -> None:
    for name in type(record).__dataclass_fields__:  # pyright: ignore[reportAttributeAccessIssue]
        value = getattr(record, name)
        if isinstance(value, int | float) and (value < 0 or (value == 0 and name not in may_be_zero)):
            raise ValueError(f"{type(record).__name__}({name}={value!r}): a positive number is needed")
