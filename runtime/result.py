"""The result of a run: its metrics, its plan, its weights and its folder.

Owns reading what a run left. It does not own writing it (`recorder.py`, the engine's export).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .run_folder import WEIGHTS_NAME, fetch

if TYPE_CHECKING:
    import pandas
    import torch

    from ..scheduler.plan import Plan
    from .report import Report

__all__ = ["Metrics", "Result"]


class Metrics(list[dict[str, Any]]):
    """One dict a step: step, epoch, loss, tokens_per_s, grad_norm, lr, num_samples, num_tokens, step_s; and of
    rank 0 `peak_<tier>_bytes` for each tier and `busy_<lane>_s` for each lane."""

    def to_pandas(self) -> "pandas.DataFrame":
        """The same rows as a data frame, indexed by step."""
        import pandas

        frame = pandas.DataFrame(list(self))
        return frame.set_index("step") if len(frame) else frame


@dataclass(frozen=True)
class Result:
    """What `Runtime.train` returns.

    Attributes:
        path: the run folder: plan.json, metrics.jsonl, timeline.json, result.json, model.safetensors, logs/. A string
            where the storage path was a URI.
        metrics: one row a step.
        plan: what was run.
        summary: what result.json says.
    """

    path: Path | str
    metrics: Metrics
    plan: "Plan"
    summary: dict[str, Any]

    def state_dict(self) -> "dict[str, torch.Tensor]":
        """Full weights and buffers on the CPU, by the model's own names. Tied names share one tensor.

        Raises FileNotFoundError where the run folder has no weights any more.
        """
        from safetensors import safe_open

        with fetch(self.path, WEIGHTS_NAME) as path, safe_open(path, framework="pt") as file:
            aliases = json.loads((file.metadata() or {}).get("aliases", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        return tensors | {alias: tensors[stored] for alias, stored in aliases.items()}

    def report(self) -> "Report":
        """Predicted against measured: print it, or `report.save_html("report.html")`."""
        from .report import read_report

        return read_report(self.path)

    def __repr__(self) -> str:
        first, last = self.summary.get("loss_first"), self.summary.get("loss_last")
        return f"Result({len(self.metrics)} steps, loss {first} -> {last}, path={str(self.path)!r})"
