"""The commands: what they print, write and refuse; what they do not import."""

import json
import subprocess
import sys
from pathlib import Path

import typer
from typer.testing import CliRunner

from outgrow.scheduler.pipelines import NAMES
from outgrow.scheduler.schedule_cli import app

mounted = typer.Typer()
mounted.add_typer(app, name="schedule")


@mounted.callback()
def _main() -> None:
    pass


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(mounted, ["schedule", *words])
    return result.exit_code, result.output


def test_json_is_all_there_is() -> None:
    code, text = run("v-min", "--stages", "4", "--micro-batches", "8", "--json")
    data = json.loads(text)
    assert code == 0
    assert data["placement"] == [0, 1, 2, 3, 3, 2, 1, 0]
    assert data["bubble"] <= 5.5
    assert data["peak_activations"] == [2.0] * 4
    assert [len(order) for order in data["orders"]] == [48] * 4


def test_drawing_and_picture(tmp_path: Path) -> None:
    file = tmp_path / "out.svg"
    code, text = run("zb-v", "--stages", "2", "--micro-batches", "4", "--svg", str(file))
    assert code == 0
    assert "d0" in text
    assert "0.0%" in text
    assert file.read_text().startswith("<svg")


def test_times_chunks_and_limits() -> None:
    code, text = run(
        "interleaved", "--stages", "2", "--micro-batches", "4", "--chunks", "3", "--times", "1", "2", "3", "--json"
    )
    assert code == 0
    assert len(json.loads(text)["placement"]) == 6
    code, text = run("auto", "--stages", "4", "--micro-batches", "8", "--memory-limit", "3", "--json")
    assert code == 0
    assert max(json.loads(text)["peak_activations"]) <= 3


def test_every_name_is_a_command() -> None:
    code, text = run("--help")
    assert code == 0
    assert all(name in text for name in (*NAMES, "table"))


def test_mistakes_say_what_to_do() -> None:
    code, text = run("gpipe", "--stages", "2", "--micro-batches", "8", "--memory-limit", "4")
    assert code == 2
    assert "more than the limit" in " ".join(text.replace("│", " ").split())
    assert run("zb-x", "--stages", "2", "--micro-batches", "8")[0] == 2
    assert run("gpipe", "--stages", "0", "--micro-batches", "8")[0] == 2


def test_table() -> None:
    code, text = run("table", "--stages", "2")
    assert code == 0
    assert "1.5/2.5 (1.5/2.5)" in text


def test_neither_torch_nor_ray_is_loaded() -> None:
    code = "import sys; import outgrow.scheduler.schedule_cli; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
