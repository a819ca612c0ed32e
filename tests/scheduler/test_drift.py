"""When a run that does not go as predicted is reported, and as what."""

import random

import pytest

from outgrow.memory.timeline import Span, Timeline
from outgrow.scheduler.drift import LIMIT, WINDOW, Drift, DriftWatch, Overrun
from outgrow.scheduler.prediction import Prediction, TierPrediction

GIB = 1 << 30


def timeline(compute_s: float = 1.0, read_s: float = 0.5, **more_s: float) -> Timeline:
    lanes = {"compute": compute_s, "read": read_s} | {name.removesuffix("_s"): value for name, value in more_s.items()}
    spans = []
    for lane, seconds in lanes.items():  # two spans each, so that there is something to add up
        word = {"read": "READ c0:param", "write": "WRITE c0:param"}.get(lane, "F0.0")
        spans += [Span(lane, word, 0.0, 0.25 * seconds), Span(lane, word, 0.25 * seconds, seconds)]
    return Timeline(tuple(spans))


PREDICTION = Prediction(timeline(), {}, (TierPrediction("host", GIB, None, ((0.0, GIB),)),), ("u0",))


def found(*steps: Timeline, prediction: Prediction | None = PREDICTION) -> list[Drift | Overrun]:
    watch = DriftWatch(prediction)
    return [each for number, step in enumerate(steps, 1) for each in watch.note(number, step, {"host": GIB})]


def reads(*seconds: float) -> list[Timeline]:
    return [timeline(read_s=each) for each in seconds]


def test_a_run_as_predicted_is_silent() -> None:
    assert found(*reads(*[0.5] * 40)) == []


def test_without_a_prediction_nothing_is_said() -> None:
    assert found(*reads(*[9.0] * 40), prediction=None) == []


def test_a_disk_that_becomes_slower_is_reported_once_with_its_beginning() -> None:
    (drift,) = found(*reads(*[0.5] * 20, *[1.05] * 60))
    assert isinstance(drift, Drift)
    assert (drift.lane, drift.since_step, drift.predicted_s, drift.measured_s) == ("read", 21, 0.5, 1.05)
    assert 21 < drift.step <= 20 + WINDOW
    assert drift.words == (
        "since step 21 disk reads take 2.1 times what was predicted (1050.0 ms a step instead of 500.0 ms): a slower "
        "disk, or a busy neighbour"
    )


def test_what_was_wrong_from_the_beginning_is_reported_as_soon_as_there_are_enough_steps() -> None:
    (drift,) = found(*reads(*[1.0] * 30))
    assert (drift.step, drift.since_step) == (WINDOW + 1, 2), "the first step counts for nothing"


def test_the_first_step_alone_is_no_drift_and_neither_are_hiccups() -> None:
    assert found(*reads(30.0, *[0.5] * 30)) == []
    assert found(*reads(*[0.5, 0.5, 5.0] * 20)) == []


def test_the_limit_is_kept() -> None:
    assert found(*reads(*[0.5 * LIMIT] * 40)) == []
    assert len(found(*reads(*[0.5 * LIMIT * 1.01] * 40))) == 1


def test_noise_as_before_is_no_drift() -> None:
    """A lane that always spread widely is above the limit in some window sooner or later."""
    rng = random.Random(4)
    seconds = [0.5 * rng.choice((0.5, 0.8, 1.0, 1.15, 1.8)) for _ in range(400)]
    assert found(*reads(*seconds)) == []
    assert len(found(*reads(*seconds, *[each * 3 for each in seconds[:40]]))) == 1
    wide = [0.3, 0.9] * WINDOW + [rng.uniform(0.2, 1.0) for _ in range(400)]
    many = [wide[n : n + WINDOW] for n in range(2 * WINDOW, 400)]
    assert any(sum(each > 0.5 * LIMIT for each in window) > 0.75 * WINDOW for window in many), "it looks like a drift"
    assert found(*reads(*wide)) == []


def test_a_lane_that_does_not_matter_is_not_reported() -> None:
    prediction = Prediction(timeline(write_s=0.01), {}, (), ("u0",))
    slow = [timeline(write_s=0.04)] * 40
    assert found(*slow, prediction=prediction) == []
    assert len(found(*[timeline(write_s=0.4)] * 40, prediction=prediction)) == 1


def test_of_several_lanes_the_one_that_costs_most_is_named_first() -> None:
    (drift,) = found(*[timeline(compute_s=3.0, read_s=1.0)] * 40)
    assert isinstance(drift, Drift)
    assert (drift.lane, drift.others) == ("compute", ("read",))
    assert "computation takes 3.0 times what was predicted (3000.0 ms a step instead of 1000.0 ms); so" in drift.words
    assert "so do lanes read: a busy neighbour" in drift.words


def test_a_second_lane_is_reported_when_its_time_comes() -> None:
    steps = [*[timeline(read_s=1.0)] * 20, *[timeline(read_s=1.0, compute_s=2.0)] * 20]
    assert [each.lane for each in found(*steps) if isinstance(each, Drift)] == ["read", "compute"]


def test_a_lane_that_was_not_predicted_at_all_is_reported() -> None:
    (drift,) = found(*[timeline(net_s=0.5)] * 20)
    assert isinstance(drift, Drift)
    assert drift.lane == "net"
    assert "exchange between ranks takes 500.0 ms a step instead of 0.0 ms" in drift.words


@pytest.mark.parametrize("lane", ["compute", "read", "write", "net", "h2d", "d2h", "other"])
def test_every_lane_has_words(lane: str) -> None:
    words = Drift(9, 2, lane, 1.0, 2.0).words
    assert ("not known" in words) == (lane == "other")


def test_bytes_above_the_prediction_are_reported_at_once_and_once() -> None:
    watch = DriftWatch(PREDICTION)
    assert watch.note(1, timeline(), {"host": GIB}) == []
    (overrun,) = watch.note(2, timeline(), {"host": GIB + (GIB >> 1)})
    assert overrun == Overrun(2, "host", GIB, GIB + (GIB >> 1))
    assert overrun.words.startswith("in step 2 the host held 1.50 GiB, and 1.00 GiB were predicted to be the most")
    assert watch.note(3, timeline(), {"host": 2 * GIB}) == []
    assert DriftWatch(PREDICTION).note(1, timeline(), {"host": 2 * GIB}) != [], "also in the first step"


def test_what_is_remembered_is_bounded() -> None:
    watch = DriftWatch(PREDICTION)
    for number in range(1, 500):
        watch.note(number, timeline(), {})
    assert len(watch._steps) <= 100
