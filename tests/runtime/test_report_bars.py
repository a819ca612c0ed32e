"""Bars of a lane: no more than can be seen, and nothing that was not there."""

import random
from itertools import pairwise

from outgrow.memory.timeline import Span
from outgrow.parallel.actions import Kind
from outgrow.runtime.report_bars import Bar, bars


def test_spans_that_can_be_seen_stay_as_they_are() -> None:
    spans = [Span("compute", "F0.0", 0.0, 1.0), Span("compute", "B0.0", 1.0, 3.0), Span("compute", "B1.0", 3.0, 5.0)]
    expected = [Bar(0.0, 1.0, Kind.F), Bar(1.0, 3.0, Kind.B), Bar(3.0, 5.0, Kind.B)]
    assert bars(spans, 0.1) == expected
    assert bars(reversed(spans), 0.1) == expected


def test_small_neighbours_are_one_bar_of_what_takes_most_of_it() -> None:
    spans = [
        Span("compute", "F0.0", 0.0, 0.2),
        Span("compute", "B0.0", 0.2, 0.6),
        Span("compute", "F1.0", 0.7, 0.8),
        Span("compute", "F2.0", 3.0, 3.1),
    ]
    assert bars(spans, 1.0) == [Bar(0.0, 0.8, Kind.B), Bar(3.0, 3.1, Kind.F)]


def test_borders_between_narrow_bars_of_one_kind_are_left_out() -> None:
    spans = [Span("read", f"READ c{n}:param", 2.0 * n, 2.0 * n + 2.0) for n in range(5)]
    assert bars(spans, 1.0) == [Bar(0.0, 10.0, Kind.READ)]
    assert len(bars(spans, 0.5)) == 5
    apart = [Span("read", f"READ c{n}:param", 2.0 * n, 2.0 * n + 1.5) for n in range(5)]
    assert len(bars(apart, 1.0)) == 5


def test_however_many_spans_there_are_the_bars_are_few_and_in_order() -> None:
    rng = random.Random(5)
    for _ in range(12):
        now, spans = 0.0, []
        for number in range(3000):
            begin = now + rng.choice((0.0, 0.0, rng.random()))
            now = begin + rng.choice((0.01, 0.3, rng.random() * rng.choice((1, 20))))
            spans.append(Span("compute", f"{rng.choice('FB')}{number}.0", begin, now))
        least_s = now / rng.choice((50, 700))
        found = bars(spans, least_s)
        assert len(found) <= 2 * now / least_s + 1
        assert {bar.start_s for bar in found} <= {span.start_s for span in spans}
        assert {bar.end_s for bar in found} <= {span.end_s for span in spans}
        assert all(before.end_s <= after.start_s for before, after in pairwise(found))
        assert (found[0].start_s, found[-1].end_s) == (spans[0].start_s, spans[-1].end_s)
