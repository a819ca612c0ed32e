import random
from collections.abc import Sequence
from itertools import combinations

import pytest

from outgrow.scheduler.pipeline_data import ScheduleError, loop, vee
from outgrow.scheduler.stages import balance, check_starts


class Heavy:
    """Each run weighs something, more so in earlier stages if asked for."""

    def __init__(self, weights: list[int], placement: tuple[int, ...] = (0, 1), factors: tuple[int, ...] = ()) -> None:
        self.weights, self.placement = weights, placement
        self.factors = factors or (1,) * len(placement)

    def alone(self, stage: int, span: tuple[int, int]) -> float:
        return self.factors[stage] * sum(self.weights[slice(*span)])

    def ranks(self, spans: Sequence[tuple[int, int]]) -> list[float]:
        sums = [0.0] * len(set(self.placement))
        for stage, (rank, span) in enumerate(zip(self.placement, spans, strict=True)):
            sums[rank] += self.alone(stage, span)
        return sums


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
    assert balance(costs, loop(2), None, Heavy(heavy), 9) == (0, 3)
    with pytest.raises(ScheduleError, match="fits into 8 bytes a rank"):
        balance(costs, loop(2), None, Heavy(heavy), 8)
    with pytest.raises(ScheduleError, match="dataflow allows no cut into 2"):
        balance(costs, loop(2), [True, False, False, False])
    with pytest.raises(ScheduleError, match="5 stages need at least so many units, and the model runs 4"):
        balance(costs, loop(5))


@pytest.mark.parametrize("starts", [[0], [1, 2], [0, 2, 2], [0, 1, 4]])
def test_starts_that_are_no_stages_are_refused(starts: list[int]):
    with pytest.raises(ScheduleError):
        check_starts(starts, 2 if len(starts) < 3 else 3, 4)


@pytest.mark.parametrize("placement", [loop(2), loop(3), vee(2), loop(2, 3)])
def test_the_best_cut_under_a_limit_is_that_of_brute_force(placement: tuple[int, ...]):
    generator = random.Random(1)
    num_stages = len(placement)
    refused = 0
    for _ in range(60):
        runs = generator.randint(num_stages, 9)
        costs = [float(generator.randint(1, 9)) for _ in range(runs)]
        weights = [generator.randint(0, 9) for _ in range(runs)]
        needs = Heavy(weights, placement, tuple(range(num_stages, 0, -1)))
        allowed = [True, *(generator.random() < 0.9 for _ in range(runs - 1))]

        limit = generator.randint(20, 120)

        def value(starts: tuple[int, ...]) -> float:
            spans = list(zip(starts, [*starts[1:], runs], strict=True))  # noqa: B023
            if max(needs.ranks(spans)) > limit:  # noqa: B023
                return float("inf")
            sums = dict.fromkeys(placement, 0.0)
            for rank, (first, end) in zip(placement, spans, strict=True):
                sums[rank] += sum(costs[first:end])  # noqa: B023
            return max(sums.values())

        places = [run for run in range(1, runs) if allowed[run]]
        best = min((value((0, *cut)) for cut in combinations(places, num_stages - 1)), default=float("inf"))
        try:
            found = value(balance(costs, placement, allowed, needs, limit))
        except ScheduleError:
            found = float("inf")
            refused += 1
        assert found == best
    assert 0 < refused < 50
