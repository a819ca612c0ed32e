"""The passes over schedules: list scheduling, filling, compaction, steady states; and those that cut micro-batches."""

import pytest

from outgrow.parallel.actions import Kind
from outgrow.scheduler.pipeline_check import Limits, validate
from outgrow.scheduler.pipeline_data import Draft, StageCosts, from_draft, loop, vee
from outgrow.scheduler.pipeline_draw import rows
from outgrow.scheduler.pipeline_timing import peak_of, score_of, simulate
from outgrow.scheduler.pipelines_list import Rules, list_schedule
from outgrow.scheduler.pipelines_refine import compact, fill_weights, refine, steady_state
from outgrow.scheduler.pipelines_retime import best_of
from outgrow.scheduler.pipelines_zero_bubble import cut_front, cut_to, v_half, v_min, zb_h1, zb_v

UNEQUAL = (1.0, 1.2, 0.8)
F, I, W = Kind.F, Kind.I, Kind.W  # noqa: E741


def drawn(draft: Draft, m: int) -> list[str]:
    return rows(simulate(from_draft("draft", draft, m)))


@pytest.mark.parametrize("rules", [Rules(), Rules(forward_first=True, spacing=0.5, burst=2), Rules(whole=True)])
@pytest.mark.parametrize(("placement", "p"), [(loop(3), 3), (loop(3, 2), 3), (loop(2, 4), 2), (vee(4), 4)])
@pytest.mark.parametrize("limit", [1.0, 1.5, 3.0])
def test_list_schedules_run_within_their_limit(rules: Rules, placement: tuple, p: int, limit: float) -> None:
    costs = StageCosts.equal(p, *UNEQUAL, comm_s=0.1).split(len(placement))
    draft = list_schedule(placement, 9, costs, [limit] * p, rules)
    assert draft is not None
    validate(from_draft("list", draft, 9), Limits(limit, costs))
    whole = any(op[0] is Kind.B for order in draft[1] for op in order)
    assert whole == rules.whole


def test_no_list_schedule_where_one_micro_batch_has_no_room() -> None:
    assert list_schedule(vee(2), 4, StageCosts.equal(2).split(4), [0.9] * 2, Rules()) is None


def test_a_guide_is_followed() -> None:
    costs = StageCosts.equal(2).split(4)
    draft = zb_v(2, 4)
    guide = {op: float(n) for order in draft[1] for n, op in enumerate(order)}
    followed = list_schedule(vee(2), 4, costs, [2.0] * 2, Rules(), guide)
    assert followed is not None
    assert score_of(followed, costs)[0] <= score_of(draft, costs)[0] + 1e-6


def test_weights_go_where_a_rank_would_wait() -> None:
    placement, orders = zb_h1(2, 2)
    late: Draft = (placement, [sorted(order, key=lambda op: op[0] is W) for order in orders])
    filled = fill_weights(late, StageCosts.equal(2), [2.0, 2.0])
    assert filled is not None
    assert drawn(late, 2) == ["F0 F1 . I0 . I1 W0 W1", ". F0 I0 F1 I1 W0 W1"]
    assert drawn(filled, 2) == ["F0 F1 . I0 W0 I1 W1", ". F0 I0 F1 I1 W0 W1"]


def test_weights_cannot_be_filled_where_memory_is_short() -> None:
    placement = loop(1)
    draft: Draft = (placement, [[(F, 0, 0), (F, 0, 1), (I, 0, 0), (I, 0, 1), (W, 0, 0), (W, 0, 1)]])
    assert fill_weights(draft, StageCosts.equal(1), [1.0]) is None


def test_compaction_moves_into_gaps_but_not_above_the_limit() -> None:
    costs = StageCosts.equal(2)
    placement, orders = zb_h1(2, 3)
    late: Draft = (placement, [sorted(orders[0], key=lambda op: (op[2], op[0] is not F)), orders[1]])
    assert drawn(late, 3)[0] == "F0 . . I0 W0 F1 . . I1 W1 F2 . . I2 W2"
    assert drawn(compact(late, costs, [3.0] * 2), 3)[0] == "F0 F1 F2 I0 W0 I1 W1 . I2 W2"
    assert drawn(compact(late, costs, [2.0] * 2), 3)[0] == "F0 F1 . I0 W0 I1 W1 F2 . . I2 W2"
    assert drawn(compact(late, costs, [1.0] * 2), 3)[0] == drawn(late, 3)[0]


@pytest.mark.parametrize("make", [v_half, v_min, zb_v])
@pytest.mark.parametrize("times", [(1.0, 1.0, 1.0), UNEQUAL])
def test_refining_keeps_peak_and_order(make, times: tuple[float, float, float]) -> None:
    costs = StageCosts.equal(4, *times).split(8)
    draft = make(4, 11)
    peak = peak_of(draft, costs)
    better = refine(draft, costs, [peak] * 4)
    validate(from_draft("refined", better, 11), Limits(peak, costs))
    assert score_of(better, costs)[:2] <= score_of(draft, costs)[:2]


@pytest.mark.parametrize("times", [(1.0, 1.0, 1.0), UNEQUAL, (1.0, 1.5, 0.9), (0.5, 2.0, 1.3)])
@pytest.mark.parametrize("p", [1, 2, 3, 5])
def test_steady_states_lose_nothing_between_micro_batches(times: tuple[float, float, float], p: int) -> None:
    costs = StageCosts.equal(p, *times).split(2 * p)
    spans = []
    for m in (4 * p, 8 * p):
        draft = steady_state(vee(p), m, costs)
        validate(from_draft("steady", draft, m))
        spans.append(score_of(draft, costs)[0])
    assert spans[1] - spans[0] <= 4 * p * sum(times) + 1e-3


def test_a_steady_state_for_equal_times_is_v_min() -> None:
    costs = StageCosts.equal(4).split(8)
    assert score_of(steady_state(vee(4), 12, costs), costs) == score_of(v_min(4, 12), costs)


def test_cutting() -> None:
    orders = [[(F, 0, 0), (F, 0, 1), (F, 0, 2)]]
    assert cut_to(2, orders) == [[(F, 0, 0), (F, 0, 1)]]
    assert cut_front(2, orders) == [[(F, 0, 0)]]


def test_the_best_is_the_shortest_that_runs_and_fits() -> None:
    costs = StageCosts.equal(2).split(4)
    stuck: Draft = (vee(2), [[], [(F, 1, 0)]])
    assert best_of([None, stuck], costs) is None
    assert best_of([stuck, v_min(2, 8), zb_v(2, 8)], costs) == zb_v(2, 8)
    assert best_of([v_min(2, 8), zb_v(2, 8)], costs, limit=1.0) is None
