"""Pictures of pipeline schedules: a grid for the terminal and an SVG file.

One row per rank, time to the right. `F3` is a forward of micro-batch 3, `B` a whole backward, `I` and `W` its two
parts; small letters are odd chunks (second, fourth, ...), whose colours are paler. Where a schedule copies activations,
each rank has a second row: `S` and `L` for `SAVE` and `LOAD`.
"""

from html import escape

from rich.style import Style
from rich.table import Table
from rich.text import Text

from ..parallel.actions import Action, Kind
from .pipeline_timing import Timing

__all__ = ["grid", "rows", "summary", "svg"]

#: (even chunks, odd chunks); the copies have one colour each.
_COLOURS: dict[Kind, tuple[str, str]] = {
    Kind.F: ("#4c8fd6", "#9cc4ee"),
    Kind.B: ("#3f9e63", "#98d3ae"),
    Kind.I: ("#2f9e9e", "#93d5d5"),
    Kind.W: ("#e0a030", "#f2d194"),
    Kind.R: ("#9a7fc7", "#cdbfe6"),
    Kind.SAVE: ("#b0b0b0", "#b0b0b0"),
    Kind.LOAD: ("#808080", "#808080"),
}
_WIDEST_CELL = 4  # characters for the shortest action: `F12` and a space
#: (start in seconds, end in seconds, action, label)
_Cell = tuple[float, float, Action, str]


def _label(action: Action, placement: tuple[int, ...]) -> str:
    assert action.index is not None
    chunk = placement[: action.index].count(placement[action.index])
    letter = str(action.kind)[0]
    return f"{letter.lower() if chunk % 2 else letter}{action.micro_batch}"


def _lanes(timing: Timing) -> list[tuple[str, list[_Cell]]]:
    """(name, cells in order of time) of every row."""
    lanes: list[tuple[str, list[_Cell]]] = []
    placement = timing.schedule.placement
    for rank, (order, spans) in enumerate(zip(timing.schedule.orders, timing.times_s, strict=True)):
        cells = [
            (start, end, action, _label(action, placement))
            for action, (start, end) in zip(order, spans, strict=True)
            if end > start
        ]
        lanes.append((f"d{rank}", [cell for cell in cells if cell[2].kind.is_compute]))
        if any(not cell[2].kind.is_compute for cell in cells):
            lanes.append(("copy", [cell for cell in cells if not cell[2].kind.is_compute]))
    return lanes


def rows(timing: Timing) -> list[str]:
    """The computation of each rank as plain words, one slot of the shortest action each: `F0 F1 . . I0 W0`.

    A longer action fills its slots with `=`, an empty slot is `.`; meant for times that are multiples of the shortest.
    """
    lanes = [cells for name, cells in _lanes(timing) if name != "copy"]
    slot_s = min((end - start for cells in lanes for start, end, *_ in cells), default=1.0)
    lines = []
    for cells in lanes:
        words: list[str] = []
        for start, end, _, label in cells:
            words += ["."] * (round(start / slot_s) - len(words))
            words += [label] + ["="] * (round((end - start) / slot_s) - 1)
        lines.append(" ".join(words))
    return lines


def grid(timing: Timing, width: int = 120) -> Text:
    """The coloured grid for the terminal, scaled to `width` characters where it would be wider.

    A label that does not fit its cell loses its number; where not even the letter fits, the colours show the shape.
    """
    lanes = _lanes(timing)
    shortest_s = min((end - start for _, cells in lanes for start, end, *_ in cells), default=1.0)
    total_s = max(timing.makespan_s, max((cells[-1][1] for _, cells in lanes if cells), default=0.0)) or 1.0
    per_s = min(_WIDEST_CELL / shortest_s, max(width - 6, 20) / total_s)
    text = Text(no_wrap=True, overflow="crop")
    for name, cells in lanes:
        text.append(f"{name:>4} ", style="bold")
        column = 0
        for start, end, action, label in cells:
            first, last = round(start * per_s), round(end * per_s)
            if first > column:
                text.append("·" * (first - column), style="dim")
            size = max(last - max(first, column), 0)
            text.append(
                (label if len(label) <= size else label[:1])[:size].ljust(size),
                style=Style(color="#101010", bgcolor=_colour(action, label)),
            )
            column = max(first, column) + size
        text.append("\n")
    return text


def _colour(action: Action, label: str) -> str:
    return _COLOURS[action.kind][label[0].islower()]


def summary(timing: Timing, unit: str = "") -> Table:
    """Bubble share, span and the peak activations of each rank."""
    table = Table(show_header=False, box=None)
    schedule = timing.schedule
    table.add_row(
        "schedule", f"{schedule.name}: {schedule.num_ranks} ranks, {schedule.num_micro_batches} micro-batches"
    )
    table.add_row("placement", " ".join(str(rank) for rank in schedule.placement))
    table.add_row("bubble", f"{timing.bubble_share:.1%} ({timing.bubble_s:.4g} of {timing.span_s:.4g}{unit})")
    table.add_row("makespan", f"{timing.makespan_s:.4g}{unit}")
    table.add_row("peak activations", " ".join(f"{peak:g}" for peak in timing.peak_activations))
    return table


def svg(timing: Timing) -> str:
    """The schedule as a picture, with its bubble share and the peak activations of each rank."""
    lanes = _lanes(timing)
    shortest_s = min((end - start for _, cells in lanes for start, end, *_ in cells), default=1.0)
    total_s = max((cells[-1][1] for _, cells in lanes if cells), default=1.0)
    per_s, height, left, top = 26 / shortest_s, 26, 56, 56
    width = left + total_s * per_s + 110
    schedule = timing.schedule
    title = (
        f"{schedule.name}: {schedule.num_ranks} ranks, {schedule.num_micro_batches} micro-batches, "
        f"bubble {timing.bubble_share:.1%}, peak {max(timing.peak_activations):g}"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{top + len(lanes) * height + 44}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="22" font-size="15">{escape(title)}</text>',
        f'<text x="{left + total_s * per_s + 12:.1f}" y="{top - 8}">peak</text>',
    ]
    rank = 0
    for row, (name, cells) in enumerate(lanes):
        y = top + row * height
        parts.append(f'<text x="{left - 10}" y="{y + 17}" text-anchor="end">{name}</text>')
        parts.append(
            f'<rect x="{left}" y="{y + 1}" width="{total_s * per_s:.1f}" height="{height - 2}" fill="#f1f1f1"/>'
        )
        if name != "copy":
            peak = timing.peak_activations[rank]
            parts.append(f'<text x="{left + total_s * per_s + 12:.1f}" y="{y + 17}">{peak:g}</text>')
            rank += 1
        for start, end, action, label in cells:
            x, w = left + start * per_s, (end - start) * per_s
            parts.append(
                f'<rect x="{x:.1f}" y="{y + 1}" width="{w:.1f}" height="{height - 2}" fill="{_colour(action, label)}" '
                f'stroke="white"><title>{action} {start:g} to {end:g}</title></rect>'
            )
            parts.append(f'<text x="{x + w / 2:.1f}" y="{y + 17}" text-anchor="middle">{label}</text>')
    x, y = float(left), top + len(lanes) * height + 14
    kinds = {cell[2].kind for _, cells in lanes for cell in cells}
    for kind, colours in _COLOURS.items():
        if kind in kinds:
            parts.append(f'<rect x="{x:.0f}" y="{y}" width="12" height="12" fill="{colours[0]}"/>')
            parts.append(f'<text x="{x + 16:.0f}" y="{y + 10}">{_MEANING[kind]}</text>')
            x += 36 + 7 * len(_MEANING[kind])
    return "\n".join([*parts, "</svg>"]) + "\n"


_MEANING: dict[Kind, str] = {
    Kind.F: "F forward",
    Kind.B: "B backward",
    Kind.I: "I input gradient",
    Kind.W: "W weight gradient",
    Kind.R: "R recompute",
    Kind.SAVE: "S copy away",
    Kind.LOAD: "L copy back",
}
