"""What the cases make of measurements; the measurements themselves are real runs of `outgrow perf`."""

import pytest

from outgrow.perf import case_collectives, case_memory, case_step
from outgrow.perf.case_memory import Holdings, formula_bytes
from outgrow.perf.contestants import StepReport
from outgrow.perf.figures import Figure


def by_name(figures: list[Figure]) -> dict[str, Figure]:
    return {figure.name: figure for figure in figures}


@pytest.mark.parametrize(
    ("num_ranks", "stage", "gigabytes"),
    [(64, 0, 120.0), (64, 1, 60.938), (64, 2, 31.406), (64, 3, 1.875), (16, 3, 7.5), (1, 3, 120.0)],
)
def test_the_formula_is_that_of_the_zero_paper_in_float32(num_ranks: int, stage: int, gigabytes: float) -> None:
    assert formula_bytes(7_500_000_000, num_ranks, stage) / 1e9 == pytest.approx(gigabytes, abs=1e-3)


def test_memory_is_the_mean_over_ranks_of_all_slots_against_the_formula() -> None:
    # zero=1 on 2 ranks: 4 + 4 + 8 / 2 = 12 bytes a parameter.
    ranks = [
        Holdings({"param": 4000, "grad": 4000, "exp_avg": 2100, "exp_avg_sq": 2100}, 15_000, 1000, "shared-memory"),
        Holdings({"param": 4000, "grad": 4000, "exp_avg": 1900, "exp_avg_sq": 1900}, 13_800, 1000, "shared-memory"),
    ]
    figures = by_name(case_memory._figures(2, 1, [ranks, ranks]))
    held, pss = figures["zero=1 held / formula"], figures["zero=1 pss / formula"]
    assert held.samples == (1.0, 1.0)
    assert held.is_met is True
    assert pss.median == pytest.approx(1.2)
    assert pss.is_met is None
    too_much = [Holdings({"param": 4000, "grad": 4000, "exp_avg": 4000, "exp_avg_sq": 4000}, 0, 1000, "gloo")] * 2
    assert by_name(case_memory._figures(2, 1, [too_much]))["zero=1 held / formula"].is_met is False


def test_losses_that_differ_are_not_the_same_training() -> None:
    plain = [9.0, 8.0, 7.0]
    same = case_step._agreement("S", {"plain": plain, "outgrow": plain})
    assert same.samples == (0.0,)
    assert same.is_met is True
    off = case_step._agreement("S", {"plain": plain, "DDP": plain, "outgrow": [9.0, 8.0, 7.0007]})
    assert off.median == pytest.approx(1e-4)
    assert off.is_met is False
    assert "from plain, in 3 steps; at the last most by outgrow" in off.note


def test_speed_is_of_the_slowest_rank_and_memory_of_the_largest() -> None:
    turns = [[StepReport(1.0, 9.0, 5 * 2**20), StepReport(2.0, 9.0, 7 * 2**20)]]
    figure = case_step._speed("S", case_step._DDP, 2048, {"DDP": [2.0]}, {"DDP": turns}, {"DDP": "gloo"})
    assert figure.median == 1024
    assert figure.note == "RSS 7 MiB, gloo"


def test_both_sides_of_every_target_stand_in_one_group() -> None:
    groups = [{contestant.name for contestant in group} for group in case_step._NEEDED + case_step._EXTRA]
    for ours, theirs, target in case_step._TARGETS:
        assert any({ours.name, theirs.name} <= group for group in groups), (ours.name, theirs.name)
        if target is not None:
            needed = [{contestant.name for contestant in group} for group in case_step._NEEDED]
            assert any({ours.name, theirs.name} <= group for group in needed)


def test_collectives_are_compared_with_raw_gloo_and_a_copy() -> None:
    seconds = {name: [1.0, 1.0] for name in case_collectives.OPERATIONS}
    seconds["gather, raw gloo"] = [3.0, 5.0]
    seconds["memory copy"] = [0.5, 0.5]
    figures = by_name(case_collectives._figures("1 MiB", 2**20, seconds))
    assert figures["gather, raw gloo"].samples == (2**20 / 3e9, 2**20 / 5e9)
    assert figures["gather, shared memory / raw gloo"].samples == (3.0, 5.0)
    assert figures["gather, shared memory / memory copy"].median == 0.5
    assert figures["reduce, shared memory / raw gloo"].is_met is True
