"""What a step and a look at an engine give back.

Owns the records. Does not own how they come about (`runtime/engine.py`).
"""

from dataclasses import dataclass

from ..memory.timeline import Timeline

__all__ = ["Statistics", "StepResult"]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step did.

    Attributes:
        step: its number, from 1.
        loss: the mean over all samples of the global batch; the same on every rank.
        grad_norm: the global gradient norm before clipping.
        lr: learning rate of the first group in this step.
        num_samples, num_tokens: of the global batch; tokens are the elements of the first integer tensor.
        step_s: seconds on this rank.
        peak_bytes: tier -> most bytes that this rank's process held.
        timeline: this rank's.
        saved_bytes: in a pipeline, the most that this rank kept for backward passes between two actions of its
            schedule, read off the storages; None where there is no pipeline.
    """

    step: int
    loss: float
    grad_norm: float | None
    lr: float
    num_samples: int
    num_tokens: int
    step_s: float
    peak_bytes: dict[str, int]
    timeline: Timeline
    saved_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Statistics:
    """A snapshot of the bytes of model state on this rank, read off the storages.

    Attributes:
        bytes_by_slot: now.
        peak_bytes_by_slot: at the last step's fullest moment, the end of its backward.
    """

    bytes_by_slot: dict[str, int]
    peak_bytes_by_slot: dict[str, int]
