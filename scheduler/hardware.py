"""What a machine can do, in numbers: measured, or described by a file.

Owns the record and its JSON. Does not own the measurement (`runtime/probing.py`) nor what becomes of it (`cost.py`).
"""

import json
from dataclasses import asdict, dataclass, replace

__all__ = ["DiskFigures", "Hardware", "NetFigures"]


@dataclass(frozen=True, slots=True)
class DiskFigures:
    """A disk through the lanes that training uses, checksums included.

    Attributes:
        read_bytes_per_s, write_bytes_per_s: of transfers one after the other, each lane alone.
        both_bytes_per_s: of the two together, as many bytes read as written at the same time.
        latency_s: what a transfer takes beside its bytes.
        cores_share: of what all threads compute with, the part that a lane takes while it moves bytes: checksums, and
            the kernel's work for a request.
        read_beside, write_beside: times as long that a transfer takes while all threads compute, to which lanes give
            way.

    Raises:
        ValueError: a bandwidth that is not positive, a negative latency, a transfer that is faster beside computing.
    """

    read_bytes_per_s: float
    write_bytes_per_s: float
    both_bytes_per_s: float
    latency_s: float
    cores_share: float
    read_beside: float
    write_beside: float

    def __post_init__(self) -> None:
        _check_positive(self, "latency_s", "cores_share")
        if min(self.read_beside, self.write_beside) < 1:
            raise ValueError(f"{self}: no transfer is faster while all threads compute")

    def scaled(self, factor: float) -> "DiskFigures":
        """A disk of so many times the bandwidth."""
        read, write, both = (factor * n for n in (self.read_bytes_per_s, self.write_bytes_per_s, self.both_bytes_per_s))
        return replace(self, read_bytes_per_s=read, write_bytes_per_s=write, both_bytes_per_s=both)

    @property
    def both_capacity(self) -> float:
        """How much is done when both directions run, in units of one alone: 1 where they share, 2 where they do not
        meet."""
        done = (1 / self.read_bytes_per_s + 1 / self.write_bytes_per_s) * self.both_bytes_per_s / 2
        return min(max(done, 1.0), 2.0)  # beyond that it was noise


@dataclass(frozen=True, slots=True)
class NetFigures:
    """Exchange between the ranks: seconds = latency + bytes / bandwidth, for one action.

    Attributes:
        gather_bytes_per_s, reduce_bytes_per_s: of whole chunks, fitted over several sizes.
        gather_latency_s, reduce_latency_s: likewise.

    Raises:
        ValueError: a bandwidth that is not positive, or a negative latency.
    """

    gather_bytes_per_s: float
    gather_latency_s: float
    reduce_bytes_per_s: float
    reduce_latency_s: float

    def __post_init__(self) -> None:
        _check_positive(self, "gather_latency_s", "reduce_latency_s")


@dataclass(frozen=True, slots=True)
class Hardware:
    """One machine, as one rank with its threads finds it.

    Attributes:
        name: of the machine, its processor and its cores, as the cache knows it.
        num_threads: that a rank computes with.
        copy_bytes_per_s: of a copy in memory, counted once.
        sum_bytes_per_s: of adding one tensor to another, counted once.
        update_elems_per_s: parameters that a fused AdamW updates.
        action_s: what an action takes beside its work.
        fault_s_per_byte: what the kernel takes to give memory that was not there.
        disk: None where none was measured.
        net: None on one rank.

    Raises:
        ValueError: a number that is not positive.
    """

    name: str
    num_threads: int
    copy_bytes_per_s: float
    sum_bytes_per_s: float
    update_elems_per_s: float
    action_s: float
    fault_s_per_byte: float
    disk: DiskFigures | None = None
    net: NetFigures | None = None

    def __post_init__(self) -> None:
        _check_positive(self, "action_s", "fault_s_per_byte")

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
            parts = {"disk": disk and DiskFigures(**disk), "net": net and NetFigures(**net)}
            return cls(**{**fields, **parts})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"these are no figures of a machine: {type(error).__name__}: {error}") from error


def _check_positive(record: object, *may_be_zero: str) -> None:
    for name in type(record).__dataclass_fields__:  # pyright: ignore[reportAttributeAccessIssue]
        value = getattr(record, name)
        if isinstance(value, int | float) and (value < 0 or (value == 0 and name not in may_be_zero)):
            raise ValueError(f"{type(record).__name__}({name}={value!r}): a positive number is needed")
