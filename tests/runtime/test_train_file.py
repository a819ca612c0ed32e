import pytest
from typer.testing import CliRunner

from outgrow.runtime.cli import app
from outgrow.runtime.train_file import load_function, split_arguments

SOURCE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

class Model(nn.Linear):
    pass

def run():
    data = TensorDataset(torch.ones(8, 2), torch.ones(8, 1))
    return dict(model=Model(2, 1), data=data, loss=nn.functional.mse_loss, steps=3, batch_size=4, workers=0,
                storage_path=__file__ + ".runs", progress=False)

def nothing():
    return None

def wrong():
    return run() | {"learning_rate": 1}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a folder" / "my_job.py"
    path.parent.mkdir()
    path.write_text(SOURCE)
    return path


def test_trains_what_the_function_says_with_options_on_top(file):
    answer = CliRunner().invoke(app, ["train", f"{file}:run", "--name", "mine", "--memory", "64GiB"])
    assert answer.exit_code == 0, answer.output
    assert "Result(3 steps" in answer.output
    assert (file.parent / "my_job.py.runs" / "mine" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", "must return a dict of train's arguments, got NoneType"),
        ("wrong", "unknown arguments: learning_rate; known are model, data"),
        ("absent", "has no function 'absent'; it has run, nothing, wrong"),
        ("not a name", "give the target as FILE.py:NAME"),
    ],
)
def test_mistakes_end_the_command_with_one_message(file, name, words):
    answer = CliRunner().invoke(app, ["train", f"{file}:{name}"])
    assert answer.exit_code == 1
    assert words in answer.output
    assert "Traceback" not in answer.output


def test_arguments_are_told_apart():
    given = {"workers": 2, "model": 1, "steps": 3, "name": "x"}
    assert split_arguments(given) == ({"workers": 2, "name": "x"}, {"model": 1, "steps": 3})


def test_two_files_of_one_name(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "twin.py").write_text(f"def run(): return {folder!r}\n")
    assert [load_function(f"{tmp_path / folder / 'twin.py'}:run")() for folder in ("one", "two")] == ["one", "two"]
