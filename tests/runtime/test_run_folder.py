import json

import pytest

from outgrow.runtime.run_folder import RunFolder, fetch, is_uri, weights_target


def test_a_local_folder(tmp_path):
    folder = RunFolder(tmp_path / "a folder", "run")
    folder.write_json("plan.json", '{"a": 1}')
    folder.write_json("result.json", {"b": 2})
    with folder.open_append("metrics.jsonl") as file:
        file.write("{}\n")
    (folder.local / ".validate_storage_marker").touch()
    folder.finish()
    assert folder.path == tmp_path / "a folder" / "run"
    assert sorted(path.name for path in folder.path.iterdir()) == ["metrics.jsonl", "plan.json", "result.json"]
    assert json.loads((folder.path / "plan.json").read_text()) == {"a": 1}


def test_a_run_is_never_written_over(tmp_path):
    RunFolder(tmp_path, "run").write_json("plan.json", "{}")
    with pytest.raises(ValueError, match="exists already; give another name="):
        RunFolder(tmp_path, "run")
    uri = (tmp_path).as_uri()
    with pytest.raises(ValueError, match="exists already"):
        RunFolder(uri, "run")


def test_a_far_folder_is_staged_and_brought_home(tmp_path):
    folder = RunFolder((tmp_path / "far").as_uri(), "run")
    assert is_uri(str(folder.path))
    folder.write_json("plan.json", "{}")
    (folder.local / "logs").mkdir()
    (folder.local / "logs" / "one.log").write_text("line")
    assert not (tmp_path / "far" / "run").exists()
    folder.finish()
    assert (tmp_path / "far" / "run" / "logs" / "one.log").read_text() == "line"
    assert not folder.local.exists()
    with fetch(folder.path, "plan.json") as path:
        assert path.read_text() == "{}"


def test_a_uri_may_hold_spaces(tmp_path):
    folder = RunFolder(f"file://{tmp_path}/far runs", "run")
    folder.write_json("plan.json", "{}")
    folder.finish()
    assert (tmp_path / "far runs" / "run" / "plan.json").exists()


def test_weights_go_straight_to_a_local_folder_and_by_copy_to_a_far_one(tmp_path):
    with weights_target(str(tmp_path)) as path:
        assert path == tmp_path / "model.safetensors"
    with weights_target((tmp_path / "far").as_uri()) as path:
        path.write_text("weights")
    assert (tmp_path / "far" / "model.safetensors").read_text() == "weights"
