import pytest

from outgrow.scheduler.pipeline_data import ScheduleError, loop, vee
from outgrow.scheduler.stages import balance, check_starts


def test_the_published_cuts():
    assert balance([1, 2, 2, 2, 2, 2, 2, 3, 4], loop(4)) == (0, 3, 6, 8)
    starts = balance([2, *[1] * 8, 4], loop(4))
    ends = [*starts[1:], 10]
    costs = [2, *[1] * 8, 4]
    assert max(sum(costs[a:b]) for a, b in zip(starts, ends, strict=True)) == 4


def test_several_stages_on_a_rank_are_balanced_by_their_sum():
    costs = [1.0, *[6.0] * 6, 8.0]  # an embedding, blocks and a head
    starts = balance(costs, vee(2))
    ends = [*starts[1:], 8]
    sizes = [sum(costs[a:b]) for a, b in zip(starts, ends, strict=True)]
    assert max(sizes[0] + sizes[3], sizes[1] + sizes[2]) == 24  # the least that whole blocks allow
    many = balance([1.0] * 40 + [7.0], loop(4, 4))
    assert len(many) == 16
    assert many == tuple(sorted(set(many)))


def test_places_and_bytes_that_are_not_allowed_are_not_used():
    assert balance([1, 1, 1, 1], loop(2), [True, True, False, True]) in ((0, 1), (0, 3))
    costs, heavy = [1.0, 1.0, 1.0, 1.0], [1, 1, 1, 9]
    assert balance(costs, loop(2), None, lambda stage, a, b: sum(heavy[a:b]), 9) == (0, 3)
    with pytest.raises(ScheduleError, match="fits into 8 bytes a stage"):
        balance(costs, loop(2), None, lambda stage, a, b: sum(heavy[a:b]), 8)
    with pytest.raises(ScheduleError, match="dataflow allows no cut into 2"):
        balance(costs, loop(2), [True, False, False, False])
    with pytest.raises(ScheduleError, match="5 stages need at least so many units, and the model runs 4"):
        balance(costs, loop(5))


@pytest.mark.parametrize("starts", [[0], [1, 2], [0, 2, 2], [0, 1, 4]])
def test_starts_that_are_no_stages_are_refused(starts: list[int]):
    with pytest.raises(ScheduleError):
        check_starts(starts, 2 if len(starts) < 3 else 3, 4)
