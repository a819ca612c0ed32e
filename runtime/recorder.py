"""The recorder: turns events into the run folder's files and the live display, and keeps the metrics for the result.

Owns what metrics.jsonl, plan.json, timeline.json and result.json say. It runs where `train` was called: in this process
it is the ranks' sink itself, on Ray it is fed by the driver's poll.
"""

import json
import logging
import platform
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

from .config import RuntimeConfig, TrainConfig
from .events import Drifted, Event, Failure, Finished, MemoryHeld, Rows, Started
from .result import Metrics
from .run_folder import PREDICTION_NAME, RunFolder

__all__ = ["Display", "Recorder", "versions"]

_log = logging.getLogger(__name__)


class Display(Protocol):
    """What shows a run on the console."""

    def show(self, event: Event) -> None: ...

    def close(self) -> None: ...


class Recorder:
    """Takes every event of a run, in order, from one thread."""

    def __init__(
        self, folder: RunFolder, runtime: RuntimeConfig, config: TrainConfig, display: Display | None = None
    ) -> None:
        self._folder, self._runtime, self._config, self._display = folder, runtime, config, display
        self._file = folder.open_append("metrics.jsonl")
        self._started_s = time.time()
        self.metrics = Metrics()
        self.failures: list[Failure] = []
        self.drifts: list[dict[str, Any]] = []
        self.plan: Any = None
        self._note = ""
        self.peak_bytes: dict[int, dict[str, int]] = {}
        self.state_bytes: dict[int, dict[str, int]] = {}
        self.base_bytes: dict[int, int] = {}
        self.budget_bytes: dict[int, dict[str, int]] = {}

    def send(self, event: Event) -> None:
        """Record one event."""
        match event:
            case Started(rank=rank, plan=plan, prediction=prediction, note=note):
                self.base_bytes[rank] = event.base_bytes
                self.budget_bytes[rank] = dict(event.budget_bytes)
                if rank == 0:
                    self.plan, self._note = plan, note
                    self._folder.write_json("plan.json", plan.to_json())
                    if prediction is not None:
                        self._folder.write_json(PREDICTION_NAME, prediction)
            case Rows(rows=rows):
                self.metrics.extend(rows)
                self._file.writelines(json.dumps(row) + "\n" for row in rows)
            case MemoryHeld(rank=rank, peak_bytes=peak_bytes):
                self.peak_bytes[rank] = dict(peak_bytes)
            case Finished(rank=rank, trace=trace, state_bytes=state_bytes):
                self.state_bytes[rank] = dict(state_bytes)
                if trace is not None:
                    self._folder.write_json("timeline.json", dict(trace))
            case Drifted(rank=rank, finding=finding):
                fields = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(finding).items()}
                self.drifts.append({"rank": rank, "words": finding.words, **fields})
                if self._display is None:
                    _log.warning("rank %d: %s", rank, finding.words)
            case Failure():
                self.failures.append(event)
        if self._display is not None:
            self._display.show(event)

    def flush(self) -> None:
        """Nothing waits here: events are recorded as they come."""

    def finish(self, status: str, error: str | None = None) -> dict[str, Any]:
        """Write result.json, close all, bring the folder home. `status` is "finished", "failed" or "interrupted"."""
        if self._display is not None:
            self._display.close()
        self._file.close()
        summary = self._summary(status, error)
        self._folder.write_json("result.json", summary)
        self._folder.finish()
        return summary

    def _summary(self, status: str, error: str | None) -> dict[str, Any]:
        rows = self.metrics
        return {
            "status": status,
            "error": error,
            "num_steps": len(rows),
            "loss_first": rows[0]["loss"] if rows else None,
            "loss_last": rows[-1]["loss"] if rows else None,
            "tokens_per_s": statistics.median(row["tokens_per_s"] for row in rows) if rows else None,
            "peak_bytes": {str(rank): peaks for rank, peaks in sorted(self.peak_bytes.items())},
            "state_bytes": {str(rank): slots for rank, slots in sorted(self.state_bytes.items())},
            "base_bytes": {str(rank): held for rank, held in sorted(self.base_bytes.items())},
            "budget_bytes": {str(rank): tiers for rank, tiers in sorted(self.budget_bytes.items())},
            "drifts": self.drifts,
            "workers": self._runtime.workers,
            "not_predicted_because": self._note or None,
            "arguments": self._config.to_json(),
            "started": datetime.fromtimestamp(self._started_s, UTC).isoformat(timespec="seconds"),
            "duration_s": round(time.time() - self._started_s, 3),
            "versions": versions(),
        }


def versions() -> Mapping[str, str]:
    """Versions of what a run's numbers depend on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("outgrow", "torch", "ray", "numpy", "numba"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
