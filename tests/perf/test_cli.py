import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from outgrow.perf import curve, suite
from outgrow.perf.cli import app
from outgrow.perf.figures import Figure, Target
from outgrow.perf.suite import CASES, Case, Findings, Options, Report

RUNNER = CliRunner()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Options]]:
    """Cases that measure nothing, and a list of what was asked of them."""
    asked: list[tuple[str, Options]] = []

    def run(case: Case, options: Options, say: object) -> Findings:
        asked.append((case.name, options))
        return Findings((Figure("S", "speed", "ratio", (1.0, 1.2, 1.1), Target(low=1.0)),))

    monkeypatch.setattr(suite.Case, "run", run)
    return asked


def test_every_case_is_a_command_and_listed() -> None:
    listed = RUNNER.invoke(app, ["--list"])
    assert listed.exit_code == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()] == [case.name for case in CASES]
    commands = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert commands == {case.name for case in CASES} | {"curve"}


def test_the_defaults_are_the_case_s_own(measured: list[tuple[str, Options]]) -> None:
    for case in CASES:
        assert RUNNER.invoke(app, [case.name]).exit_code == 0
    assert measured == [(case.name, case.default) for case in CASES]


def test_options_reach_the_case_and_the_report_is_stored(measured: list[tuple[str, Options]], tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    arguments = ["step", "--config", "S", "--rounds", "3", "--warmup", "0", "--no-extras", "--json", str(path)]
    result = RUNNER.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "met" in result.stdout
    options = Options(num_rounds=3, num_warmup=0, configs=("S",), with_extras=False)
    assert measured == [("step", options)]
    report = Report.from_json(path.read_text())
    assert (report.case, report.options, report.figures[0].median) == ("step", options, 1.1)


def test_a_failure_is_a_message_and_an_exit_status() -> None:
    result = RUNNER.invoke(app, ["step", "--config", "XXL"])
    assert result.exit_code == 1
    assert "no configuration 'XXL'; there are S, M" in result.stderr
    assert "Traceback" not in result.output


def test_curve_draws_what_both_trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(curve, "train_both", lambda steps, say: {"a": [3.0] * steps, "b": [2.0] * steps})
    png = tmp_path / "loss.png"
    result = RUNNER.invoke(app, ["curve", "--png", str(png), "--steps", "4"])
    assert result.exit_code == 0, result.output
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "b: loss 2.0000 at the first step" in result.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["--list"], ["step", "--help"]])
def test_help_loads_neither_torch_nor_ray(arguments: list[str]) -> None:
    code = (
        "import sys; from outgrow.perf.cli import app\n"
        f"try: app({arguments!r})\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'ray', 'numpy', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout
