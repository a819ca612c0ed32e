import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from outgrow.perf.environment import Environment
from outgrow.perf.figures import Figure, Target
from outgrow.perf.suite import CASES, Case, Findings, Options, Report, find_case, render, run_case

ENVIRONMENT = Environment(
    cpu="Example 3000",
    num_cores=2,
    memory_bytes=8 * 2**30,
    kernel="Linux 6.1",
    python="3.11.7",
    packages={"torch": "2.13.0", "deepspeed": None},
    commit="0123456789ab",
    date="2026-01-02T03:04:05+00:00",
)
REPORT = Report(
    case="step",
    options=Options(num_rounds=3, num_warmup=1, configs=("S",)),
    environment=ENVIRONMENT,
    figures=(
        Figure("S", "DDP", "tokens/s", (990.0, 1000.0, 1010.0), note="peak RSS 1,100 MiB a rank"),
        Figure("S", "zero=1 / DDP", "ratio", (0.99, 1.01, 1.02), Target(low=1.0)),
        Figure("S", "zero=3 / DDP", "ratio", (0.9, 0.91, 0.97), Target(low=0.95)),
        Figure("M", "DeepSpeed", "tokens/s", (), note="missing: deepspeed"),
        Figure("M", "state", "bytes", (2.0 * 2**30,), Target(high=2.0 * 2**30)),
    ),
    notes=("Ratios are taken round by round.",),
)


def text_of(report: Report, width: int = 140) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(render(report))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def row(text: str, name: str) -> list[str]:
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines()]
    (found,) = [cells for cells in rows if cells[0] == name]
    return found


def test_json_round_trips() -> None:
    assert Report.from_json(REPORT.to_json()) == REPORT


def test_json_spells_out_what_is_derived() -> None:
    rows = json.loads(REPORT.to_json())["figures"]
    assert rows[0]["median"] == 1000.0
    assert rows[0]["spread"] == pytest.approx(0.02)
    assert [each["is_met"] for each in rows] == [None, True, False, None, True]
    assert rows[3]["median"] is None


def test_written_reports_can_be_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a folder" / "step.json"
    REPORT.write(path)
    assert Report.from_json(path.read_text()) == REPORT


def test_the_table_shows_target_measured_spread_and_verdict() -> None:
    text = text_of(REPORT)
    assert row(text, "DDP")[1:] == ["", "1,000 tokens/s", "2.0%", "", "peak RSS 1,100 MiB a rank"]
    assert row(text, "zero=1 / DDP")[1:5] == ["at least 1", "1.010", "3.0%", "met"]
    assert row(text, "zero=3 / DDP")[1:5] == ["at least 0.95", "0.910", "7.7%", "NOT MET"]
    assert row(text, "DeepSpeed")[1:] == ["", "-", "", "not measured", "missing: deepspeed"]
    assert row(text, "state")[2] == "2,048.0 MiB"
    assert REPORT.num_missed == 1


def test_the_table_comes_with_where_and_how() -> None:
    text = text_of(REPORT, width=400)
    assert "Example 3000, 2 cores, 8.0 GiB, Linux 6.1; Python 3.11.7, torch 2.13.0; commit 0123456789ab" in text
    assert "spread = (max - min) / median" in text
    assert "Ratios are taken round by round." in text


def test_running_a_case_passes_its_options_and_stores_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []

    def measure(case: Case, options: Options, say: object) -> Findings:
        assert callable(say)
        say(f"{case.name} with {options.num_rounds} rounds")
        return Findings((Figure("g", "n", "ratio", (1.0,)),), ("note",))

    monkeypatch.setattr(Case, "run", measure)
    report = run_case(Case("made-up", "", ".nowhere"), Options(num_rounds=4), heard.append)
    assert (report.case, report.notes[0], heard) == ("made-up", "note", ["made-up with 4 rounds"])
    assert "% of the processor time that was asked for" in report.notes[1]
    assert report.environment.python


def test_every_case_has_a_module_that_runs_it() -> None:
    from importlib import import_module

    assert [case.name for case in CASES] == [
        "step",
        "memory",
        "collectives",
        "disk",
        "offload",
        "budgets",
        "pipelines",
        "predict",
        "choose",
        "scale",
    ]
    for case in CASES:
        assert callable(import_module(f"outgrow.perf{case.module}").run)
        assert case.summary


def test_unknown_cases_are_refused_with_those_that_exist() -> None:
    assert find_case("memory").name == "memory"
    with pytest.raises(ValueError, match="no case 'stpe'; there are step, memory, collectives"):
        find_case("stpe")


def test_options_that_measure_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 round"):
        Options(num_rounds=0)
    with pytest.raises(ValueError, match="fewer than 0"):
        Options(num_warmup=-1)
    with pytest.raises(ValueError, match="at least one configuration"):
        Options(configs=())
