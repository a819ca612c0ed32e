"""What the case `pipelines` makes of measurements; the measurements themselves are real runs of `outgrow perf`."""

from typing import Any

import pytest

from outgrow.perf.case_pipelines import figures_of, run
from outgrow.perf.contestants import StepReport
from outgrow.perf.suite import Options


def reports(seconds: float, loss: float = 9.0) -> list[list[StepReport]]:
    return [[StepReport(seconds, loss, 2**20), StepReport(seconds / 2, loss, 3 * 2**20)]] * 3


def found(**changes: Any) -> dict[str, Any]:
    measured = {"outgrow zb-v": reports(2.0), "torch zb-v": reports(2.5), "outgrow auto": reports(1.9)}
    times = {
        "outgrow zb-v": [[(1.9, 2.0, 98, 100.0), (1.5, 2.0, 51, 50.0)]] * 3,
        "torch zb-v": [[(0.0, 0.0, 0, 0.0)] * 2] * 3,
    }
    arguments: dict[str, Any] = {"measured": measured, "times": times, "remarks": dict.fromkeys(measured, "cut")}
    return {figure.name: figure for figure in figures_of("S", 2000, **(arguments | changes))}


def test_ratios_are_of_the_slowest_rank_and_the_simulation_is_of_the_last_to_end() -> None:
    figures = found()
    assert figures["outgrow zb-v"].median == 1000
    assert figures["outgrow zb-v"].note == "RSS 3 MiB, cut"
    assert figures["outgrow zb-v / torch zb-v"].samples == (1.25,) * 3
    assert figures["outgrow zb-v, measured / simulated"].median == pytest.approx(0.95)
    assert figures["outgrow zb-v, activations kept / table"].median == pytest.approx(1.02)
    assert figures["auto / the best of all"].median == pytest.approx(2.0 / 1.9)
    assert all(figure.is_met is not False for figure in figures.values())


def test_a_slower_step_and_another_loss_are_seen() -> None:
    slow = {"outgrow zb-v": reports(2.6, 9.1), "torch zb-v": reports(2.5)}
    figures = found(measured=slow, times={"outgrow zb-v": [[(2.3, 2.0, 54, 50.0)]]}, remarks=dict.fromkeys(slow, ""))
    missed = {name for name, figure in figures.items() if figure.is_met is False}
    assert missed == {
        "outgrow zb-v / torch zb-v",
        "losses differ by",
        "outgrow zb-v, measured / simulated",
        "outgrow zb-v, activations kept / table",
    }


def test_other_configurations_are_refused() -> None:
    with pytest.raises(ValueError, match="on configuration S, not M"):
        run(Options(configs=("M",)), lambda line: None)
