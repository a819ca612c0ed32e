"""The event simulation, on schedules small enough to work out by hand."""

import pytest

from outgrow.parallel.actions import Action
from outgrow.scheduler.pipeline_data import Schedule, ScheduleError, StageCosts, from_draft
from outgrow.scheduler.pipeline_timing import peak_of, score_of, simulate
from outgrow.scheduler.pipelines_basic import one_f_one_b


def by_hand(*orders: str, placement: tuple[int, ...] | None = None) -> Schedule:
    actions = tuple(tuple(Action.parse(word.replace("~", " ")) for word in order.split()) for order in orders)
    m = 1 + max(action.micro_batch or 0 for order in actions for action in order)
    return Schedule("by hand", placement or tuple(range(len(orders))), actions, m)


def test_two_stages_with_transfers() -> None:
    costs = StageCosts.of_stages([1, 2], [3, 4], [5, 6], comm_s=0.5)
    timing = simulate(by_hand("F0.0 I0.0 W0.0", "F1.0 I1.0 W1.0"), costs)
    assert timing.times_s == (((0, 1), (8, 11), (11, 16)), ((1.5, 3.5), (3.5, 7.5), (7.5, 13.5)))
    assert (timing.makespan_s, timing.span_s, timing.work_s) == (16, 16, (9, 12))
    assert timing.bubble_s == 4
    assert timing.bubble_share == 0.25


def test_the_span_is_a_ranks_own() -> None:
    timing = simulate(by_hand("F0.0 B0.0", "F1.0 B1.0"))
    assert timing.times_s == (((0, 1), (4, 6)), ((1, 2), (2, 4)))
    assert (timing.makespan_s, timing.span_s) == (6, 6)
    assert timing.bubble_s == 3


def test_stages_of_one_rank_hand_over_without_transfer() -> None:
    costs = StageCosts.of_stages([1, 1], [1, 1], [1, 1], comm_s=10)
    timing = simulate(by_hand("F0.0 F1.0 B1.0 B0.0", placement=(0, 0)), costs)
    assert timing.makespan_s == 6


def test_a_whole_backward_passes_its_gradient_on_at_its_end() -> None:
    whole = simulate(by_hand("F0.0 B0.0", "F1.0 B1.0"))
    split = simulate(by_hand("F0.0 B0.0", "F1.0 I1.0 W1.0"))
    assert (whole.makespan_s, split.makespan_s) == (6, 5)


def test_copies_share_one_lane_and_hold_the_backward_up() -> None:
    costs = StageCosts.of_stages([1], [1], [1], copy_s=[2])
    timing = simulate(by_hand("F0.0 SAVE~a0.0 F0.1 LOAD~a0.0 B0.0 B0.1"), costs)
    assert timing.times_s == (((0, 1), (1, 3), (1, 2), (3, 5), (5, 7), (7, 9)),)
    assert timing.peak_activations == (2,)
    assert timing.span_s == 9


def test_a_copy_frees_at_its_end_and_takes_at_its_start() -> None:
    costs = StageCosts.of_stages([4], [1], [1], copy_s=[2])
    timing = simulate(by_hand("F0.0 SAVE~a0.0 F0.1 F0.2 B0.1 LOAD~a0.0 B0.0 B0.2"), costs)
    assert timing.peak_activations == (2,)
    slow = StageCosts.of_stages([4], [1], [1], copy_s=[5])
    assert simulate(timing.schedule, slow).peak_activations == (3,)


def test_recomputing_takes_a_forward() -> None:
    timing = simulate(by_hand("F0.0 R0.0 B0.0"))
    assert timing.makespan_s == 4
    assert timing.bubble_s == 0


def test_peaks_in_bytes() -> None:
    costs = StageCosts.of_stages([1, 1], [1, 1], [1, 1], activations=[1000, 10])
    draft = one_f_one_b(2, 4)
    assert simulate(from_draft("1f1b", draft, 4), costs).peak_activations == (2000, 10)
    assert peak_of(draft, costs) == 2000
    assert score_of(draft, costs) == (15, 15, 2000)


def test_no_progress_names_what_is_waited_for() -> None:
    with pytest.raises(ScheduleError, match=r"rank 0 is stuck before I0.0, which needs F0.0 and I1.0.*rank 1 .* F1.1"):
        simulate(by_hand("F0.0 I0.0 F0.1", "F1.1 F1.0 I1.0"))


def test_costs_are_cut_into_stages() -> None:
    costs = StageCosts.of_stages([2, 4], [2, 4], [2, 4], activations=[1, 3]).split(4)
    assert costs.forward_s == (1, 1, 2, 2)
    assert costs.activations == (0.5, 0.5, 1.5, 1.5)
    with pytest.raises(ValueError, match="costs of 4 stages do not describe 6 stages"):
        costs.split(6)


def test_costs_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="below zero"):
        StageCosts.of_stages([1], [-1], [1])
    with pytest.raises(ValueError, match="one entry per stage"):
        StageCosts.of_stages([1], [1], [1], activations=[1, 2])
