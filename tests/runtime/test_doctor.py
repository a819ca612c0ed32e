import io

from rich.console import Console
from typer.testing import CliRunner

from outgrow.runtime.cli import app
from outgrow.runtime.doctor import Finding, State, examine, print_findings


def printed(findings):
    stream = io.StringIO()
    return print_findings(findings, Console(file=stream, width=160)), stream.getvalue()


def test_this_machine_is_examined_whole(tmp_path):
    findings = {finding.topic: finding for finding in examine(tmp_path / "a folder")}
    topics = {
        "cores",
        "memory",
        "shared memory",
        "disk",
        "O_DIRECT",
        "open files",
        "Ray's folder",
        "python",
        "torch",
        "ray",
    }
    assert topics <= findings.keys()
    assert "cgroup" in findings["memory"].value
    assert findings["torch"].state is State.GOOD
    assert str(tmp_path / "a folder") in findings["disk"].value
    assert all(finding.advice for finding in findings.values() if finding.state is not State.GOOD)


def test_a_folder_that_cannot_be_is_broken(tmp_path):
    (tmp_path / "file").touch()
    answer = CliRunner().invoke(app, ["doctor", "--folder", str(tmp_path / "file" / "runs")])
    assert answer.exit_code == 1
    assert "Broken: disk" in answer.output


def test_only_what_is_broken_counts():
    good = Finding("cores", "2")
    warning = Finding("disk", "slow", State.WARNING, "buy a faster one")
    assert printed([good])[0]
    healthy, text = printed([good, warning])
    assert healthy
    assert "buy a faster one" in text
    assert "with 1 warning(s)" in text
    healthy, text = printed([warning, Finding("ray", "import fails", State.BROKEN, "install it")])
    assert not healthy
    assert "Broken: ray" in text
