"""`outgrow plan`: what would be done, why, and a file that runs as it stands."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from outgrow import Memory, Runtime
from outgrow.runtime.cli import app
from outgrow.runtime.plan_report import memory_chart
from outgrow.runtime.train_file import arguments_of
from outgrow.scheduler.plan import Plan
from outgrow.scheduler.prediction import TierPrediction

SOURCE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from outgrow import Memory

def run():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.GELU()) for _ in range(48)))
    data = TensorDataset(torch.ones(16, 512), torch.ones(16, 512))
    return dict(model=model, data=data, loss=nn.functional.mse_loss, steps=2, batch_size=8, micro_batches=2, workers=0,
                storage_path=__file__ + ".runs", progress=False)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "job.py"
    path.write_text(SOURCE)
    return path


def test_it_says_what_would_be_done_and_writes_what_runs(file: Path, tmp_path: Path) -> None:
    out, disk = tmp_path / "plan.json", tmp_path / "disk"
    disk.mkdir()
    base = Runtime(workers=0, progress=False, memory=Memory(disk=disk))  # the disk is measured where memory is ample
    _, for_train = arguments_of(f"{file}:run", None)
    needed = base.plan_for(**for_train).prediction
    assert needed is not None
    budget_mib = (needed.tiers[0].peak_bytes >> 20) - 80  # less than everything in memory takes
    arguments = ["plan", f"{file}:run", "--out", str(out), "--disk", str(disk), "--memory", f"{budget_mib}MiB"]
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 0, answer.output
    for words in ("Plan: ", "A step takes about", "host memory: ", "Seconds of a step by lane", "What more would buy",
                  "1 GiB more host memory", "twice the disk bandwidth", "chosen", "were refused",
                  " searching"):  # fmt: skip
        assert words in " ".join(answer.output.split()), words
    assert list(disk.iterdir()) == [], "nothing was written but the plan"
    assert not (tmp_path / "job.py.runs").exists()
    plan = Plan.from_json(out.read_text())
    # A little more: this very process has grown meanwhile.
    run = Runtime(**arguments_of(f"{file}:run", str(disk), memory=f"{budget_mib + 32}MiB")[0] | {"plan": out})
    result = run.train(**for_train)
    assert result.plan == plan
    predicted = json.loads((Path(result.path) / "prediction.json").read_text())
    assert predicted["tiers"][0]["budget_bytes"] == (budget_mib + 32) << 20
    assert result.metrics[-1]["peak_host_bytes"] <= (budget_mib + 32) << 20


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "."], "is a folder: give the plan's file"),
        (["--out", "nowhere/plan.json"], "there is no folder"),
        (["--memory", "1MiB"], "host budget"),
    ],
)
def test_mistakes_end_the_command_with_one_message(
    file: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(file.parent)
    answer = CliRunner().invoke(app, ["plan", f"{file}:run", *arguments])
    assert answer.exit_code == 1
    assert words in answer.output
    assert "Traceback" not in answer.output


def test_the_chart_shows_the_most_of_every_moment() -> None:
    tier = TierPrediction("host", 100, 200, ((0.0, 50), (1.0, 100), (2.0, 25)))
    rows = memory_chart(tier, 4.0)
    bars = [row[row.index("│") + 1 : -1] for row in rows if row.endswith("│")]
    columns = zip(*bars, strict=True)
    heights = [sum(" ▁▂▃▄▅▆▇█".index(block) for block in column) for column in columns]
    assert heights == [16] * 16 + [32] * 16 + [8] * 32, "of 64, which is the budget"
    assert "200 B" in rows[0]
    assert rows[-1].rstrip().endswith("4.00 s")
