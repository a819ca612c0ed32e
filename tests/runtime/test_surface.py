"""The public surface, frozen: a change here is a change that users see."""

import inspect
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

import outgrow
from outgrow.runtime.cli import app

RUNNER = CliRunner()


def test_names():
    assert sorted(outgrow.__all__) == ["Callback", "Engine", "Memory", "OutgrowError", "Result", "Runtime"]
    for name in outgrow.__all__:
        assert getattr(outgrow, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Trainer'; it has Callback"):
        outgrow.Trainer  # noqa: B018


def test_runtime_arguments():
    assert arguments(outgrow.Runtime) == {
        "workers": 1,
        "memory": None,
        "address": None,
        "resources_per_worker": None,
        "placement_strategy": "PACK",
        "storage_path": None,
        "name": None,
        "progress": True,
        "plan": None,
    }


def test_train_arguments():
    assert arguments(outgrow.Runtime.train) == {
        "model": inspect.Parameter.empty,
        "data": inspect.Parameter.empty,
        "loss": None,
        "optimizer": None,
        "lr_scheduler": None,
        "batch_size": 32,
        "shuffle": False,
        "micro_batches": 1,
        "steps": 1000,
        "epochs": None,
        "clip_grad_norm": None,
        "precision": "float32",
        "zero": None,
        "callbacks": (),
        "forward": None,
        "seed": 0,
        "units": None,
        "init": None,
        "weights": None,
        "offload": None,
        "activations": None,
        "order": None,
        "pipeline": None,
        "schedule": None,
        "chunks": None,
        "stages": None,
    }


def test_result_and_callback():
    assert public(outgrow.Result) == ["metrics", "path", "plan", "report", "state_dict", "summary"]
    assert public(outgrow.Callback) == ["on_end", "on_error", "on_start", "on_step"]


def test_commands_and_options():
    root = typer.main.get_command(app)
    found = {
        name: sorted(option for p in command.params for option in p.opts) for name, command in root.commands.items()
    }
    assert found == {
        "demo": ["--steps", "--workers"],
        "doctor": ["--folder"],
        "perf": [],
        "plan": ["--disk", "--fresh", "--memory", "--out", "--workers", "target"],
        "report": ["--html", "run"],
        "schedule": [],
        "train": ["--disk", "--memory", "--name", "--workers", "target"],
    }


@pytest.mark.parametrize("command", [[], ["demo"], ["train"], ["plan"], ["doctor"], ["report"]])
def test_help_answers_without_torch_or_ray(command):
    code = (
        "import sys; from outgrow.runtime.cli import app\n"
        f"try: app({[*command, '--help']!r})\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'ray'} & set(sys.modules), 'loaded too much'"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert "Usage: " in answer.stdout


def test_version():
    assert RUNNER.invoke(app, ["--version"]).output.strip() == f"outgrow {outgrow.__version__}"


def test_errors_for_users_have_no_traceback():
    answer = RUNNER.invoke(app, ["train", "nowhere.py:run"])
    assert answer.exit_code == 1
    assert "there is no file nowhere.py" in answer.output
    assert "Traceback" not in answer.output


def arguments(function):
    parameters = inspect.signature(function).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name != "self"}


def public(kind):
    names = set(vars(kind)) | set(getattr(kind, "__dataclass_fields__", {}))
    return sorted(name for name in names if not name.startswith("_"))
