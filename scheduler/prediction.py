"""What a planner said of a step before the first one: its timeline, its bytes, and the plans that it did not take.

Owns the record and its JSON, so that a run can be held against it later. Does not own how it comes about
(`simulate.py`, `ledger.py`, `search.py`) nor the comparison (`compare.py`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ..memory.timeline import Span, Timeline

if TYPE_CHECKING:  # whoever reads a prediction needs no torch for it
    from .ledger import Ledger
    from .program import Program, StepShape
    from .simulate import Simulated

__all__ = ["Fate", "Prediction", "TierPrediction", "spans_by_position"]

_VERSION = 2


@dataclass(frozen=True, slots=True)
class Fate:
    """A plan that was looked at, and what became of it.

    Attributes:
        words: the plan in a few words.
        seconds: of a step; None where it was not simulated.
        peak_bytes: on the host, at its fullest moment.
        fate: "chosen", "slower by 12%", or why it was refused.
    """

    words: str
    seconds: float | None
    peak_bytes: int
    fate: str


@dataclass(frozen=True, slots=True)
class TierPrediction:
    """The bytes of one tier over the step.

    Attributes:
        tier: "host" or "device".
        peak_bytes: at the fullest moment; the real peak must not be above it.
        budget_bytes: what there is; None where nothing limits it.
        levels: (second, bytes): so much is held from then on until the next one, in order of time; the first is at 0.
        where: the action of the fullest moment.
        parts: what the bytes of that moment are for.

    Raises:
        ValueError: levels out of order, or above the peak.
    """

    tier: str
    peak_bytes: int
    budget_bytes: int | None
    levels: tuple[tuple[float, int], ...]
    where: str = ""
    parts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        seconds = [second for second, _ in self.levels]
        if seconds != sorted(seconds) or (seconds and seconds[0] != 0):
            raise ValueError(f"levels of {self.tier} must begin at second 0 and go forward in time, got {seconds[:3]}")
        if any(not 0 <= size <= self.peak_bytes for _, size in self.levels):
            raise ValueError(f"levels of {self.tier} must lie between 0 and its peak of {self.peak_bytes} bytes")


@dataclass(frozen=True)
class Prediction:
    """One step of one rank, as it was predicted.

    Attributes:
        timeline: all spans of the step, with the same labels as a measured one, so that lanes, units and actions
            compare by the same sums (`timeline.busy_s("read")`).
        stalls_s: lane -> (action waited for -> seconds), while the lane had something left to do.
        tiers: bytes over the step, against the budgets.
        units: names of the unit runs: the `F12.0` of a timeline is a forward of `units[12]`.
        fates: of all plans that were looked at, the fastest first.
        what_if: what more of something would buy: the plan that there would be then.
        took_s: what was done to come to the plan -> how long it took.
    """

    timeline: Timeline
    stalls_s: dict[str, dict[str, float]]
    tiers: tuple[TierPrediction, ...]
    units: tuple[str, ...]
    fates: tuple[Fate, ...] = ()
    what_if: tuple[Fate, ...] = ()
    took_s: dict[str, float] = field(default_factory=dict, compare=False)

    @classmethod
    def of(
        cls,
        program: "Program",
        shape: "StepShape",
        simulated: "Simulated",
        ledgers: "Mapping[str, Ledger]",
        budgets_bytes: Mapping[str, int],
        fates: Sequence[Fate] = (),
    ) -> "Prediction":
        """Put together what is known of a plan.

        Args:
            program: that was simulated.
            shape: of its step.
            ledgers: tier -> its bytes. The ledger's bytes of an action hold from the action's simulated begin until the
                next action that the ledger adds up: what it says of actions is placed in time, nothing is added.
            budgets_bytes: tier -> what there is; a tier may be missing.
        """
        spans = spans_by_position(program, simulated.timeline)
        tiers = tuple(
            TierPrediction(
                tier,
                ledger.peak_bytes,
                budgets_bytes.get(tier),
                _levels(ledger, spans),
                ledger.where,
                dict(ledger.parts),
            )
            for tier, ledger in ledgers.items()
        )
        stalls = {lane: dict(waits) for lane, waits in simulated.stalls_s.items()}
        peaks = {tier.tier: tier.peak_bytes for tier in tiers}
        timeline = Timeline(simulated.timeline.spans, peaks, simulated.timeline.rank)
        return cls(timeline, stalls, tiers, tuple(unit.name for unit in shape.units), tuple(fates))

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.timeline.seconds

    def stalled_s(self, lane: str) -> float:
        """Seconds in which `lane` waited though it had something left to do."""
        return sum(self.stalls_s.get(lane, {}).values())

    def to_json(self) -> str:
        """The prediction as JSON text; `from_json` reads back the very same."""
        whole = {
            "version": _VERSION,
            "rank": self.timeline.rank,
            "seconds": self.seconds,  # for whoever reads the file; it follows from the spans
            "units": self.units,
            "tiers": [asdict(tier) for tier in self.tiers],
            "stalls_s": self.stalls_s,
            "fates": [asdict(fate) for fate in self.fates],
            "what_if": [asdict(fate) for fate in self.what_if],
            "took_s": self.took_s,
            "spans": [[s.lane, s.action, s.start_s, s.end_s, s.num_bytes] for s in self.timeline.spans],
        }
        return json.dumps(whole)

    @classmethod
    def from_json(cls, text: str) -> "Prediction":
        """Read a prediction.

        Raises:
            ValueError: text that holds none, or one of another version.
        """
        try:
            fields: dict[str, Any] = json.loads(text)
            if fields.get("version") != _VERSION:
                raise ValueError(
                    f"this prediction is of version {fields.get('version')!r}, and only version {_VERSION} can be "
                    "read: use the version of outgrow that wrote it, or plan the run again"
                )
            tiers = tuple(
                TierPrediction(**{**tier, "levels": tuple((float(s), int(b)) for s, b in tier["levels"])})
                for tier in fields["tiers"]
            )
            spans = tuple(_span_from(each) for each in fields["spans"])
            timeline = Timeline(spans, {tier.tier: tier.peak_bytes for tier in tiers}, fields["rank"])
            fates, what_if = (tuple(Fate(**each) for each in fields[name]) for name in ("fates", "what_if"))
            stalls = {lane: dict(waits) for lane, waits in fields["stalls_s"].items()}
            took_s = {str(name): float(seconds) for name, seconds in fields.get("took_s", {}).items()}
            return cls(timeline, stalls, tiers, tuple(fields["units"]), fates, what_if, took_s)
        except json.JSONDecodeError as error:
            raise ValueError(f"this is no prediction: {error}") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no prediction: {type(error).__name__}: {error}") from error


def spans_by_position(program: "Program", timeline: Timeline) -> dict[int, Span]:
    """Position in the program -> its span: a lane does its instructions in their order.

    Raises:
        ValueError: a timeline of another program.
    """
    found: dict[int, Span] = {}
    for lane, positions in program.by_lane.items():
        spans = [span for span in timeline.spans if span.lane == lane]
        words = [str(program.instructions[position].action) for position in positions]
        if [span.action for span in spans] != words:
            raise ValueError(f"this is no timeline of this program: lane {lane} has {len(spans)} spans, not its own")
        found |= dict(zip(positions, spans, strict=True))
    return found


def _levels(ledger: "Ledger", spans: Mapping[int, Span]) -> tuple[tuple[float, int], ...]:
    """The ledger's bytes at the begin of their actions' spans; before the first one, as much as in it."""
    found = sorted((spans[position].start_s, size) for position, size in ledger.levels)
    levels = [(0.0, found[0][1] if found else ledger.peak_bytes)]
    for second, size in found:
        if levels[-1][0] == second:
            levels[-1] = second, size  # of several actions that take no time, the fullest: it comes last
        elif levels[-1][1] != size:
            levels.append((second, size))
    return tuple(levels)


def _span_from(fields: Sequence[Any]) -> Span:
    if len(fields) != 5:
        raise ValueError(f"this is no prediction: no span: {fields!r}")
    lane, action, start_s, end_s, num_bytes = fields
    if not (isinstance(lane, str) and isinstance(action, str) and 0 <= start_s <= end_s):
        raise ValueError(f"this is no prediction: no span: {fields!r}")
    return Span(lane, action, start_s, end_s, num_bytes)
