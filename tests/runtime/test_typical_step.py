"""Which step stands for a run."""

from itertools import pairwise

from outgrow.memory.timeline import Timeline
from outgrow.runtime.step_result import StepResult
from outgrow.runtime.typical_step import TypicalStep


def step(number: int, step_s: float, num_samples: int = 8) -> StepResult:
    return StepResult(number, 1.0, None, 0.1, num_samples, 0, step_s, {}, Timeline(()))


def typical(*steps: StepResult, most: int = 8) -> int:
    chosen = TypicalStep(most)
    for each in steps:
        chosen.note(each)
    assert chosen.step is not None
    return chosen.step.step


def test_there_is_none_before_the_first() -> None:
    assert TypicalStep().step is None


def test_the_first_step_counts_only_while_it_is_alone() -> None:
    assert typical(step(1, 9.0)) == 1
    assert typical(step(1, 9.0), step(2, 1.0)) == 2


def test_it_is_the_median_one() -> None:
    assert typical(step(1, 9.0), step(2, 3.0), step(3, 1.0), step(4, 2.0)) == 4


def test_smaller_steps_do_not_count() -> None:
    assert typical(step(1, 9.0), step(2, 3.0), step(3, 1.0, 2), step(4, 0.5, 2)) == 2


def test_what_is_held_is_bounded_and_spread_over_the_run() -> None:
    chosen = TypicalStep(4)
    for number in range(1, 1000):
        chosen.note(step(number, float(number)))
        assert len(chosen._kept) <= 4
    found = [each.step for each in chosen._kept]
    assert found[0] == 2
    assert len({b - a for a, b in pairwise(found)}) == 1, "at equal distances"
    assert 999 - found[-1] <= found[1] - found[0], "up to the end"
