"""`auto`: never worse than the best named schedule that fits, within its limit, the same every time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outgrow.parallel.actions import Kind
from outgrow.scheduler.pipeline_check import Limits, validate
from outgrow.scheduler.pipeline_data import ScheduleError, StageCosts
from outgrow.scheduler.pipeline_timing import simulate
from outgrow.scheduler.pipelines import NAMES, schedule


def best_named(p: int, m: int, costs: StageCosts, limit: float | None) -> float:
    spans = []
    for name in NAMES[:-1]:
        try:
            spans.append(simulate(schedule(name, p, m, costs, limit), costs).span_s)
        except ScheduleError:
            continue
    return min(spans, default=float("inf"))


CASES = [
    (2, 5, StageCosts.equal(2), None),
    (4, 8, StageCosts.equal(4), 2.0),
    (4, 8, StageCosts.equal(4), 3.0),
    (4, 13, StageCosts.equal(4, 1.0, 1.2, 0.8), 3.5),
    (4, 12, StageCosts.of_stages([1, 2, 1, 1], [1, 2.2, 1, 1.4], [1, 1.8, 1, 0.9], comm_s=0.1), 4.0),
    (3, 7, StageCosts.of_stages([3, 1, 2], [3, 2, 2], [2, 1, 2], activations=[9e6, 4e6, 5e6]), 20e6),
    (8, 16, StageCosts.equal(8, 1.0, 1.2, 0.8, comm_s=0.05), 5.0),
    (8, 16, StageCosts.equal(8), 1.0),
]


@pytest.mark.parametrize(("p", "m", "costs", "limit"), CASES)
def test_at_least_as_good_as_the_best(p: int, m: int, costs: StageCosts, limit: float | None) -> None:
    plan = schedule("auto", p, m, costs, limit)
    validate(plan, Limits(limit, costs))
    assert simulate(plan, costs).span_s <= best_named(p, m, costs, limit) + 1e-6


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.data())
def test_any_costs(data: st.DataObject) -> None:
    p, m = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    seconds = st.lists(st.floats(0.2, 3.0), min_size=p, max_size=p)
    costs = StageCosts.of_stages(
        data.draw(seconds), data.draw(seconds), data.draw(seconds), comm_s=data.draw(st.sampled_from([0.0, 0.2]))
    )
    limit = data.draw(st.sampled_from([None, 1.5, 2.0, 3.0, p + 1.0]))
    try:
        plan = schedule("auto", p, m, costs, limit)
    except ScheduleError:
        assert best_named(p, m, costs, limit) == float("inf")
        return
    validate(plan, Limits(limit, costs))
    assert simulate(plan, costs).span_s <= best_named(p, m, costs, limit) + 1e-6


def test_more_memory_is_never_slower() -> None:
    costs = StageCosts.equal(4, 1.0, 1.1, 0.9)
    bubbles = [simulate(schedule("auto", 4, 8, costs, limit), costs).bubble_s for limit in (1, 1.5, 2, 3, 4, 7)]
    assert bubbles == sorted(bubbles, reverse=True)
    assert bubbles[-1] < 0.6


def test_with_a_barrier_the_makespan_counts() -> None:
    costs = StageCosts.equal(4, 1.0, 1.2, 0.8)
    names = [name for name in NAMES if name != "auto"]
    best_s = min(simulate(schedule(name, 4, 9, costs), costs).makespan_s for name in names)
    assert simulate(schedule("auto", 4, 9, costs, barrier=True), costs).makespan_s <= best_s + 1e-6


def test_copies_buy_memory_where_their_time_is_known() -> None:
    known, unknown = StageCosts.equal(8, copy_s=0.75), StageCosts.equal(8)
    plan = schedule("auto", 8, 16, known, memory_limit=4.0)
    validate(plan, Limits(4.0, known))
    assert any(action.kind is Kind.SAVE for order in plan.orders for action in order)
    assert simulate(plan, known).bubble_s <= 3.5 + 1e-6
    kept = schedule("auto", 8, 16, unknown, memory_limit=6.0)
    assert not any(action.kind is Kind.SAVE for order in kept.orders for action in order)


def test_it_is_the_same_every_time() -> None:
    costs = StageCosts.equal(4, 1.0, 1.3, 0.7)
    assert schedule("auto", 4, 10, costs, 3.0) == schedule("auto", 4, 10, costs, 3.0)


def test_nothing_fits() -> None:
    with pytest.raises(ScheduleError, match=r"no schedule of 8 micro-batches .* fits 0\.1 .* the least found is"):
        schedule("auto", 4, 8, memory_limit=0.1)


def test_costs_for_no_placement() -> None:
    with pytest.raises(ValueError, match="costs of 7 stages describe no placement on 4 ranks"):
        schedule("auto", 4, 8, StageCosts.of_stages([1] * 7, [1] * 7, [1] * 7))


def test_costs_of_two_stages_per_rank() -> None:
    costs = StageCosts.of_stages([1, 1, 1, 2], [1, 1, 1, 2], [1, 1, 1, 1])
    plan = schedule("auto", 2, 6, costs)
    validate(plan)
    assert plan.num_stages == 4


def test_sixteen_stages_and_many_micro_batches(benchmark) -> None:
    costs = StageCosts.equal(16, 1.0, 1.2, 0.8)
    plan = benchmark.pedantic(schedule, ("auto", 16, 64, costs, 16.0), rounds=1)
    validate(plan, Limits(16.0, costs))
    named = [simulate(schedule(name, 16, 64, costs), costs).span_s for name in ("zb-v", "zb-h1", "v-half", "gis")]
    assert simulate(plan, costs).span_s <= min(named) + 1e-6
