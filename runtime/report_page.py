"""The page of a report: one HTML file, complete in itself.

Owns the page's order, its words between the pictures, and its style. Does not own the pictures (`report_pictures.py`).
"""

from collections.abc import Callable
from html import escape

from ..memory.budget import format_bytes
from ..scheduler.compare import WORDS
from .report import Report
from .report_pictures import lane_bars, lanes, memory, steps, unit_bars
from .report_text import headline, pairs_of, timed, unit_of

__all__ = ["page"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1080px; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0.2rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 0.3rem; border-bottom: 1px solid #ddd; }
p { margin: 0.3rem 0; max-width: 75ch; overflow-wrap: anywhere; }
p.note { background: #fff6e0; border-left: 4px solid #e0a030; padding: 0.4rem 0.8rem; }
svg { display: block; width: 100%; height: auto; margin-top: 0.6rem; }
table { border-collapse: collapse; margin: 0.8rem 0; font-size: 0.9rem; }
th, td { padding: 0.15rem 0.8rem; border-bottom: 1px solid #eee; text-align: right; vertical-align: top;
  white-space: nowrap; }
.words { text-align: left; white-space: normal; }
.wide { overflow-x: auto; }
"""


def page(report: Report) -> str:
    """The whole file's text."""
    lines = headline(report)
    notes = {*report.drifts, report.missing}
    said = "".join(
        f'<p class="note">{escape(line)}</p>' if line in notes else f"<p>{escape(line)}</p>" for line in lines
    )
    body = "".join(part(report) for part in _PARTS)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(_name(report))}: report</title>\n"
        # An icon of no bytes: otherwise browsers ask for one.
        f'<link rel="icon" href="data:,">\n<style>{_STYLE}</style>\n</head>\n<body>\n'
        f"<h1>{escape(_name(report))}</h1>\n{said}\n{body}</body>\n</html>\n"
    )


def _name(report: Report) -> str:
    return report.path.rstrip("/").rsplit("/", 1)[-1] or "run"


def _section(title: str, words: str, *parts: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n<p>{escape(words)}</p>\n{''.join(parts)}\n</section>\n"


def _lanes(report: Report) -> str:
    if report.prediction is None and report.measured is None:
        return ""
    sides = [word for word, there in (("predicted", report.prediction), ("measured", report.measured)) if there]
    order = "predicted above measured" if len(sides) == 2 else f"{sides[0]} alone"
    words = f"Every lane does one thing at a time. For each: {order}; dashed lines show where the step ends."
    return _section("Timeline of all lanes", words, lanes(report))


def _memory(report: Report) -> str:
    if report.prediction is None and not report.measured_peaks:
        return ""
    words = "Measured is the most that any worker's process held in the whole run."
    if report.prediction is not None:
        words = f"What each tier was predicted to hold while the step runs. {words}"
    rows: list[list[str]] = []
    tiers = report.prediction.tiers if report.prediction is not None else ()
    for tier in tiers:
        rows += [[f"{tier.tier}: {part}", format_bytes(size)] for part, size in tier.parts.items() if size]
    full = ", ".join(f"{tier.tier} at {tier.where}" for tier in tiers if tier.where)
    table = f"<p>The fullest moment ({escape(full)}):</p>{_table(['for', 'bytes'], rows)}" if rows else ""
    return _section("Memory over the step", words, memory(report), table)


def _lane_seconds(report: Report) -> str:
    if not report.comparison.lanes:
        return ""
    kinds = timed(report.comparison.kinds)
    rows = [[WORDS[kind], *pairs_of(report, pair)] for kind, pair in kinds.items()]
    table = _table(["actions", *_columns(report)], rows)
    words = "How long each lane was busy, and how long it waited before its last action's end."
    return _section("Seconds by lane", words, lane_bars(report), table)


def _unit_seconds(report: Report) -> str:
    if not report.comparison.units:
        return ""
    words = "Over all micro-batches of the step; a backward holds its recomputation too."
    return _section("Seconds by unit", words, unit_bars(report))


def _differences(report: Report) -> str:
    largest = report.comparison.largest(8) if report.missing is None else []
    if not largest:
        return ""
    unit = unit_of(report)
    rows = [[name, *pairs_of(report, pair), unit.signed(pair.difference_s)] for name, pair in largest]
    words = "Where measured and predicted are farthest apart, of units, of other actions, and of waiting."
    return _section(
        "The largest differences", words, _table(["of", *_columns(report), f"difference ({unit.name})"], rows)
    )


def _steps(report: Report) -> str:
    if not report.rows:
        return ""
    return _section("Seconds of every step", "Over the whole run.", steps(report))


def _fates(report: Report) -> str:
    if report.prediction is None or not report.prediction.fates:
        return ""
    rows: list[list[str]] = []
    unit = unit_of(report)
    for fate in report.prediction.fates:
        rows.append([fate.words, unit.text(fate.seconds), format_bytes(fate.peak_bytes), fate.fate])
    words = f"{len(rows)} plans were looked at; the fastest that fits was taken."
    return _section("Plans", words, _table(["plan", f"a step ({unit.name})", "peak", "fate"], rows, "fate"))


_PARTS: tuple[Callable[[Report], str], ...] = (
    _lanes,
    _memory,
    _lane_seconds,
    _unit_seconds,
    _differences,
    _steps,
    _fates,
)


def _columns(report: Report) -> list[str]:
    named = (("predicted", report.prediction), ("measured", report.measured))
    columns = [f"{word} ({unit_of(report).name})" for word, there in named if there is not None]
    return columns + (["ratio"] if report.missing is None else [])


def _table(columns: list[str], rows: list[list[str]], *words: str) -> str:
    """A table; the first column and those named in `words` hold words, the others numbers."""
    kinds = [' class="words"' if column in (columns[0], *words) else "" for column in columns]
    head = "".join(f"<th{kind}>{escape(column)}</th>" for kind, column in zip(kinds, columns, strict=True))
    body = ""
    for row in rows:
        cells = "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True))
        body += f"<tr>{cells}</tr>"
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
