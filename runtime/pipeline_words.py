"""What a caller says about pipelines.

Owns the words and the checks that need neither a model nor ranks. Does not own carrying them out (`pipelining.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..scheduler.pipelines import LOOP_NAMES, NAMES
from ..scheduler.plan import PipelinePlan

__all__ = ["PipelineWords"]


@dataclass(frozen=True, slots=True)
class PipelineWords:
    """What the caller said.

    Attributes:
        num_ranks: of each pipeline; 1: there is none.
        schedule: a name of `scheduler/pipelines.py`; None: 1f1b.
        chunks: stages on each rank of a loop.
        stages: names of the units that stages begin with; None: cut by measured costs.
        given: all of it, in a plan that is run as it stands.
    """

    num_ranks: int = 1
    schedule: str | None = None
    chunks: int | None = None
    stages: Sequence[str] | None = None
    given: PipelinePlan | None = None

    @classmethod
    def of(cls, plan: PipelinePlan) -> "PipelineWords":
        """What a plan says."""
        return cls(plan.num_ranks, plan.schedule, given=plan)

    def check(self, activations: str | Sequence[str] | None = None, order: str | None = None) -> None:
        """Raise ValueError where the words cannot be, whatever the model.

        Args: those of the engine that do not go with every pipeline.
        """
        if isinstance(self.num_ranks, bool) or not isinstance(self.num_ranks, int) or self.num_ranks < 1:
            raise ValueError(f"pipeline={self.num_ranks!r}: the number of ranks of a pipeline, 1 for none")
        if self.num_ranks == 1:
            for name in ("schedule", "chunks", "stages"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} is for pipelines: give pipeline=2 or more, or leave it out"
                    )
        if self.schedule is not None and self.schedule not in NAMES:
            raise ValueError(f"schedule={self.schedule!r}: there is {', '.join(NAMES)}")
        if self.chunks is not None and (isinstance(self.chunks, bool) or self.chunks < 1):
            raise ValueError(f"chunks={self.chunks!r}: stages on each rank, 1 or more")
        if self.chunks is not None and self.schedule not in (*LOOP_NAMES, "auto"):
            raise ValueError(
                f"chunks={self.chunks} is for schedules on a loop ({', '.join(LOOP_NAMES)}); schedule="
                f"{self.schedule or '1f1b'!r} has a fixed number of stages on each rank"
            )
        if self.num_ranks > 1:
            words = (activations,) if isinstance(activations, str) else tuple(activations or ())
            if "offload:host" in words:
                raise ValueError(
                    "activations='offload:host' has no effect in a pipeline: its stages compute in host memory; take "
                    "'offload:disk' with Memory(disk='/a/folder'), or 'recompute'"
                )
            if order is not None:
                raise ValueError(f"order={order!r}: in a pipeline the schedule says in which order micro-batches go")
