"""The plan: every decision about one run, small, frozen and JSON. It holds no bytes and no processes.

Owns the decisions and their text. Does not own how they are carried out (`scheduler/passes.py` compiles a plan into a
program) nor how they are found.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from ..memory.chunk import ChunkLayout

__all__ = ["ChunkPlan", "GatheredFor", "Plan", "plan_for_zero"]


class GatheredFor(StrEnum):
    """How long the gathered copy of a sharded chunk lives."""

    USE = "use"  # dropped after each use: ZeRO-3
    PASS = "pass"  # kept from a micro-batch's forward to its backward
    STEP = "step"  # never dropped: ZeRO-0, 1, 2


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """What is decided for one chunk.

    Attributes:
        gathered_for: how long the gathered parameters live.
        gradients_sharded: whether a rank keeps the summed gradients of its shard alone (ZeRO-2, 3) or of all (0, 1).
        optimizer_sharded: whether a rank updates its shard alone (ZeRO-1, 2, 3) or everything (0).

    Raises:
        ValueError: parameters or gradients sharded where the optimizer is not (outside ALGORITHMS 1.10's useful cone).
    """

    gathered_for: GatheredFor = GatheredFor.STEP
    gradients_sharded: bool = False
    optimizer_sharded: bool = False

    def __post_init__(self) -> None:
        if self.gradients_sharded and not self.optimizer_sharded:
            raise ValueError("a chunk's gradients are sharded but its optimizer slots are not: shard both, or neither")
        if self.parameters_sharded and not self.gradients_sharded:
            raise ValueError("a chunk's parameters are sharded but its gradients are not: shard both, or neither")

    @property
    def parameters_sharded(self) -> bool:
        return self.gathered_for is not GatheredFor.STEP


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run.

    Attributes:
        world_size: ranks that share the model's state.
        zero: the ZeRO stage that the chunks' decisions amount to.
        micro_batches: per step and rank.
        precision: of the computation, `float32` or `bf16` (with float32 masters).
        clips_gradients: whether the update waits for the global gradient norm.
        prefetch: how many units ahead of their use chunks are gathered.
        chunks: one decision per chunk.
    """

    world_size: int
    zero: int
    micro_batches: int
    precision: str
    clips_gradients: bool
    prefetch: int
    chunks: tuple[ChunkPlan, ...]

    def to_json(self) -> str:
        """The plan as JSON text; `from_json` reads it back."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read a plan.

        Raises:
            ValueError: text that is no plan: keys missing, unknown, or values that cannot hold.
        """
        try:
            fields: dict[str, Any] = json.loads(text)
            chunks = tuple(
                ChunkPlan(**(chunk | {"gathered_for": GatheredFor(chunk["gathered_for"])}))
                for chunk in fields["chunks"]
            )
            return cls(**{**fields, "chunks": chunks})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no plan: {type(error).__name__}: {error}") from error


def plan_for_zero(
    chunks: Iterable[ChunkLayout],
    zero: int,
    world_size: int,
    micro_batches: int = 1,
    precision: str = "float32",
    clips_gradients: bool = False,
    prefetch: int = 1,
) -> Plan:
    """The plan that a ZeRO stage stands for: every chunk treated alike (ALGORITHMS 1.1).

    Raises:
        ValueError: a stage outside 0..3.
    """
    if zero not in (0, 1, 2, 3):
        raise ValueError(
            f"zero={zero!r}: the stages are 0 (replicate), 1 (shard optimizer), 2 (+ gradients), 3 (+ parameters)"
        )
    decision = ChunkPlan(
        gathered_for=GatheredFor.USE if zero == 3 else GatheredFor.STEP,
        gradients_sharded=zero >= 2,
        optimizer_sharded=zero >= 1,
    )
    return Plan(world_size, zero, micro_batches, precision, clips_gradients, prefetch, tuple(decision for _ in chunks))
