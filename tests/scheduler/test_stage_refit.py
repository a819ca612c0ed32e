import pytest

from outgrow.memory.timeline import Span
from outgrow.scheduler.pipeline_program import Stages
from outgrow.scheduler.stage_refit import costs_of_spans, seconds_of_spans

STAGES = Stages((0, 2), 3, (0, 1), (False, True))


def span(action: str, seconds: float, lane: str = "compute") -> Span:
    return Span(lane, action, 10.0, 10.0 + seconds)


def test_seconds_are_medians_of_a_stages_actions():
    first = [span(f"F{run}.{number}", 1.0 + number) for run in (0, 1) for number in (0, 1, 2)]
    first += [
        span("I1.0", 3.0),
        span("I0.0", 1.0),
        span("W1.0", 0.5),
        span("SEND_F s0.0", 0.25, "net"),
        span("NORM", 9.0),
    ]
    found = seconds_of_spans(first, STAGES)
    assert found == pytest.approx({"F0": 4.0, "I0": 4.0, "W0": 0.5, "SEND": 0.25})
    second = seconds_of_spans([span("F2.0", 2.0), span("B2.0", 5.0)], STAGES)
    costs = costs_of_spans([found, second], 2)
    assert costs.forward_s == (4.0, 2.0)
    assert costs.input_s == (4.0, 5.0)
    assert costs.weight_s == (0.5, 0.0)
    assert costs.comm_s == 0.5
