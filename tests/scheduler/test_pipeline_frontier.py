from pathlib import Path

from typer.testing import CliRunner

from outgrow.scheduler.pipeline_data import StageCosts
from outgrow.scheduler.pipeline_frontier import draw_frontier, points_of
from outgrow.scheduler.schedule_cli import app

COSTS = StageCosts.equal(2, copy_s=0.75)


def test_recomputing_takes_less_memory_and_more_time_and_auto_is_never_above_what_is_kept(tmp_path: Path):
    points = points_of(2, 8, COSTS, [1.0, 2.0], ["gpipe", "1f1b", "zb-v", "auto"])
    by_key = {(point.name, point.policy): point for point in points if point.name != "auto"}
    assert len(by_key) == 9
    for name in ("gpipe", "1f1b", "zb-v"):
        kept, again = by_key[name, "keep"], by_key[name, "recompute"]
        assert again.step_s > kept.step_s
        assert name == "zb-v" or again.peak_activations < kept.peak_activations
    autos = [point for point in points if point.name == "auto"]
    assert len(autos) == 2
    for auto, limit in zip(autos, (1.0, 2.0), strict=True):
        fitting = [p.step_s for p in by_key.values() if p.policy == "keep" and p.peak_activations <= limit]
        assert auto.peak_activations <= limit
        assert all(auto.step_s <= step for step in fitting)
    draw_frontier(points, tmp_path / "frontier.png", "2 ranks")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_writes_the_figure_and_the_points(tmp_path: Path):
    out = tmp_path / "frontier.svg"
    result = CliRunner().invoke(app, ["frontier", "--stages", "2", "--micro-batches", "4", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "zb-v, keep" in result.stdout
    assert "<svg" in out.read_text()
