"""The report as tables for the console.

Owns the words and their order. Does not own the numbers (`report.py`, `scheduler/compare.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..memory.budget import format_bytes
from ..parallel.actions import Kind
from ..scheduler.compare import WORDS, Pair, UnitRow
from .report import Report

__all__ = ["Unit", "difference", "headline", "pairs_of", "text", "timed", "unit_of"]

_MOST_UNITS = 24
_MOST_FATES = 4


@dataclass(frozen=True, slots=True)
class Unit:
    """What all seconds of a report are said in."""

    name: str
    factor: float

    def text(self, seconds: float | None) -> str:
        """The number alone; nothing for None."""
        return "" if seconds is None else f"{seconds * self.factor:,.{1 if self.factor > 1 else 2}f}"

    def signed(self, seconds: float) -> str:
        return f"{'+' if seconds > 0 else '-'}{self.text(abs(seconds))}"


def unit_of(report: Report) -> Unit:
    """Milliseconds, or seconds where a step takes ten of them."""
    step = report.comparison.step
    return Unit("s", 1.0) if max(step.predicted_s, step.measured_s) >= 10 else Unit("ms", 1000.0)


def text(report: Report) -> Group:
    """Everything, from the whole step to its parts."""
    parts: list[RenderableType] = [Text(line) for line in headline(report)]
    for table in (_lanes(report), _kinds(report), _units(report), _memory(report), _largest(report), _fates(report)):
        if table is not None and table.row_count:
            parts += [Text(), table]
    return Group(*parts)


def headline(report: Report) -> list[str]:
    """What there is to say in sentences: the run, the step, what is missing, what drifted."""
    lines = [f"Run {report.path}: {report.summary.get('status', 'not ended')}, {len(report.rows)} steps"]
    step, unit = report.comparison.step, unit_of(report)
    if report.prediction is not None:
        lines.append(f"A step was predicted to take {unit.text(step.predicted_s)} {unit.name}.")
    if report.measured is not None:
        which = f"Step {report.step}, a typical one," if report.step is not None else "The step that was kept"
        around = f" ({unit.text(report.step_s)} with what lies around its program)" if report.step_s else ""
        than = f": {difference(step)}" if report.prediction is not None else ""
        lines.append(f"{which} took {unit.text(step.measured_s)} {unit.name}{around}{than}.")
    if report.missing is not None:
        lines.append(report.missing)
    return [*lines, *report.drifts]


def difference(pair: Pair) -> str:
    """`8% more than predicted`, in words that hold for any ratio."""
    if pair.ratio is None:
        return "nothing was predicted"
    if pair.ratio >= 2:
        return f"{pair.ratio:.1f} times what was predicted"
    percent = 100 * (pair.ratio - 1)
    if abs(percent) < 0.5:
        return "as predicted"
    return f"{abs(percent):.0f}% {'more' if percent > 0 else 'less'} than predicted"


def timed(kinds: Mapping[Kind, Pair]) -> dict[Kind, Pair]:
    """The kinds that take any time by either account."""
    return {kind: pair for kind, pair in kinds.items() if max(pair.predicted_s, pair.measured_s) > 0}


def pairs_of(report: Report, pair: Pair, has_ratio: bool = True) -> list[str]:
    """Cells of a table: what is there of predicted, measured and their ratio."""
    unit = unit_of(report)
    cells: list[str] = []
    if report.prediction is not None:
        cells.append(unit.text(pair.predicted_s))
    if report.measured is not None:
        cells.append(unit.text(pair.measured_s))
    if report.missing is None and has_ratio:
        cells.append("" if pair.ratio is None else f"{pair.ratio:.2f}")
    return cells


def _table(title: str, *columns: str, words: Sequence[str] = ()) -> Table:
    """The first column and those in `words` hold words, the others numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        is_text = column in (columns[0], *words)
        table.add_column(column, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold")
    return table


def _columns(report: Report, word: str = "", has_ratio: bool = True) -> list[str]:
    columns: list[str] = []
    line = f"{word}\n" if word else ""
    if report.prediction is not None:
        columns.append(f"{line}predicted")
    if report.measured is not None:
        columns.append(f"{line}measured")
    if report.missing is None and has_ratio:
        columns.append("\nratio" if word else "ratio")
    return columns


def _lanes(report: Report) -> Table:
    columns = [*_columns(report, "busy"), *_columns(report, "waiting", has_ratio=False), "\nmoved"]
    table = _table(f"Lanes ({unit_of(report).name})", "\nlane", *columns)
    for row in report.comparison.lanes:
        moved = format_bytes(row.num_bytes) if row.num_bytes else ""
        table.add_row(row.lane, *pairs_of(report, row.busy), *pairs_of(report, row.stalled, False), moved)
    return table


def _kinds(report: Report) -> Table:
    table = _table(f"Actions ({unit_of(report).name})", "kind", *_columns(report))
    for kind, pair in timed(report.comparison.kinds).items():
        table.add_row(WORDS[kind], *pairs_of(report, pair))
    return table


def _units(report: Report) -> Table:
    units: Sequence[UnitRow] = report.comparison.units
    title = f"Units ({unit_of(report).name})"
    if len(units) > _MOST_UNITS:
        weight = {unit.run: _weight(unit) for unit in units}
        chosen = sorted(units, key=lambda unit: -weight[unit.run])[:_MOST_UNITS]
        title += f": the {_MOST_UNITS} of {len(units)} that differ most"
        units = sorted(chosen, key=lambda unit: unit.run)
    table = _table(title, "\nunit", *_columns(report, "forward"), *_columns(report, "backward"))
    for unit in units:
        table.add_row(unit.name, *pairs_of(report, unit.forward), *pairs_of(report, unit.backward))
    return table


def _weight(unit: UnitRow) -> float:
    return abs(unit.forward.difference_s) + abs(unit.backward.difference_s)


def _memory(report: Report) -> Table:
    columns = ["predicted", "measured", "budget", "predicted for"]
    table = _table("Memory at its fullest moment", "tier", *columns, words=columns[-1:])
    predicted = {tier.tier: tier for tier in report.prediction.tiers} if report.prediction is not None else {}
    peaks, budgets = report.measured_peaks, report.budgets
    for tier in dict.fromkeys((*predicted, *peaks)):
        found = predicted.get(tier)
        table.add_row(
            tier,
            format_bytes(found.peak_bytes) if found is not None else "",
            format_bytes(peaks[tier]) if tier in peaks else "",
            format_bytes(budgets[tier]) if tier in budgets else "",
            found.where if found is not None else "",
        )
    return table


def _largest(report: Report) -> Table | None:
    if report.missing is not None:
        return None
    unit = unit_of(report)
    table = _table(f"The largest differences ({unit.name})", "of", *_columns(report), "difference")
    for name, pair in report.comparison.largest():
        table.add_row(name, *pairs_of(report, pair), unit.signed(pair.difference_s))
    return table


def _fates(report: Report) -> Table | None:
    if report.prediction is None:
        return None
    unit = unit_of(report)
    shown = report.prediction.fates[:_MOST_FATES]
    title = "Plans that were looked at"
    if len(report.prediction.fates) > len(shown):
        title += f": the first {len(shown)} of {len(report.prediction.fates)}"
    table = _table(title, "plan", f"a step ({unit.name})", "peak", "fate", words=["fate"])
    for fate in shown:
        table.add_row(fate.words, unit.text(fate.seconds), format_bytes(fate.peak_bytes), fate.fate)
    return table
