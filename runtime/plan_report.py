"""What a plan would do, on the console: words, memory over the step, seconds by lane, the plans not taken.

Owns the picture. Does not own any number in it (`scheduler/prediction.py`).
"""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..memory.budget import format_bytes
from ..scheduler.assessment import describe
from ..scheduler.prediction import Fate, Prediction, TierPrediction
from .planned_run import Planning

__all__ = ["memory_chart", "print_planning"]

_WIDTH = 64
_HEIGHT = 8
_BLOCKS = " ▁▂▃▄▅▆▇█"
_NUM_OTHERS = 3


def print_planning(found: Planning, console: Console) -> None:
    """Print everything that is known of a plan."""
    console.print(Text("Plan: ", style="bold") + Text(describe(found.plan)), soft_wrap=True)
    prediction = found.prediction
    if prediction is None:
        reason = found.note or "nothing was measured"
        console.print(Text(f"Seconds are not predicted: {reason}.", style="yellow"), soft_wrap=True)
        return
    console.print(f"A step takes about [bold]{_seconds(prediction.seconds)}[/] as predicted.", highlight=False)
    for tier in prediction.tiers:
        console.print()
        console.print(_headline(tier), highlight=False, markup=False, soft_wrap=True)
        for line in memory_chart(tier, prediction.seconds):
            console.print(line, markup=False, highlight=False, no_wrap=True)
    console.print()
    console.print(_lanes(prediction))
    others = _distinct(prediction.fates)
    if others:
        console.print(_fates("Plans that were simulated", others))
    if prediction.what_if:
        console.print(_fates("What more would buy", prediction.what_if))
    unplayed = [fate for fate in prediction.fates if fate.seconds is None]
    layouts = [fate for fate in unplayed if "pipeline" in fate.words]
    for fate in layouts:
        console.print(f"{fate.words}: {fate.fate}", highlight=False, markup=False, soft_wrap=True)
    refused = len(unplayed) - len(layouts)
    if refused:
        console.print(f"{refused} more were refused, as they do not fit.", highlight=False)
    if prediction.took_s:
        words = ", ".join(f"{_seconds(seconds)} {name}" for name, seconds in prediction.took_s.items())
        console.print(f"This took {words}.", highlight=False, soft_wrap=True)


def memory_chart(tier: TierPrediction, seconds: float) -> list[str]:
    """Bytes over the step as rows of blocks, the most of each column, up to the budget (without one, to the peak)."""
    top = tier.budget_bytes or tier.peak_bytes
    columns = [0] * _WIDTH
    ends = [second for second, _ in tier.levels[1:]] + [seconds]
    for (begin, size), end in zip(tier.levels, ends, strict=True):
        first = _column(begin, seconds)
        last = max(first, _column(end, seconds) - (end > begin and _on_border(end, seconds)))
        for column in range(first, last + 1):
            columns[column] = max(columns[column], size)
    eighths = [round(8 * _HEIGHT * size / top) if top else 0 for size in columns]
    rows = []
    for row in reversed(range(_HEIGHT)):
        blocks = "".join(_BLOCKS[min(8, max(0, height - 8 * row))] for height in eighths)
        label = format_bytes(top) if row == _HEIGHT - 1 else ""
        rows.append(f"{label:>11} │{blocks}│")
    rows.append(f"{'0 B':>11} └{'─' * _WIDTH}┘")
    end = _seconds(seconds)
    rows.append(f"{'':>11}  0 s{end:>{_WIDTH - 3}}")
    return rows


def _column(second: float, seconds: float) -> int:
    return min(_WIDTH - 1, int(second / seconds * _WIDTH)) if seconds else 0


def _on_border(second: float, seconds: float) -> bool:
    """Whether a level that ends here leaves nothing in the column that begins here."""
    place = second / seconds * _WIDTH if seconds else 0.0
    return place == int(place) and place < _WIDTH


def _headline(tier: TierPrediction) -> str:
    budget = "" if tier.budget_bytes is None else f" of {format_bytes(tier.budget_bytes)}"
    parts = sorted(tier.parts.items(), key=lambda part: -part[1])
    words = ", ".join(f"{format_bytes(size)} {name}" for name, size in parts if size)
    return f"{tier.tier} memory: {format_bytes(tier.peak_bytes)}{budget} at most, in {tier.where}: {words}"


def _lanes(prediction: Prediction) -> Table:
    table = Table(title="Seconds of a step by lane", title_justify="left", title_style="bold")
    table.add_column("lane")
    for name in ("busy", "waiting"):
        table.add_column(name, justify="right")
    table.add_column("waits most for")
    for lane in prediction.timeline.lanes():
        waits = prediction.stalls_s.get(lane, {})
        longest = max(waits, key=lambda action: waits[action], default="")
        table.add_row(
            lane,
            _seconds(prediction.timeline.busy_s(lane)),
            _seconds(prediction.stalled_s(lane)),
            f"{longest} ({_seconds(waits[longest])})" if longest else "",
        )
    return table


def _distinct(fates: Sequence[Fate]) -> list[Fate]:
    """The chosen one and the next best that read differently."""
    found: dict[str, Fate] = {}
    for fate in fates:
        if fate.seconds is not None:
            found.setdefault(fate.words, fate)
    return list(found.values())[: 1 + _NUM_OTHERS]


def _fates(title: str, fates: Sequence[Fate]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("plan", ratio=1)
    for name in ("a step", "memory", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for fate in fates:
        seconds = "" if fate.seconds is None else _seconds(fate.seconds)
        table.add_row(fate.words, seconds, format_bytes(fate.peak_bytes), fate.fate)
    return table


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1e3:.1f} ms"
