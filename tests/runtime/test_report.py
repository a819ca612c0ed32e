"""The report of a run: what it reads, what it says, and the page's parts, parsed."""

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_runs import write_run
from typer.testing import CliRunner

from outgrow.runtime.cli import app
from outgrow.runtime.report import read_report
from outgrow.runtime.result import Metrics, Result
from outgrow.scheduler.compare import compare
from outgrow.scheduler.plan import Plan

SVG = "{http://www.w3.org/2000/svg}"
VOID = {"meta", "link"}
PICTURES = ["lanes", "memory", "lane bars", "unit bars", "steps"]


class Page(HTMLParser):
    """The parts of a page, with a check that every tag is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.loads: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open
        self.svgs = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.loads.append("script")
        self.loads += [value or "" for name, value in attrs if name in ("src", "href") and tag != "use"]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Nothing is left open."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open:
            self.texts.append((self.open[-1], data.strip()))

    def of(self, tag: str) -> list[str]:
        return [text for each, text in self.texts if each == tag]

    def words_in(self, picture: str) -> list[str]:
        (svg,) = [svg for svg in self.svgs if svg.get("aria-label") == picture]
        return ["".join(element.itertext()).strip() for element in svg.iter(f"{SVG}text")]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(tmp_path / "run", drifts=[{"rank": 0, "words": "since step 2 disk reads take longer"}])
    return tmp_path / "run"


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    prediction = write_run(tmp_path / "run")
    report = read_report(tmp_path / "run")
    assert report.prediction == prediction
    assert (report.step, report.units, len(report.rows)) == (17, prediction.units, 20)
    assert report.missing is None
    assert report.measured is not None
    assert report.comparison == compare(prediction.timeline, report.measured, prediction.units)
    host = prediction.tiers[0]
    assert report.measured_peaks == {"host": int(0.97 * host.peak_bytes)}
    assert report.budgets == {"host": host.budget_bytes}
    result = Result(tmp_path / "run", Metrics(), Plan(1, 0, 1, "float32", False, 1, ()), {})
    assert result.report() == report


def test_the_text_says_predicted_and_measured_of_lanes_units_and_memory(run: Path) -> None:
    report = read_report(run)
    lines = [" ".join(line.split()) for line in str(report).splitlines()]
    busy = {row.lane: row.busy for row in report.comparison.lanes}["read"]
    ms = f"{1000 * busy.predicted_s:,.1f} {1000 * busy.measured_s:,.1f} 1.80"
    assert any(line.startswith(f"read {ms}") for line in lines)
    assert f"disk reads {ms}" in lines
    assert "forward 240.0 252.0 1.05" in lines
    assert "h.<3> 40.0 42.0 1.05 90.0 90.0 1.00" in lines
    assert any(line.startswith("host ") and line.endswith("B1.0") for line in lines)
    assert any(line.startswith(f"disk reads {ms} +") for line in lines), "among the largest differences"
    assert "Since step 2 disk reads take longer." in lines
    assert any(
        re.fullmatch(r"Step 17, a typical one, took .* ms \(.*\): \d+% more than predicted\.", each) for each in lines
    )
    assert any(line.startswith("optimizer on disk, <6> units recomputed 1,500.0") for line in lines)


def test_the_page_has_its_parts_and_loads_nothing(run: Path) -> None:
    text = read_report(run).html()
    page = Page(text)
    assert page.of("h1") == ["run"]
    assert page.of("h2") == [
        "Timeline of all lanes",
        "Memory over the step",
        "Seconds by lane",
        "Seconds by unit",
        "The largest differences",
        "Seconds of every step",
        "Plans",
    ]
    assert page.loads == ["data:,"]
    assert "@import" not in text
    cells = page.of("td")
    assert "optimizer on disk, <6> units recomputed" in cells
    assert "refused: 1.00 GiB too much at B5.0" in cells
    assert "host: activations" in cells
    assert [svg.get("aria-label") for svg in page.svgs] == PICTURES
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids)), "pictures of one page do not share ids"
    used = re.findall(r'(?:href="#|url\(#)([^")]*)', text)
    assert set(used) <= set(ids)


def test_the_pictures_have_labels_units_and_legends(run: Path) -> None:
    page = Page(read_report(run).html())
    words = page.words_in("lanes")
    for lane in ("compute", "read", "write"):
        assert words.index(f"{lane}  predicted") < words.index(f"{lane}  measured")
    assert {"forward", "backward", "optimizer updates", "disk reads", "disk writes"} <= set(words)
    assert "drops" not in words, "what takes no time is not in the legend"
    assert any(re.fullmatch(r"time since the step began \((milli)?seconds\)", word) for word in words)
    words = page.words_in("memory")
    assert {"host", "GiB", "predicted", "budget", "most measured in the run"} <= set(words)
    assert {"compute", "read", "write", "predicted", "measured"} <= set(page.words_in("lane bars"))
    assert {*(f"h.<{n}>" for n in range(6)), "forward", "backward"} <= set(page.words_in("unit bars"))
    assert {"step", "predicted"} <= set(page.words_in("steps"))


def test_a_run_without_prediction_says_so_and_shows_what_was_measured(tmp_path: Path) -> None:
    write_run(tmp_path / "run", predicted=False)
    report = read_report(tmp_path / "run")
    page = Page(report.html())
    assert report.missing is not None
    assert report.missing in page.of("p")
    assert report.missing in str(report)
    assert not any("predicted" in word for picture in PICTURES for word in page.words_in(picture))
    assert "compute  measured" in page.words_in("lanes")
    assert "Plans" not in page.of("h2")
    assert "h.<3> 42.0 90.0" in " ".join(str(report).split())
    assert {"most measured in the run", "budget"} & set(page.words_in("memory"))


def test_what_drifted_is_said_with_its_rank_where_there_are_several(run: Path, tmp_path: Path) -> None:
    assert "Since step 2 disk reads take longer." in Page(read_report(run).html()).of("p")
    drifts = [{"rank": rank, "words": "since step 2 disk reads take longer"} for rank in (0, 1)]
    write_run(tmp_path / "two", workers=2, drifts=drifts, predicted=False, not_predicted_because="a pipeline")
    report = read_report(tmp_path / "two")
    assert report.drifts == [f"Rank {rank}: since step 2 disk reads take longer." for rank in (0, 1)]
    assert report.missing is not None
    assert report.missing.startswith("Nothing was predicted for this run (a pipeline), so")


def test_a_run_that_failed_before_its_first_step_shows_what_was_predicted(tmp_path: Path) -> None:
    write_run(tmp_path / "run", measured=False, status="failed")
    report = read_report(tmp_path / "run")
    page = Page(report.html())
    assert report.missing is not None
    assert report.missing in page.of("p")
    assert "compute  predicted" in page.words_in("lanes")
    assert not any("measured" in word for word in page.words_in("lanes"))
    assert "Seconds of every step" not in page.of("h2")
    assert "failed, 0 steps" in str(report)


def test_a_run_with_neither_still_has_a_report(tmp_path: Path) -> None:
    write_run(tmp_path / "run", predicted=False, measured=False)
    report = read_report(tmp_path / "run")
    assert Page(report.html()).of("h2") == []
    assert "finished, 0 steps" in str(report)


def test_thousands_of_spans_make_a_page_that_can_be_opened(tmp_path: Path) -> None:
    prediction = write_run(tmp_path / "run", num_units=150, micro_batches=3)
    assert len(prediction.timeline.spans) > 3000
    report = read_report(tmp_path / "run")
    text = report.html()
    assert len(text) < 1_500_000
    words = Page(text).words_in("unit bars")
    assert "unit run" in words
    assert not any(word.startswith("h.<") for word in words), "150 names would lie over each other"
    assert "the 24 of 150 that differ most" in str(report)


def test_a_budget_far_above_does_not_flatten_the_picture(tmp_path: Path) -> None:
    write_run(tmp_path / "run", predicted=False, budget_bytes={"0": {"host": 1 << 40}})
    words = Page(read_report(tmp_path / "run").html()).words_in("memory")
    assert "host (the budget of 1024.00 GiB is far above)" in words
    assert "budget" not in words


def test_the_command_prints_and_writes(run: Path, tmp_path: Path) -> None:
    answer = CliRunner().invoke(app, ["report", str(run), "--html", str(tmp_path / "page.html")])
    assert answer.exit_code == 0, answer.output
    assert "Lanes (ms)" in answer.output
    assert Page((tmp_path / "page.html").read_text()).of("h1") == ["run"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("prediction.json", "{}", "this prediction is of version None"),
        ("timeline.json", "{}", "this is no trace of a step"),
        ("result.json", "nothing", r"result.json of .* cannot be read"),
    ],
)
def test_files_that_cannot_be_read_are_named(run: Path, name: str, text: str, message: str) -> None:
    (run / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_report(run)


def test_another_folder_is_refused(tmp_path: Path) -> None:
    answer = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert answer.exit_code == 1
    assert "is no run folder: it holds neither result.json nor metrics.jsonl" in answer.output.replace("\n", "")


def test_a_notebook_gets_the_page_in_a_frame(run: Path) -> None:
    framed = read_report(run)._repr_html_()
    assert framed.startswith('<iframe srcdoc="&lt;!DOCTYPE html&gt;')
    assert framed.count("<") == 2
