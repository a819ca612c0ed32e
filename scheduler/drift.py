"""Whether a run goes on as it was predicted: each step's lanes and bytes against the prediction, and when to speak up.

Owns the decision, pure. Does not own the prediction, nor who is told (`runtime/worker.py`, `runtime/recorder.py`).

A single step proves nothing: disks have hiccups. A lane has drifted when, of its last `WINDOW` steps, the median takes
more than `LIMIT` times what was predicted, three quarters of them do, this is more than the steps before them spread
anyway, and the time it costs is worth a word. Bytes are otherwise: one step that holds more than was predicted is one
too many, since a plan was said to fit.
"""

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from ..memory.budget import format_bytes
from ..memory.timeline import Timeline
from .prediction import Prediction

__all__ = ["LIMIT", "WINDOW", "Drift", "DriftWatch", "Overrun"]

WINDOW = 8
LIMIT = 1.25
_LEAST_SHARE = 0.05
"""Of the predicted step: what a lane takes beyond its prediction must be more, or it does not matter."""
_MOST_EARLIER = 64

_WORK = {
    "compute": "computation takes",
    "read": "disk reads take",
    "write": "disk writes take",
    "net": "exchange between ranks takes",
    "h2d": "copies to the device take",
    "d2h": "copies to the host take",
}
_CAUSES = {
    "compute": "a busy neighbour, or a slower processor",
    "read": "a slower disk, or a busy neighbour",
    "write": "a slower disk, or a busy neighbour",
    "net": "a slower link, or a rank that the others wait for",
    "h2d": "busy memory",
    "d2h": "busy memory",
}


@dataclass(frozen=True, slots=True)
class Drift:
    """A lane that takes longer than predicted, and goes on doing so.

    Attributes:
        step: when it was sure.
        since_step: the first step that it is seen in.
        lane: of those that drift, the one that costs most.
        predicted_s, measured_s: busy in a step; measured: the median.
        others: lanes that drift too, but cost less.
    """

    step: int
    since_step: int
    lane: str
    predicted_s: float
    measured_s: float
    others: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """The lane."""
        return self.lane

    @property
    def words(self) -> str:
        """In one sentence: how much, since when, why that may be."""
        how = f"{1000 * self.measured_s:.1f} ms a step instead of {1000 * self.predicted_s:.1f} ms"
        if self.predicted_s > 0:
            how = f"{self.measured_s / self.predicted_s:.1f} times what was predicted ({how})"
        too = f"; so do lanes {', '.join(self.others)}" if self.others else ""
        work = _WORK.get(self.lane, f"lane {self.lane} takes")
        return f"since step {self.since_step} {work} {how}{too}: {_CAUSES.get(self.lane, 'the cause is not known')}"


@dataclass(frozen=True, slots=True)
class Overrun:
    """A tier that held more than its prediction."""

    step: int
    tier: str
    predicted_bytes: int
    measured_bytes: int

    @property
    def place(self) -> str:
        """The tier."""
        return self.tier

    @property
    def words(self) -> str:
        """In one sentence."""
        return (
            f"in step {self.step} the {self.tier} held {format_bytes(self.measured_bytes)}, and "
            f"{format_bytes(self.predicted_bytes)} were predicted to be the most: what this project counts is not all "
            "that the process holds"
        )


class DriftWatch:
    """Takes the steps of a run in their order; each lane and each tier is reported once. Without a prediction there is
    nothing to say."""

    def __init__(self, prediction: Prediction | None) -> None:
        self._prediction = prediction
        self._predicted_s: dict[str, float] = {} if prediction is None else busy_seconds(prediction.timeline)
        self._steps: deque[tuple[int, dict[str, float]]] = deque(maxlen=_MOST_EARLIER + WINDOW)
        self._said: set[str] = set()
        self._is_first = True

    def note(self, step: int, timeline: Timeline, peak_bytes: Mapping[str, int]) -> list[Drift | Overrun]:
        """Take a step in; says what was not said before."""
        if self._prediction is None:
            return []
        found: list[Drift | Overrun] = []
        for tier in self._prediction.tiers:
            held = peak_bytes.get(tier.tier, 0)
            if held > tier.peak_bytes and tier.tier not in self._said:
                self._said.add(tier.tier)
                found.append(Overrun(step, tier.tier, tier.peak_bytes, held))
        if self._is_first:  # it warms things up
            self._is_first = False
            return found
        self._steps.append((step, busy_seconds(timeline)))
        drift = self._drift(step)
        return [*found, drift] if drift is not None else found

    def _drift(self, step: int) -> Drift | None:
        if len(self._steps) < WINDOW:
            return None
        lanes = dict.fromkeys((*self._predicted_s, *self._steps[-1][1]))
        excess: dict[str, float] = {}
        for lane in lanes:
            if lane not in self._said and self._has_drifted(lane):
                excess[lane] = self._median_s(lane) - self._predicted_s.get(lane, 0.0)
        if not excess:
            return None
        self._said |= excess.keys()
        worst, *others = sorted(excess, key=lambda lane: -excess[lane])
        limit_s = self._limit_s(worst)
        window = list(self._steps)[-WINDOW:]
        since = next(number for number, busy in window if busy.get(worst, 0.0) > limit_s)
        return Drift(step, since, worst, self._predicted_s.get(worst, 0.0), self._median_s(worst), tuple(others))

    def _has_drifted(self, lane: str) -> bool:
        assert self._prediction is not None
        seconds = [busy.get(lane, 0.0) for _, busy in self._steps]
        window, earlier = seconds[-WINDOW:], seconds[:-WINDOW]
        limit_s, middle = self._limit_s(lane), statistics.median(window)
        least_s = self._predicted_s.get(lane, 0.0) + _LEAST_SHARE * self._prediction.seconds
        if middle <= max(limit_s, least_s) or 4 * sum(each > limit_s for each in window) < 3 * WINDOW:
            return False
        if len(earlier) < WINDOW:
            return True  # too little to know the noise by
        usual = statistics.median(earlier)
        spread = statistics.median(abs(each - usual) for each in earlier)
        return middle > usual + 3 * spread

    def _limit_s(self, lane: str) -> float:
        return LIMIT * self._predicted_s.get(lane, 0.0)

    def _median_s(self, lane: str) -> float:
        return statistics.median(busy.get(lane, 0.0) for _, busy in list(self._steps)[-WINDOW:])


def busy_seconds(timeline: Timeline) -> dict[str, float]:
    """Lane -> seconds in which it did something, in one pass."""
    seconds: dict[str, float] = {}
    for span in timeline.spans:
        seconds[span.lane] = seconds.get(span.lane, 0.0) + span.seconds
    return seconds
