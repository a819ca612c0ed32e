from typing import Any, cast

import pytest
import torch.distributed as dist

from outgrow.parallel.mesh import Mesh
from outgrow.runtime.stage_seconds import ElemSeconds, play_step, unit_seconds
from outgrow.scheduler.program import Program
from outgrow.scheduler.stage_choice import UnitSeconds

TEXT = """0 compute F0.0 0 <- -
1 compute B0.0 0 <- 0
2 net NORM 0 <- 1
3 compute STEP c0 0 <- 2"""
RUNS = [UnitSeconds(2.0, 2.0, 2.0, 3.0, UnitSeconds(1.0, 1.0, 1.0, 2.0)), UnitSeconds(4.0, 4.0, 4.0, 6.0)]
ELEMS = ElemSeconds(0.25, 0.125)


def test_a_step_is_made_of_units_norm_and_updates():
    programs = [Program.parse(TEXT), Program.parse(TEXT.replace("0.0", "1.0"))]
    played = play_step(programs, RUNS, (0, 1), ELEMS, [[8], [16]])
    assert played is not None
    # Units alone on their host; the norm when the slower one is done; then each rank's own elements.
    assert [each.seconds for each in played] == pytest.approx([10 + 1 + 2, 10 + 2 + 4])
    beside = play_step(programs, RUNS, (0, 0), ELEMS, [[8], [16]])
    assert beside is not None
    spans = {span.action: span.end_s for span in (*beside[0].spans, *beside[1].spans) if span.lane == "compute"}
    # Unit 0 takes twice as long beside another one, of which unit 1 does not mind: 2 and 1 of 2 ranks' cores, 1.5.
    assert spans["F0.0"] == pytest.approx(1.5)


def test_of_what_is_not_timed_nothing_is_said():
    disk = Program.parse(TEXT.replace("net NORM", "read READ c0:optim"))
    assert play_step([disk], RUNS, (0,), ELEMS, [[8]]) is None


class Clocked:
    """A timer whose rounds take as many seconds as their number."""

    def __init__(self):
        self.num_rounds = 0

    def round(self, halves, whole):
        self.num_rounds += 1
        return self.num_rounds

    def seconds(self, rounds):
        return [UnitSeconds(*map(float, rounds[:3]), float(sum(rounds)))]


def test_all_ranks_and_one_alone_take_turns():
    """So that a machine that changes its speed meanwhile changes both alike."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        (found,) = unit_seconds(cast(Any, Clocked()), Mesh(0, 1, 1))
    finally:
        dist.destroy_process_group()
    # 1 warms up; then two count, one keeps the others busy, and one is alone, three times.
    assert found.by_kind == (2, 3, 6, 2 + 3 + 6 + 7 + 10 + 11)
    assert found.alone is not None
    assert found.alone.by_kind == (5, 9, 13, 5 + 9 + 13)
