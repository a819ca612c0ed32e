"""What a benchmark measures: samples, their median and spread, and the target they are held against.

Owns `Figure` and `Target` and the arithmetic between samples (paired ratios). It does not own how samples are taken
(`contestants.py`) nor how they are shown or stored (`suite.py`). It imports neither torch nor numpy.

Spread is (max - min) / median over the rounds: with five rounds there is no honest percentile, and the whole range
hides nothing. A ratio of two contestants is taken round by round, and its median is the median of those ratios, so that
whatever slows the machine for a few seconds slows both sides.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Figure", "Target", "paired_ratios"]


def paired_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, ...]:
    """`numerators[i] / denominators[i]`, one for every round.

    Raises:
        ValueError: different numbers of rounds, or a denominator of zero.
    """
    if len(numerators) != len(denominators):
        raise ValueError(f"ratios are taken round by round, got {len(numerators)} and {len(denominators)} rounds")
    if any(value == 0 for value in denominators):
        raise ValueError("a ratio to a measurement of zero says nothing")
    return tuple(a / b for a, b in zip(numerators, denominators, strict=True))


@dataclass(frozen=True, slots=True)
class Target:
    """The range in which a figure's median has to lie.

    Attributes:
        low: the least value that meets the target, or None.
        high: the greatest value that meets the target, or None.

    Raises:
        ValueError: neither is given, or `low` is above `high`.
    """

    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if self.low is None and self.high is None:
            raise ValueError("a target needs a lowest value, a highest value, or both")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"a target's lowest value {self.low} is above its highest {self.high}")

    def is_met(self, value: float) -> bool:
        """False for NaN too."""
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        return f"at least {self.low:g}" if self.low is not None else f"at most {self.high:g}"


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured quantity of a case.

    Attributes:
        group: what it belongs to, e.g. the model's configuration; figures of one group stand together in the table.
        name: what was measured.
        unit: of the samples; "ratio" where they have none.
        samples: one for every round, in the order of the rounds. Empty: it could not be measured, and `note` says why.
        target: what the median is held against, or None where the figure is only reported.
        note: one short remark for the table.

    Raises:
        ValueError: no samples and no note.
    """

    group: str
    name: str
    unit: str
    samples: tuple[float, ...]
    target: Target | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if not self.samples and not self.note:
            raise ValueError(f"figure {self.name!r} has no samples and no note that says why")

    @property
    def median(self) -> float:
        """NaN where nothing was measured."""
        return statistics.median(self.samples) if self.samples else math.nan

    @property
    def spread(self) -> float:
        """(max - min) / median; 0 for a single sample, NaN where nothing was measured or the median is zero."""
        if not self.samples or self.median == 0:
            return math.nan
        return (max(self.samples) - min(self.samples)) / abs(self.median)

    @property
    def is_met(self) -> bool | None:
        """Whether the target is met; None without a target. A target that was not measured is not met."""
        return None if self.target is None else self.target.is_met(self.median)
