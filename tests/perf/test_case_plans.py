"""The cases `predict` and `choose`: the verdicts, the space of plans, and a member that runs one of them."""

from pathlib import Path

import pytest

from outgrow.perf.case_choose import _verdict
from outgrow.perf.case_predict import _figures, _Tried
from outgrow.perf.member_plans import Outlook, engine, space
from outgrow.perf.rank import Rank
from outgrow.perf.suite import find_case
from outgrow.perf.zoo import ZOO
from outgrow.scheduler.plan import Plan


def outlook(seconds: float | None, peak_bytes: int = 100) -> Outlook:
    return Outlook("a plan", seconds, "" if seconds else "no room", peak_bytes, 1.0)


def test_errors_of_predictions_are_relative_to_what_was_measured() -> None:
    tried = [
        _Tried("gpt", 1, None, outlook(1.0), foretold, (1.0, 2.0, 4.0), 95)  # by the median of each step's own ratio
        for foretold in ((1.0, 1.0, 4.0), (1.1, 2.2, 9.0), (0.5, 1.0, 2.0), ())
    ]
    tried.append(_Tried("gpt", 2, 1.3, outlook(9.0), (2.0,), (2.0,), 110))
    found = {figure.name: figure for figure in _figures(tried)}
    assert found["plans whose seconds were predicted"].median == 4
    assert found["plans whose seconds were predicted"].is_met is False
    assert found["error of the step's seconds, median"].median == pytest.approx(0.05)
    assert found["error of the step's seconds, 95th percentile"].median == pytest.approx(0.5)
    assert found["peaks above the predicted one"].median == 1
    assert found["predicted peak above the measured one, most"].median == pytest.approx(100 / 95 - 1)
    assert found["error of the step's seconds, median, 2 ranks"].median == 0


def test_the_chosen_plan_is_held_against_the_best_round_by_round() -> None:
    outlooks = {"chosen": outlook(1.0), "0": outlook(None), "1": outlook(None)}
    seconds = {"chosen": [1.0, 1.1, 1.2], "0": [2.0, 2.0, 2.0], "1": [1.0, 1.0, 1.0]}
    found = _verdict("gpt, 1 ranks", 1 << 30, 36, outlooks, seconds)
    figures = {figure.name: figure for figure in found.figures}
    assert figures["step of the chosen plan / best of the space"].samples == (1.0, 1.1, 1.2)
    assert figures["step of the chosen plan / best of the space"].is_met is False
    assert figures["worst of the space / best"].median == 2
    assert "budget 1024 MiB: chosen in 1.0 s: a plan: 1.100 s, predicted 1.000 s" in found.notes[0]


def test_the_space_is_whole_and_a_plan_of_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from outgrow.perf import member_plans
    from outgrow.perf.models import CONFIGS
    from outgrow.perf.zoo import _gpt

    monkeypatch.setitem(ZOO, "tiny", _gpt(CONFIGS["tiny"]))
    monkeypatch.setattr(member_plans, "MICRO_BATCHES", 2)
    found = space(Rank(0, 1), "tiny", str(tmp_path)).space()
    assert len(set(found.plans)) == 36 == len(found.peaks_bytes)
    assert {Plan.from_json(text).uses_disk for text in found.plans} == {False, True}
    member = engine(Rank(0, 1), "tiny", str(tmp_path), found.plans[-1], budget_bytes=2 * max(found.peaks_bytes))
    try:
        said = member.outlook()
        assert said.words.startswith("parameters and optimizer on disk")
        step = member.step(0)
        assert step.seconds > 0
        assert 0 < step.peak_bytes <= 1.2 * said.peak_bytes
    finally:
        member.close()


def test_the_zoo_has_four_models_that_start_alike() -> None:
    assert len(ZOO) >= 4
    for exhibit in ZOO.values():
        one, other = exhibit.build().state_dict(), exhibit.build().state_dict()
        assert all(bool((value == other[name]).all()) for name, value in one.items())
    assert find_case("predict").default.num_rounds >= 3
    assert find_case("choose").default.num_rounds >= 5
