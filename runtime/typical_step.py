"""The step that a run shows of itself: of a few spread over the whole run, the one with the median seconds.

Owns the choice. It holds a bounded number of steps, whatever the run's length.
"""

from .step_result import StepResult

__all__ = ["TypicalStep"]


class TypicalStep:
    """Notes steps as they come.

    The first one counts only while it is alone: it warms things up, and has no writes of a step before it. So do
    those with fewer samples than others, such as an epoch's last.

    Args:
        most: how many are held. Where they are more, every other one is let go, and from then on only every second,
            fourth, ... is noted.
    """

    def __init__(self, most: int = 8) -> None:
        assert most > 1, "a median of less says nothing"
        self._most = most
        self._first: StepResult | None = None
        self._kept: list[StepResult] = []
        self._every = 1
        self._seen = 0

    def note(self, step: StepResult) -> None:
        """Take the next step in."""
        if self._first is None:
            self._first = step
            return
        if self._seen % self._every == 0:
            self._kept.append(step)
        self._seen += 1
        if len(self._kept) > self._most:
            self._kept = self._kept[::2]
            self._every *= 2

    @property
    def step(self) -> StepResult | None:
        """The typical step so far; None before the first."""
        if not self._kept:
            return self._first
        most_samples = max(step.num_samples for step in self._kept)
        full = sorted((step for step in self._kept if step.num_samples == most_samples), key=lambda step: step.step_s)
        return full[len(full) // 2]
