"""Training on one of several ranks with state in various places, for comparing bits."""

import tempfile
from typing import Any

import torch.distributed as dist
from models import DROPPING
from residency import Outcome, engine_of, layout, places

__all__ = ["compare_rows", "part", "train"]


def part(tensors: Any, rank: int) -> Any:
    """This rank's samples, or None where there are none."""
    rows = tuple(tensor.tensor_split(dist.get_world_size())[rank] for tensor in tensors)
    return rows if len(rows[0]) else None


def train(rank: int, name: str, optimizer: str = "adamw", sizes: tuple[int, ...] = (8, 7), **arguments: Any) -> Outcome:
    with engine_of(name, optimizer, **arguments) as engine:
        results = [engine.step(part(DROPPING[name].batch(step, samples), rank)) for step, samples in enumerate(sizes)]
        return Outcome(
            [r.loss for r in results], [r.grad_norm for r in results], [r.lr for r in results], engine.state_dict()
        )


def compare_rows(rank: int, rows: list[dict[str, Any]]) -> list[str]:
    """What differs from training in memory, in words."""
    references: dict[str, Outcome] = {}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for row in rows:
            key = repr(layout(row))
            if key not in references:
                references[key] = train(rank, folder=None, offload="none", **layout(row))
            try:
                found = train(rank, folder=folder, **layout(row), **places(row))
            except Exception as error:
                error.add_note(f"{row}")
                raise
            differences = found.differ(references[key])
            wrong += [f"{row}: {differences}"] if differences else []
    return wrong
