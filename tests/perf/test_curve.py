import os
from pathlib import Path

import pytest

from outgrow.perf.contestants import Contestant
from outgrow.perf.curve import CONTESTANTS, draw, train_both
from outgrow.perf.rank import Rank


class Counter:
    """Its loss is the number of the step."""

    def steps(self, first: int, count: int) -> list[float]:
        return [float(step) for step in range(first, first + count)]

    def close(self) -> None:
        pass


def counter(rank: Rank) -> Counter:
    return Counter()


def test_curves_hold_every_step_once_and_in_order() -> None:
    here = {"PYTHONPATH": os.path.dirname(__file__)}
    contestants = [Contestant(name, "test_curve:counter", environment=here) for name in ("a", "b")]
    expected = [float(step) for step in range(45)]
    assert train_both(45, contestants=contestants) == {"a": expected, "b": expected}


def test_both_train_on_the_same_text_and_model() -> None:
    assert [contestant.arguments["config"] for contestant in CONTESTANTS] == ["bytes", "bytes"]
    assert [contestant.arguments["data"] for contestant in CONTESTANTS] == ["text", "text"]


def test_the_figure_is_an_image_in_a_folder_that_is_made(tmp_path: Path) -> None:
    png = tmp_path / "docs" / "loss.png"
    draw({"plain": [3.0, 2.0, 1.5], "outgrow": [3.0, 2.0, 1.5]}, png)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert png.stat().st_size > 10_000


def test_curves_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two curves of one length"):
        draw({"plain": [1.0, 2.0], "outgrow": [1.0]}, tmp_path / "loss.png")
