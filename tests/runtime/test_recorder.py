import json

import pytest

from outgrow.runtime.config import RuntimeConfig, TrainConfig
from outgrow.runtime.events import Drifted, Finished, MemoryHeld, Rows, Started
from outgrow.runtime.recorder import Recorder
from outgrow.runtime.run_folder import RunFolder
from outgrow.scheduler.drift import Drift, Overrun
from outgrow.scheduler.plan import Plan

PLAN = Plan(2, 3, 1, "float32", False, 1, ())


@pytest.fixture
def recorder(tmp_path):
    return Recorder(RunFolder(tmp_path, "run"), RuntimeConfig(workers=2), TrainConfig(steps=3, seed=7))


def row(step, loss):
    return {"step": step, "loss": loss, "tokens_per_s": 10.0 * step}


def test_events_become_files_and_a_summary(tmp_path, recorder):
    for rank in (1, 0):
        recorder.send(Started(rank, 2, 3, {"host": 9}, 100 + rank, PLAN))
        recorder.send(MemoryHeld(rank, 1, {"host": 500 + rank}))
    recorder.send(Rows((row(1, 3.0), row(2, 2.0))))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [row(1, 3.0), row(2, 2.0)]  # there before the run has ended
    recorder.send(Rows((row(3, 1.0),)))
    recorder.send(Finished(1, None, {"param": 4}))
    assert not (tmp_path / "run" / "timeline.json").exists()
    recorder.send(Finished(0, {"traceEvents": []}, {"param": 4}))
    summary = recorder.finish("finished")
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == summary
    assert (summary["loss_first"], summary["loss_last"], summary["num_steps"]) == (3.0, 1.0, 3)
    assert summary["tokens_per_s"] == 20
    assert summary["peak_bytes"] == {"0": {"host": 500}, "1": {"host": 501}}
    assert summary["base_bytes"] == {"0": 100, "1": 101}
    assert summary["state_bytes"] == {"0": {"param": 4}, "1": {"param": 4}}
    assert summary["arguments"]["seed"] == 7
    assert summary["versions"]["torch"].startswith("2.")
    assert Plan.from_json((tmp_path / "run" / "plan.json").read_text()) == recorder.plan == PLAN
    assert (tmp_path / "run" / "timeline.json").exists()


def test_a_run_that_fails_before_its_first_step_has_a_result_too(recorder):
    summary = recorder.finish("failed", "KeyError: boom")
    assert (summary["status"], summary["error"], summary["loss_last"]) == ("failed", "KeyError: boom", None)


def test_drifts_are_in_the_summary_and_in_the_log_where_nothing_shows_them(tmp_path, recorder, caplog):
    recorder.send(Drifted(1, Drift(30, 21, "read", 0.5, 1.05, ("write",))))
    recorder.send(Drifted(0, Overrun(31, "host", 100, 200)))
    drift, overrun = recorder.finish("finished")["drifts"]
    assert (drift["rank"], drift["lane"], drift["since_step"], drift["others"]) == (1, "read", 21, ["write"])
    assert drift["words"].startswith("since step 21 disk reads take 2.1 times")
    assert (overrun["rank"], overrun["tier"], overrun["measured_bytes"]) == (0, "host", 200)
    assert [record.getMessage()[:28] for record in caplog.records] == [
        "rank 1: since step 21 disk r",
        "rank 0: in step 31 the host ",
    ]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["drifts"][0]["words"] == drift["words"]
