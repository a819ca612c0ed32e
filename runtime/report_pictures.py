"""The pictures of a report, as SVG text made by matplotlib.

Owns what is drawn, and how. Does not own the numbers (`report.py`, `scheduler/compare.py`) nor the page around it
(`report_page.py`). Text stays text in them, and ids are made unique, so that several can stand in one page.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..memory.timeline import Timeline
from ..parallel.actions import Kind
from ..scheduler.compare import WORDS, Pair
from .report import Report
from .report_bars import bars

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["lane_bars", "lanes", "memory", "steps", "unit_bars"]

_WIDTH_IN = 11.0
_NUM_COLUMNS = 700  # of a lane: what is narrower is merged
_MOST_NAMED_UNITS = 40
_GIB = 1 << 30
_PREDICTED, _MEASURED, _LIMIT = "#8fb8de", "#1f4e79", "#c0392b"
_COLOURS: dict[Kind, str] = {
    Kind.F: "#4c8fd6",
    Kind.B: "#2e8b57",
    Kind.I: "#2f9e9e",
    Kind.W: "#8cc152",
    Kind.R: "#9a7fc7",
    Kind.STEP: "#e0a030",
    Kind.NORM: "#a0522d",
    Kind.GATHER: "#d17fb2",
    Kind.REDUCE: "#a8327a",
    Kind.READ: "#56b4c9",
    Kind.WRITE: "#d9603b",
    Kind.UP: "#7f9bb3",
    Kind.DOWN: "#5b6f80",
    Kind.SAVE: "#b59a57",
    Kind.LOAD: "#7d6a34",
    Kind.SEND_F: "#c8a2c8",
    Kind.SEND_B: "#b07ab0",
    Kind.RECV_F: "#8f7f9f",
    Kind.RECV_B: "#6d5f7d",
    Kind.DROP: "#bbbbbb",
}


def lanes(report: Report) -> str:
    """All lanes over the step: for each, the predicted row above the measured one, on one axis of time."""
    sides = [(word, timeline) for word, timeline in _sides(report) if timeline is not None]
    names = [row.lane for row in report.comparison.lanes if row.busy.predicted_s + row.busy.measured_s > 0]
    total_s = max((timeline.seconds for _, timeline in sides), default=0.0) or 1.0
    scale, unit = _scale(total_s)
    rows = [(lane, word, timeline) for lane in names for word, timeline in sides]
    with _figure("lanes", 1.3 + 0.3 * len(rows) + 0.12 * len(names)) as (figure, result):
        axes = figure.subplots()
        kinds: set[Kind] = set()
        places: list[float] = []
        for number, (lane, _, timeline) in enumerate(rows):
            place = number + 0.45 * (number // len(sides))
            places.append(place)
            found = bars((span for span in timeline.spans if span.lane == lane), total_s / _NUM_COLUMNS)
            kinds |= {bar.kind for bar in found if bar.end_s > bar.start_s}
            for kind in Kind:
                ranges = [(bar.start_s * scale, (bar.end_s - bar.start_s) * scale) for bar in found if bar.kind is kind]
                if any(seconds for _, seconds in ranges):
                    axes.broken_barh(ranges, (place - 0.42, 0.84), facecolors=_COLOURS[kind], linewidth=0)
        axes.set_yticks(places, [f"{lane}  {word}" for lane, word, _ in rows])
        axes.set_ylim(places[-1] + 0.7 if places else 1.0, -0.7)
        axes.set_xlim(0, total_s * scale * 1.01)
        axes.set_xlabel(f"time since the step began ({unit})")
        for word, timeline in sides:
            colour = _PREDICTED if word == "predicted" else _MEASURED
            axes.axvline(timeline.seconds * scale, color=colour, linewidth=1.2, linestyle=(0, (3, 2)))
        _plain(axes, "x")
        _legend(figure, [(WORDS[kind], _COLOURS[kind]) for kind in Kind if kind in kinds])
    return result[0]


def memory(report: Report) -> str:
    """Bytes of each tier over the predicted step, the measured peak, and the budget."""
    predicted = {tier.tier: tier for tier in report.prediction.tiers} if report.prediction is not None else {}
    peaks, budgets = report.measured_peaks, report.budgets
    tiers = list(dict.fromkeys((*predicted, *peaks)))
    seconds = report.prediction.seconds if report.prediction is not None else report.comparison.step.measured_s
    scale, unit = _scale(max(_most(report.comparison.step), seconds))
    end = (seconds or 1.0) * scale
    with _figure("memory", 0.9 + 2.2 * max(1, len(tiers))) as (figure, result):
        for axes, tier in zip(_column(figure, len(tiers)), tiers, strict=False):
            found = predicted.get(tier)
            top = max(peaks.get(tier, 0), found.peak_bytes if found is not None else 0)
            if found is not None:
                times = [second * scale for second, _ in found.levels] + [end]
                sizes = [size / _GIB for _, size in found.levels]
                axes.stairs(sizes, times, fill=True, color=_PREDICTED, label="predicted")
            if tier in peaks:
                axes.axhline(peaks[tier] / _GIB, color=_MEASURED, linewidth=1.5, label="most measured in the run")
            budget = budgets.get(tier)
            title = tier
            if budget is not None and budget <= 4 * top:
                top = max(top, budget)
                axes.axhline(budget / _GIB, color=_LIMIT, linewidth=1.5, linestyle="--", label="budget")
            elif budget is not None:
                title += f" (the budget of {budget / _GIB:.2f} GiB is far above)"
            axes.set_title(title, fontsize=10, loc="left")
            axes.set_ylim(0, 1.15 * top / _GIB)
            axes.set_xlim(0, end)
            axes.set_ylabel("GiB")
            axes.set_xlabel(f"time since the predicted step began ({unit})" if found is not None else "")
            if found is None:
                axes.set_xticks([])
            _plain(axes, "y")
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    return result[0]


def lane_bars(report: Report) -> str:
    """Seconds of each lane, busy and waiting, predicted and measured."""
    rows = [row for row in report.comparison.lanes if row.busy.predicted_s + row.busy.measured_s > 0]
    scale, unit = _scale(max((_most(row.busy) + _most(row.stalled) for row in rows), default=0.0))
    with _figure("lane_bars", 1.3 + 0.62 * len(rows)) as (figure, result):
        axes = figure.subplots()
        sides = _drawn(report)
        height = 0.78 / len(sides)
        for number, row in enumerate(rows):
            for place, (word, colour) in enumerate(sides):
                y = number + (place - (len(sides) - 1) / 2) * height
                busy, waiting = (getattr(pair, f"{word}_s") * scale for pair in (row.busy, row.stalled))
                axes.barh(y, busy, height * 0.92, color=colour)
                axes.barh(y, waiting, height * 0.92, left=busy, color="#f3f3f3", edgecolor=colour, hatch="////", lw=0.6)
        axes.set_yticks(range(len(rows)), [row.lane for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlabel(f"{unit} of the step: busy (full) and then waiting (hatched)")
        _plain(axes, "x")
        _legend(figure, sides)
    return result[0]


def unit_bars(report: Report) -> str:
    """Forward and backward seconds of each unit run, predicted and measured, on one axis."""
    units = report.comparison.units
    scale, unit_word = _scale(max((_most(pair) for unit in units for pair in (unit.forward, unit.backward)), default=0))
    named = len(units) <= _MOST_NAMED_UNITS
    sides = _drawn(report)
    with _figure("unit_bars", 1.5 + 0.34 * len(units) if named else 4.6) as (figure, result):
        shape: dict[str, Any] = {"ncols": 2, "sharey": True, "sharex": True} if named else {"nrows": 2, "sharex": True}
        for axes, part in zip(figure.subplots(**shape), ("forward", "backward"), strict=True):
            for place, (word, colour) in enumerate(sides):
                values = [getattr(getattr(unit, part), f"{word}_s") * scale for unit in units]
                if named:
                    height = 0.78 / len(sides)
                    offset = (place - (len(sides) - 1) / 2) * height
                    axes.barh([n + offset for n in range(len(units))], values, height * 0.92, color=colour)
                else:
                    runs = [unit.run for unit in units]
                    size = 4.0 if word == "predicted" else 1.4
                    axes.plot(runs, values, ".", color=colour, markersize=2 * size)
            axes.set_title(part, fontsize=10, loc="left")
            axes.set_xlabel(f"{unit_word} of the step" if named else "unit run")
            if named:
                axes.set_yticks(range(len(units)), [_short(unit.name) for unit in units])
                axes.set_ylim(len(units) - 0.4, -0.6)
            else:
                axes.set_ylabel(f"{unit_word} of the step")
                most = max((_most(getattr(unit, part)) for unit in units), default=1.0)
                axes.set_ylim(0, 1.2 * scale * most)
            axes.label_outer()
            _plain(axes, "x" if named else "y")
        _legend(figure, sides)
    return result[0]


def steps(report: Report) -> str:
    """Seconds of every step of the run, and what was predicted for one."""
    from matplotlib.ticker import MaxNLocator

    numbers = [row["step"] for row in report.rows]
    seconds = [row["step_s"] for row in report.rows]
    scale, unit = _scale(max(seconds, default=0.0))
    with _figure("steps", 2.9) as (figure, result):
        axes = figure.subplots()
        axes.plot(numbers, [s * scale for s in seconds], color=_MEASURED, linewidth=1.0, marker=".", markersize=4)
        drawn = [("measured, with what lies around the program", _MEASURED)]
        if report.prediction is not None:
            axes.axhline(report.prediction.seconds * scale, color=_PREDICTED, linewidth=2.5, zorder=0)
            drawn.append(("predicted", _PREDICTED))
        axes.set_ylim(0, 1.15 * scale * max([*seconds, report.comparison.step.predicted_s]))
        axes.set_xlabel("step")
        axes.set_ylabel(f"{unit} a step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _plain(axes, "y")
        _legend(figure, drawn)
    return result[0]


def _sides(report: Report) -> list[tuple[str, Timeline | None]]:
    predicted = report.prediction.timeline if report.prediction is not None else None
    return [("predicted", predicted), ("measured", report.measured)]


def _drawn(report: Report) -> list[tuple[str, str]]:
    """The sides that there are, with their colours."""
    colours = {"predicted": _PREDICTED, "measured": _MEASURED}
    return [(word, colours[word]) for word, timeline in _sides(report) if timeline is not None]


def _most(pair: Pair) -> float:
    return max(pair.predicted_s, pair.measured_s)


def _scale(seconds: float) -> tuple[float, str]:
    """Factor and name of the unit that numbers up to `seconds` read well in."""
    return (1.0, "seconds") if seconds >= 2 else (1000.0, "milliseconds")


def _short(name: str, most: int = 28) -> str:
    return name if len(name) <= most else f"…{name[-most:]}"


def _column(figure: "Figure", number: int) -> Sequence["Axes"]:
    return list(figure.subplots(max(1, number), 1, squeeze=False)[:, 0])


def _plain(axes: "Axes", grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#dddddd", linewidth=0.6)  # pyright: ignore[reportArgumentType]
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)


def _legend(figure: "Figure", entries: Sequence[tuple[str, str]]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=word) for word, colour in entries]
    figure.legend(handles=handles, loc="outside upper left", ncols=5, frameon=False, fontsize=9, handlelength=1.2)


@contextmanager
def _figure(name: str, height_in: float) -> Iterator[tuple["Figure", list[str]]]:
    """A figure to draw in; afterwards the list holds its SVG text."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    result: list[str] = []
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "hatch.linewidth": 0.6,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
        canvas = FigureCanvasSVG(figure)
        yield figure, result
        written = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        canvas.print_svg(written, metadata=nothing)
    result.append(_embedded(written.getvalue(), name))


def _embedded(svg: str, name: str) -> str:
    """SVG text that can stand in a page beside others: no prolog, ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{name.replace("_", " ")}" ', 1)
