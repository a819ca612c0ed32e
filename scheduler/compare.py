"""A predicted timeline against a measured one: a subtraction, by lane, by unit and by kind of action.

Owns the sums and their differences. Does not own the timelines, nor how they are shown (`runtime/report.py`). Both
sides are added up by the same code, so that a difference is one of the timelines.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..memory.timeline import Span, Timeline
from ..parallel.actions import Action, Kind

__all__ = ["WORDS", "Comparison", "LaneRow", "Pair", "UnitRow", "compare", "stalled_s"]

WORDS: dict[Kind, str] = {
    Kind.F: "forward",
    Kind.B: "backward",
    Kind.I: "input gradients",
    Kind.W: "weight gradients",
    Kind.R: "recompute",
    Kind.STEP: "optimizer updates",
    Kind.GATHER: "gathers of parameters",
    Kind.REDUCE: "sums of gradients",
    Kind.SEND_F: "activations sent",
    Kind.RECV_F: "activations received",
    Kind.SEND_B: "gradients sent",
    Kind.RECV_B: "gradients received",
    Kind.NORM: "gradient norm",
    Kind.UP: "copies to the device",
    Kind.DOWN: "copies to the host",
    Kind.READ: "disk reads",
    Kind.WRITE: "disk writes",
    Kind.SAVE: "activations moved away",
    Kind.LOAD: "activations moved back",
    Kind.DROP: "drops",
}
"""What each kind of action is called where people read of it."""

_Key = TypeVar("_Key")


@dataclass(frozen=True, slots=True)
class Pair:
    """Seconds of the same thing, predicted and measured; 0 where one side does not have it."""

    predicted_s: float
    measured_s: float

    @property
    def difference_s(self) -> float:
        """Positive where it took longer than predicted."""
        return self.measured_s - self.predicted_s

    @property
    def ratio(self) -> float | None:
        """Measured over predicted; None where nothing was predicted."""
        return self.measured_s / self.predicted_s if self.predicted_s > 0 else None


@dataclass(frozen=True, slots=True)
class LaneRow:
    """One lane over the step.

    Attributes:
        busy: seconds in which it did something.
        stalled: seconds in which it did not, before its last action's end.
        num_bytes: that its actions moved, by either account.
    """

    lane: str
    busy: Pair
    stalled: Pair
    num_bytes: int


@dataclass(frozen=True, slots=True)
class UnitRow:
    """One unit run over all micro-batches of the step. `backward` holds its recomputation too.

    Attributes:
        run: its place in the order of units, as in `F12.0`.
        name: of the unit.
    """

    run: int
    name: str
    forward: Pair
    backward: Pair


@dataclass(frozen=True)
class Comparison:
    """One step.

    Attributes:
        step: from its begin to the end of its last action.
        lanes: in the order in which they come in the program; the compute lane first.
        units: in their order.
        kinds: every kind of action -> seconds of all of that kind.
    """

    step: Pair
    lanes: tuple[LaneRow, ...]
    units: tuple[UnitRow, ...]
    kinds: dict[Kind, Pair]

    def largest(self, number: int = 5) -> list[tuple[str, Pair]]:
        """The greatest differences, in words, the greatest first: of units, of other kinds of actions, and of the
        compute lane's waiting for them. Those under a thousandth of the step are left out."""
        named: list[tuple[str, Pair]] = []
        for unit in self.units:
            named += [(f"forward of {unit.name}", unit.forward), (f"backward of {unit.name}", unit.backward)]
        named += [(WORDS[kind], pair) for kind, pair in self.kinds.items() if not kind.is_compute]
        named += [("waiting of the compute lane", row.stalled) for row in self.lanes if row.lane == "compute"]
        least_s = max(self.step.predicted_s, self.step.measured_s) / 1000
        found = [each for each in named if abs(each[1].difference_s) > least_s]
        return sorted(found, key=lambda each: -abs(each[1].difference_s))[:number]


def compare(predicted: Timeline, measured: Timeline, units: Sequence[str] = ()) -> Comparison:
    """Hold a measured step against its prediction.

    Args:
        units: names of the unit runs; one without a name is called by its number.

    Raises:
        ValueError: a span whose label is no action.
    """
    lanes = sorted({*predicted.lanes(), *measured.lanes()}, key=lambda lane: (lane != "compute", lane))
    rows = tuple(
        LaneRow(
            lane,
            Pair(predicted.busy_s(lane), measured.busy_s(lane)),
            Pair(stalled_s(predicted, lane), stalled_s(measured, lane)),
            max(_num_bytes(predicted, lane), _num_bytes(measured, lane)),
        )
        for lane in lanes
    )
    return Comparison(
        Pair(predicted.seconds, measured.seconds), rows, _units(predicted, measured, units), _kinds(predicted, measured)
    )


def stalled_s(timeline: Timeline, lane: str) -> float:
    """Seconds before the end of the lane's last action in which it did nothing."""
    last_s = max((span.end_s for span in timeline.spans if span.lane == lane), default=0.0)
    return max(0.0, last_s - timeline.busy_s(lane))


def _num_bytes(timeline: Timeline, lane: str) -> int:
    return sum(span.num_bytes for span in timeline.spans if span.lane == lane)


def _units(predicted: Timeline, measured: Timeline, names: Sequence[str]) -> tuple[UnitRow, ...]:
    def run_of(span: Span) -> tuple[int, bool] | None:
        action = Action.parse(span.action)
        return None if not action.kind.is_compute else (action.index or 0, action.kind is Kind.F)

    pairs = _paired(run_of, predicted, measured)
    runs = sorted({key[0] for key in pairs if key is not None})
    none = Pair(0.0, 0.0)
    return tuple(
        UnitRow(
            run,
            names[run] if run < len(names) else f"unit {run}",
            pairs.get((run, True), none),
            pairs.get((run, False), none),
        )
        for run in runs
    )


def _kinds(predicted: Timeline, measured: Timeline) -> dict[Kind, Pair]:
    pairs = _paired(lambda span: Action.parse(span.action).kind, predicted, measured)
    return {kind: pairs[kind] for kind in Kind if kind in pairs}


def _paired(key: Callable[[Span], _Key], predicted: Timeline, measured: Timeline) -> dict[_Key, Pair]:
    sums = [_sums(key, timeline.spans) for timeline in (predicted, measured)]
    return {each: Pair(sums[0].get(each, 0.0), sums[1].get(each, 0.0)) for each in {**sums[0], **sums[1]}}


def _sums(key: Callable[[Span], _Key], spans: Iterable[Span]) -> Mapping[_Key, float]:
    sums: dict[_Key, float] = {}
    for span in spans:
        sums[key(span)] = sums.get(key(span), 0.0) + span.seconds
    return sums
