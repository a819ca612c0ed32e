"""What steps leave, told without any program: a name for every value, for a chain of units and its chunks."""

from typing import Any

from outgrow.parallel.actions import Action, Kind
from outgrow.scheduler.plan import Plan
from outgrow.scheduler.program import StepShape

__all__ = ["STEPS", "chunks_of", "expected", "gathers", "last_unit", "model_order"]

STEPS = 2


def gathers(chunk: int, plan: Plan) -> bool:
    return plan.world_size > 1 and plan.chunks[chunk].optimizer_sharded


def chunks_of(unit: int, shape: StepShape) -> list[int]:
    return sorted({*shape.held, *shape.units[unit].chunks})


def last_unit(chunk: int, shape: StepShape) -> int | None:
    if chunk in shape.held:
        return None
    return min((u for u, unit in enumerate(shape.units) if chunk in unit.chunks and unit.has_backward), default=None)


def model_order(shape: StepShape, micro_batch: int) -> list[Action]:
    """What a micro-batch does, by the model's own code."""
    units = list(range(len(shape.units)))
    back = [Action(Kind.B, u, micro_batch) for u in reversed(units) if shape.units[u].has_backward]
    return [*(Action(Kind.F, u, micro_batch) for u in units), *back]


def gradient_of(chunk: int, micro_batch: int, shape: StepShape, parameters: list[Any]) -> Any:
    """Of one micro-batch: which units gave it, and with which parameters all of them computed."""
    users = [u for u, unit in enumerate(shape.units) if unit.has_backward and chunk in chunks_of(u, shape)]
    return (
        "gradient",
        chunk,
        micro_batch,
        tuple((u, tuple(parameters[c] for c in chunks_of(u, shape))) for u in users),
    )


def expected(shape: StepShape, plan: Plan) -> dict[str, Any]:
    """Plain steps, without any program."""
    parameters: list[Any] = [("first", c) for c in range(len(shape.chunks))]
    slots: list[Any] = [("slots", c) for c in range(len(shape.chunks))]
    norms = []
    for _ in range(STEPS):
        gradients = {
            c: tuple(gradient_of(c, m, shape, parameters) for m in range(plan.micro_batches))
            for c, chunk in enumerate(shape.chunks)
            if chunk.trainable
        }
        gradients = {c: tuple(g for g in gs if g[3]) for c, gs in gradients.items()}
        norm = ("norm", tuple(gradients[c] for c in sorted(gradients)))
        norms.append(norm)
        for c, gradient in gradients.items():
            clipped = norm if plan.clips_gradients else None
            parameters[c], slots[c] = (
                ("step", parameters[c], slots[c], gradient, clipped),
                ("slots", slots[c], gradient),
            )
    return {"parameters": parameters, "slots": slots, "norms": norms}
