"""What planning came to: the plan, its program, what is foreseen of it, and the fates of the others.

Owns the record. Does not own how it comes about (`planning.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..memory.errors import DoesNotFit
from ..scheduler.assessment import against, describe
from ..scheduler.ledger import Ledger
from ..scheduler.plan import Plan
from ..scheduler.prediction import Fate, Prediction
from ..scheduler.program import Program

__all__ = ["Planned"]


@dataclass(frozen=True, slots=True)
class Planned:
    """What will be run.

    Attributes:
        held: chunks used outside of units.
        ledger: the host's fullest moment as it was predicted; None where memory is ample and nothing was predicted.
        device: likewise the device's, where it has memory of its own.
        prediction: of a step's seconds; None where they were not measured.
        note: why they were not, where they were to be.
        is_ample: whether freed blocks stay from step to step from the beginning, and when steps are over.
    """

    plan: Plan
    program: Program
    held: tuple[int, ...]
    ledger: Ledger | None
    device: Ledger | None = None
    prediction: Prediction | None = None
    note: str = ""
    is_ample: bool = False

    def beside(self, others: "Sequence[tuple[int, Planned | DoesNotFit]]") -> "Planned":
        """With a fate for other numbers of micro-batches."""
        if self.prediction is None:
            return self
        chosen, *rest = self.prediction.fates or (Fate(describe(self.plan), self.prediction.seconds, 0, "chosen"),)
        fates = [_fate_of_count(count, other, self.prediction.seconds) for count, other in others]
        return replace(self, prediction=replace(self.prediction, fates=(chosen, *fates, *rest)))


def _fate_of_count(count: int, found: "Planned | DoesNotFit", best_s: float) -> Fate:
    if isinstance(found, DoesNotFit):
        return Fate(f"{count} micro-batches", None, 0, f"refused: {found}")
    seconds = None if found.prediction is None else found.prediction.seconds
    peak_bytes = 0 if found.ledger is None else found.ledger.peak_bytes
    return Fate(describe(found.plan), seconds, peak_bytes, against(seconds, best_s))
