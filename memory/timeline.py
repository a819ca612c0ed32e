"""What happened (or will happen) when: spans on lanes, and the bytes held.

Owns the record that measured and predicted steps share, and its Chrome/Perfetto form. Does not measure anything.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Span", "Timeline", "chrome_trace", "timelines_from"]


@dataclass(frozen=True, slots=True)
class Span:
    """One action on one lane, in seconds since the step began."""

    lane: str
    action: str
    start_s: float
    end_s: float
    num_bytes: int = 0

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True)
class Timeline:
    """The spans of one step of one rank, and the greatest number of bytes held per tier.

    Attributes:
        spans: ordered by start.
        peak_bytes: tier -> bytes.
        rank: whose step it was.
    """

    spans: tuple[Span, ...]
    peak_bytes: dict[str, int] = field(default_factory=dict)
    rank: int = 0

    @property
    def seconds(self) -> float:
        """From the step's begin to the end of its last action."""
        return max((span.end_s for span in self.spans), default=0.0)

    def lanes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(span.lane for span in self.spans))

    def busy_s(self, lane: str) -> float:
        """Seconds in which `lane` did something."""
        return sum(span.seconds for span in self.spans if span.lane == lane)

    def to_chrome(self) -> dict[str, object]:
        """The Chrome trace format, which Perfetto opens: one process per rank, one thread per lane."""
        return chrome_trace([self])

    def save(self, path: Path | str) -> None:
        Path(path).write_text(json.dumps(self.to_chrome()))


def timelines_from(trace: Mapping[str, Any]) -> list[Timeline]:
    """The timelines of a trace that `chrome_trace` made, one a rank, to the nanosecond; peaks are not in it.

    Raises:
        ValueError: another kind of trace.
    """
    try:
        lanes: dict[tuple[int, int], str] = {}
        spans: dict[int, list[Span]] = {}
        for event in trace["traceEvents"]:
            rank = event["pid"]
            found = spans.setdefault(rank, [])
            if event["ph"] == "M" and event["name"] == "thread_name":
                lanes[rank, event["tid"]] = event["args"]["name"]
            elif event["ph"] == "X":
                start_s, seconds = event["ts"] / 1e6, event["dur"] / 1e6
                lane, num_bytes = lanes[rank, event["tid"]], event["args"]["num_bytes"]
                found.append(Span(lane, event["name"], start_s, start_s + seconds, num_bytes))
    except (KeyError, TypeError) as error:
        raise ValueError(f"this is no trace of a step: {type(error).__name__}: {error}") from error
    return [
        Timeline(tuple(sorted(found, key=lambda span: (span.start_s, span.end_s))), {}, rank)
        for rank, found in sorted(spans.items())
    ]


def chrome_trace(timelines: Iterable[Timeline]) -> dict[str, object]:
    """One trace of the same step on several ranks."""
    events: list[dict[str, object]] = []
    for timeline in timelines:
        events.append(
            {"ph": "M", "name": "process_name", "pid": timeline.rank, "args": {"name": f"rank {timeline.rank}"}}
        )
        for thread, lane in enumerate(timeline.lanes()):
            events.append(
                {"ph": "M", "name": "thread_name", "pid": timeline.rank, "tid": thread, "args": {"name": lane}}
            )
            events.extend(
                {
                    "ph": "X",
                    "name": span.action,
                    "cat": span.action.split(" ")[0].rstrip("0123456789."),
                    "pid": timeline.rank,
                    "tid": thread,
                    "ts": round(span.start_s * 1e6, 3),
                    "dur": round(span.seconds * 1e6, 3),
                    "args": {"num_bytes": span.num_bytes},
                }
                for span in timeline.spans
                if span.lane == lane
            )
    return {"traceEvents": events, "displayTimeUnit": "ms"}
