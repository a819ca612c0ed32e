"""The least time a step can take on a disk of a given speed, and what a step moved.

Owns the arithmetic between bytes, bandwidths and seconds. It measures nothing and imports no torch.

A step on disk does three things at once: it computes, reads and writes. None of them can be faster than alone, so no
step can be faster than the slowest of the three: max(compute, bytes read / read bandwidth, bytes written / write
bandwidth). A step's share of the bound is that time over the measured one; 1 hides everything behind the slowest.

On most disks the two directions share what the device can move. No step can then be faster than (bytes read + bytes
written) / (bandwidth of both together) either; with it the bound is the tighter, *shared* one.
"""

from dataclasses import dataclass

from ..memory.timeline import Timeline

__all__ = ["Bandwidth", "Moved", "least_seconds", "least_seconds_shared", "line_through", "moved_in"]


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Bytes a second of a disk: each direction alone, and both together at the same time.

    Raises:
        ValueError: one that is not positive.
    """

    read_bytes_per_s: float
    write_bytes_per_s: float
    both_bytes_per_s: float

    def __post_init__(self) -> None:
        if min(self.read_bytes_per_s, self.write_bytes_per_s, self.both_bytes_per_s) <= 0:
            raise ValueError(
                f"a disk moves bytes in both directions, got {self.read_bytes_per_s} read and "
                f"{self.write_bytes_per_s} written a second, {self.both_bytes_per_s} together"
            )

    def __str__(self) -> str:
        read, write, both = (
            f"{rate / 1e9:.2f} GB/s" for rate in (self.read_bytes_per_s, self.write_bytes_per_s, self.both_bytes_per_s)
        )
        return f"{read} read, {write} written, {both} together"


@dataclass(frozen=True, slots=True)
class Moved:
    """What one step moved between memory and disk, and how long its lanes were busy.

    Attributes:
        busy_s: lane -> seconds in which it did something; what a lane waits for another is not in it.
    """

    read_bytes: int
    write_bytes: int
    busy_s: dict[str, float]

    def __str__(self) -> str:
        lanes = ", ".join(f"{lane} {seconds:.2f} s" for lane, seconds in self.busy_s.items())
        return f"{self.read_bytes / 1e9:.2f} GB read, {self.write_bytes / 1e9:.2f} GB written; busy: {lanes}"


def moved_in(timeline: Timeline) -> Moved:
    """Bytes on the lanes `read` and `write` of a step."""
    totals = {"read": 0, "write": 0}
    for span in timeline.spans:
        if span.lane in totals:
            totals[span.lane] += span.num_bytes
    return Moved(totals["read"], totals["write"], {lane: timeline.busy_s(lane) for lane in timeline.lanes()})


def least_seconds(compute_s: float, moved: Moved, disk: Bandwidth) -> tuple[float, str]:
    """The bound, and which of `compute`, `read` and `write` it comes from."""
    seconds = {
        "compute": compute_s,
        "read": moved.read_bytes / disk.read_bytes_per_s,
        "write": moved.write_bytes / disk.write_bytes_per_s,
    }
    slowest = max(seconds, key=lambda lane: seconds[lane])
    return seconds[slowest], slowest


def least_seconds_shared(compute_s: float, moved: Moved, disk: Bandwidth) -> tuple[float, str]:
    """The bound where both directions share the device, and what it comes from: also `both`."""
    alone_s, slowest = least_seconds(compute_s, moved, disk)
    both_s = (moved.read_bytes + moved.write_bytes) / disk.both_bytes_per_s
    return (both_s, "both") if both_s > alone_s else (alone_s, slowest)


def line_through(first: tuple[float, float], second: tuple[float, float], at: float) -> float:
    """The value at `at` of the line through two points (x, y).

    Raises:
        ValueError: two points of one x.
    """
    if first[0] == second[0]:
        raise ValueError(f"a line needs two different places, got {first[0]} twice")
    slope = (second[1] - first[1]) / (second[0] - first[0])
    return first[1] + slope * (at - first[0])
