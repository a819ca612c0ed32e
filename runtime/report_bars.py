"""Spans as bars that can be seen: what is narrower than a line's width is drawn together with its neighbours.

Owns the merging, pure. Does not draw.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from ..memory.timeline import Span
from ..parallel.actions import Action, Kind

__all__ = ["Bar", "bars"]


@dataclass(frozen=True, slots=True)
class Bar:
    """From one second to another, in the colour of a kind of action."""

    start_s: float
    end_s: float
    kind: Kind


def bars(spans: Iterable[Span], least_s: float) -> list[Bar]:
    """The bars of one lane, in order of time.

    A span of `least_s` or longer is a bar of its own, but for those of one kind that are shorter than four times that
    and follow each other at once: their borders would be a haze. Shorter ones that lie within `least_s` of each other
    are one bar, of the kind that takes most of it. So a lane has no more than twice as many bars as `least_s` fits into
    the step, and one, however many spans there are; and no bar begins or ends elsewhere than a span.
    """
    found: list[Bar] = []
    group: list[tuple[Span, Kind]] = []

    def close() -> None:
        if group:
            found.append(_merged(group))
            group.clear()

    for span in sorted(spans, key=lambda span: (span.start_s, span.end_s)):
        kind = Action.parse(span.action).kind
        if span.seconds >= least_s:
            close()
            found.append(Bar(span.start_s, span.end_s, kind))
            continue
        if group and span.end_s - group[0][0].start_s > least_s:
            close()
        group.append((span, kind))
    close()
    return _joined(found, least_s)


def _joined(found: list[Bar], least_s: float) -> list[Bar]:
    result: list[Bar] = []
    is_last_narrow = False  # whether the last one is made of narrow bars
    for bar in found:
        is_narrow = bar.end_s - bar.start_s < 4 * least_s
        follows = bool(result) and bar.kind is result[-1].kind and bar.start_s - result[-1].end_s < least_s / 8
        if follows and is_last_narrow and is_narrow:
            result[-1] = Bar(result[-1].start_s, bar.end_s, bar.kind)
        else:
            result.append(bar)
            is_last_narrow = is_narrow
    return result


def _merged(group: list[tuple[Span, Kind]]) -> Bar:
    seconds: dict[Kind, float] = {}
    for span, kind in group:
        seconds[kind] = seconds.get(kind, 0.0) + span.seconds
    end_s = max(span.end_s for span, _ in group)
    return Bar(group[0][0].start_s, end_s, max(seconds, key=lambda kind: seconds[kind]))
