"""The report of a run: predicted against measured, as text and as one HTML page.

Owns reading the run folder and what stands beside what. Does not own the sums (`scheduler/compare.py`), the words on
the console (`report_text.py`), the pictures (`report_pictures.py`) nor the page around them (`report_page.py`).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..memory.timeline import Timeline, timelines_from
from ..scheduler.compare import Comparison, compare
from ..scheduler.prediction import Prediction
from .run_folder import PREDICTION_NAME, fetch

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["Report", "print_report", "read_report"]


@dataclass(frozen=True)
class Report:
    """What is known of a run. It prints itself on a `rich` console, and as text with `str`.

    Attributes:
        path: the run folder.
        summary: what result.json says; empty where the run has not ended.
        rows: of the metrics, one a step.
        prediction: None where nothing was predicted.
        measured: the timeline of one step of rank 0; None where no step was done.
        step, step_s: which step that is, and its seconds with what lies around its program.
        units: names of the unit runs.
    """

    path: str
    summary: Mapping[str, Any]
    rows: tuple[Mapping[str, Any], ...]
    prediction: Prediction | None
    measured: Timeline | None
    step: int | None
    step_s: float | None
    units: tuple[str, ...]

    @cached_property
    def comparison(self) -> Comparison:
        """Where one of the two sides is missing, all of its seconds are 0."""
        predicted = self.prediction.timeline if self.prediction is not None else Timeline(())
        return compare(predicted, self.measured or Timeline(()), self.units)

    @property
    def measured_peaks(self) -> dict[str, int]:
        """Tier -> the most bytes that any rank's process held in the run."""
        peaks: dict[str, int] = {}
        for tiers in self.summary.get("peak_bytes", {}).values():
            for tier, held in tiers.items():
                peaks[tier] = max(held, peaks.get(tier, 0))
        return peaks

    @property
    def budgets(self) -> dict[str, int]:
        """Tier -> the smallest budget of any rank."""
        found: dict[str, int] = {}
        for tiers in self.summary.get("budget_bytes", {}).values():
            for tier, size in tiers.items():
                found[tier] = min(size, found.get(tier, size))
        if self.prediction is not None:
            found |= {tier.tier: tier.budget_bytes for tier in self.prediction.tiers if tier.budget_bytes is not None}
        return found

    @property
    def drifts(self) -> list[str]:
        """What was said of the run while it ran, in sentences; with the rank where there are several."""
        several = self.summary.get("workers", 1) > 1
        return [
            f"Rank {drift['rank']}: {drift['words']}."
            if several
            else f"{drift['words'][:1].upper()}{drift['words'][1:]}."
            for drift in self.summary.get("drifts", ())
        ]

    @property
    def missing(self) -> str | None:
        """What there is no word of, and why; None where nothing is missing."""
        if self.prediction is None:
            reason = self.summary.get("not_predicted_because")
            because = f" ({reason})" if reason else ""
            return f"Nothing was predicted for this run{because}, so what follows is measured alone."
        if self.measured is None:
            return "No step of this run was measured, so what follows is predicted alone."
        return None

    def html(self) -> str:
        """The page: complete in itself, without a script and without anything to load."""
        from .report_page import page

        return page(self)

    def save_html(self, path: Path | str) -> None:
        """Write the page to a file."""
        Path(path).write_text(self.html(), encoding="utf-8")

    def __rich__(self) -> "Group":
        from .report_text import text

        return text(self)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=110, color_system=None, force_terminal=False)
        with console.capture() as captured:
            console.print(self)
        return captured.get()

    def _repr_html_(self) -> str:
        """For notebooks."""
        from html import escape

        return f'<iframe srcdoc="{escape(self.html())}" width="100%" height="900" style="border:0"></iframe>'


def read_report(run_path: Path | str) -> Report:
    """Read a run folder; a URI is fetched.

    Raises:
        ValueError: no run folder, or files in it that cannot be read.
    """
    summary = _json(run_path, "result.json")
    trace = _json(run_path, "timeline.json")
    lines = _text(run_path, "metrics.jsonl")
    predicted = _text(run_path, PREDICTION_NAME)
    if summary is None and lines is None:
        raise ValueError(f"{run_path} is no run folder: it holds neither result.json nor metrics.jsonl")
    prediction = Prediction.from_json(predicted) if predicted is not None else None
    timelines = timelines_from(trace) if trace is not None else []
    notes = (trace or {}).get("otherData", {})
    return Report(
        str(run_path),
        summary or {},
        tuple(json.loads(line) for line in (lines or "").splitlines()),
        prediction,
        timelines[0] if timelines and timelines[0].spans else None,
        notes.get("step"),
        notes.get("step_s"),
        tuple(notes.get("units", ())) or (prediction.units if prediction is not None else ()),
    )


def print_report(run_path: Path | str, html: Path | None = None) -> None:
    """What `outgrow report` does."""
    from rich.console import Console

    report = read_report(run_path)
    console = Console()
    console.print(report)
    if html is not None:
        report.save_html(html)
        console.print(f"page: {html}", soft_wrap=True, markup=False, highlight=False)


def _text(run_path: Path | str, name: str) -> str | None:
    """A file of the run folder; None where it is not there."""
    try:
        with fetch(run_path, name) as path:
            return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _json(run_path: Path | str, name: str) -> dict[str, Any] | None:
    text = _text(run_path, name)
    try:
        return None if text is None else json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} of {run_path} cannot be read: {error}") from error
