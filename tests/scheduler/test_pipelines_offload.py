"""PipeOffload's schedules: what is copied, when, and what stays."""

from dataclasses import replace

import pytest

from outgrow.parallel.actions import Kind
from outgrow.scheduler.pipeline_check import validate
from outgrow.scheduler.pipeline_data import StageCosts, from_draft
from outgrow.scheduler.pipeline_timing import peak_of, score_of, simulate
from outgrow.scheduler.pipelines import schedule
from outgrow.scheduler.pipelines_offload import building_block, pipeoffload


def copies(plan) -> set[str]:
    return {str(action) for order in plan.orders for action in order if action.kind is Kind.SAVE}


@pytest.mark.parametrize(("p", "v", "peak"), [(2, 2, 1.5), (4, 2, 3.5), (8, 2, 6.5), (4, 4, 2.75), (8, 4, 5.75)])
def test_peaks_of_the_repeated_block(p: int, v: int, peak: float) -> None:
    draft = building_block(p, 4 * p, v, 1)
    assert peak_of(draft, StageCosts.equal(p).split(p * v)) == peak


@pytest.mark.parametrize(("p", "v", "half", "full"), [(4, 2, 1.5, 1.0), (8, 2, 2.5, 1.0), (8, 4, 2.0, 0.5)])
def test_half_and_full(p: int, v: int, half: float, full: float) -> None:
    m = 4 * p
    base = building_block(p, m, v, 1)
    costs = StageCosts.equal(p).split(p * v)
    for name, peak, num_chunks in (("pipeoffload-half", half, v // 2), ("pipeoffload-full", full, v)):
        plan = schedule(name, p, m, chunks=v)
        validate(plan)
        timing = simulate(plan)
        assert max(timing.peak_activations) == peak
        assert timing.span_s == pytest.approx(score_of(base, costs)[0])  # copying costs no time
        assert {int(text.split("a")[1].split(".")[0]) for text in copies(plan)} <= set(range(p * num_chunks))
        assert len(copies(plan)) >= 0.85 * m * p * num_chunks


def test_what_lives_too_shortly_stays() -> None:
    plan = schedule("pipeoffload-full", 4, 8)
    assert "SAVE a7.0" not in copies(plan)  # the last stage goes backward at once
    assert "SAVE a0.0" in copies(plan)


def test_a_slow_link_copies_less_and_stays_valid() -> None:
    base = StageCosts.equal(4)
    numbers = []
    for factor in (0.25, 1.0, 4.0, 40.0):
        costs = replace(base, copy_s=tuple(3 * factor for _ in base.forward_s))
        plan = schedule("pipeoffload-full", 4, 8, costs)
        validate(plan)
        numbers.append(len(copies(plan)))
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[-1] == 0


def test_copies_are_listed_between_forward_and_backward() -> None:
    costs = StageCosts.equal(2).split(4)
    draft = pipeoffload(building_block(2, 4, 2, 1), 1, costs)
    validate(from_draft("offload", draft, 4))
    words = [str(action) for action in from_draft("offload", draft, 4).orders[0]]
    assert words[:3] == ["F0.0", "SAVE a0.0", "F2.0"]
    assert words.index("LOAD a0.0") < words.index("I0.0")
