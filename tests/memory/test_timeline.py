"""The record of a step, and its form for trace viewers."""

import json

import pytest

from outgrow.memory.timeline import Span, Timeline, chrome_trace, timelines_from

SPANS = (
    Span("compute", "F0.0", 0.0, 0.5),
    Span("net", "GATHER c1.0", 0.25, 1.0, 4096),
    Span("compute", "B0.0", 1.0, 1.75),
    Span("net", "REDUCE c1.0", 1.75, 2.0, 4096),
)


def test_seconds_lanes_and_busy_time():
    timeline = Timeline(SPANS)
    assert timeline.seconds == 2.0
    assert timeline.lanes() == ("compute", "net")
    assert timeline.busy_s("compute") == 1.25
    assert timeline.busy_s("net") == 1.0
    assert timeline.busy_s("read") == 0.0
    assert SPANS[1].seconds == 0.75


def test_a_step_ends_with_the_last_end_not_with_the_last_start():
    assert Timeline((Span("net", "REDUCE c0", 0.0, 9.0), Span("compute", "F0.0", 1.0, 2.0))).seconds == 9.0


def test_a_step_without_actions_takes_no_time():
    assert Timeline(()).seconds == 0.0
    assert Timeline(()).lanes() == ()
    assert chrome_trace([Timeline(())])["traceEvents"] == [
        {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "rank 0"}}
    ]


def test_a_trace_has_a_process_per_rank_and_a_thread_per_lane():
    events = chrome_trace([Timeline(SPANS, rank=0), Timeline(SPANS[:1], rank=3)])["traceEvents"]
    assert isinstance(events, list)
    names = {(e["name"], e["pid"], e.get("tid"), e["args"]["name"]) for e in events if e["ph"] == "M"}
    assert names == {
        ("process_name", 0, None, "rank 0"),
        ("thread_name", 0, 0, "compute"),
        ("thread_name", 0, 1, "net"),
        ("process_name", 3, None, "rank 3"),
        ("thread_name", 3, 0, "compute"),
    }
    spans = [e for e in events if e["ph"] == "X"]
    assert len(spans) == 5
    gather = next(e for e in spans if e["name"] == "GATHER c1.0")
    assert gather == {
        "ph": "X",
        "name": "GATHER c1.0",
        "cat": "GATHER",
        "pid": 0,
        "tid": 1,
        "ts": 250000.0,
        "dur": 750000.0,
        "args": {"num_bytes": 4096},
    }
    assert {e["cat"] for e in spans} == {"F", "B", "GATHER", "REDUCE"}


def test_a_saved_trace_is_json_of_the_same_events(tmp_path):
    timeline = Timeline(SPANS, {"host": 10}, rank=2)
    timeline.save(tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text()) == timeline.to_chrome()
    assert timeline.to_chrome()["displayTimeUnit"] == "ms"


def test_a_trace_gives_its_timelines_back():
    text = json.dumps(chrome_trace([Timeline(SPANS, {"host": 10}), Timeline((), rank=1), Timeline(SPANS[:1], rank=3)]))
    assert timelines_from(json.loads(text)) == [Timeline(SPANS), Timeline((), {}, 1), Timeline(SPANS[:1], {}, 3)]


@pytest.mark.parametrize("trace", [{}, {"traceEvents": [{"ph": "X", "pid": 0, "tid": 4, "ts": 1, "dur": 1}]}, [1]])
def test_other_traces_are_refused(trace):
    with pytest.raises(ValueError, match="this is no trace of a step"):
        timelines_from(trace)
