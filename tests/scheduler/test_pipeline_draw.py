"""Drawings: words, the coloured grid, the picture."""

from io import StringIO
from xml.etree import ElementTree

from rich.console import Console

from outgrow.scheduler.pipeline_data import StageCosts
from outgrow.scheduler.pipeline_draw import grid, rows, summary, svg
from outgrow.scheduler.pipeline_timing import simulate
from outgrow.scheduler.pipelines import schedule


def test_the_grid_is_to_scale() -> None:
    timing = simulate(schedule("1f1b", 2, 2))
    assert grid(timing).plain.splitlines() == [
        "  d0 F0  F1  ········B0      ····B1      ",
        "  d1 ····F0  B0      F1  B1      ",
    ]


def test_a_narrow_grid_drops_numbers_before_letters() -> None:
    lines = grid(simulate(schedule("zb-v", 4, 12)), width=60).plain.splitlines()
    assert max(map(len, lines)) <= 62
    assert not any(character.isdigit() for character in lines[0][5:])
    assert lines[0][5:].startswith("FFF")


def test_chunks_have_colours_of_their_own() -> None:
    text = grid(simulate(schedule("interleaved", 2, 2)))
    colours = {text.plain[span.start]: str(span.style) for span in text.spans if span.end > span.start}
    assert len({colours[letter] for letter in "FfBb"}) == 4


def test_copies_have_a_row() -> None:
    timing = simulate(schedule("pipeoffload-full", 2, 2))
    assert [line[:4].strip() for line in grid(timing).plain.splitlines()] == ["d0", "copy", "d1", "copy"]
    assert len(rows(timing)) == 2


def test_the_picture_shows_every_action_bubble_and_peaks() -> None:
    costs = StageCosts.equal(2, 1.0, 1.2, 0.8)
    timing = simulate(schedule("zb-v", 2, 4, costs), costs)
    root = ElementTree.fromstring(svg(timing))
    titles = [element.text for element in root.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 3 * 4 * 4
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert any(word and f"bubble {timing.bubble_share:.1%}, peak 2" in word for word in words)
    assert {"d0", "d1", "F0", "f0", "W input gradient", "I input gradient"} - set(words) == {"W input gradient"}


def test_the_summary_has_share_and_peaks() -> None:
    console = Console(width=100, file=StringIO())
    console.print(summary(simulate(schedule("1f1b", 4, 4)), " s"))
    text = " ".join(console.file.getvalue().split())
    assert "1f1b: 4 ranks, 4 micro-batches" in text
    assert "42.9% (9 of 21 s)" in text
    assert "peak activations 4 3 2 1" in text
