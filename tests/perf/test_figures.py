import math

import pytest

from outgrow.perf.figures import Figure, Target, paired_ratios


def figure(*samples: float, target: Target | None = None) -> Figure:
    return Figure("S", "outgrow", "tokens/s", samples, target, note="" if samples else "missing: deepspeed")


def test_median_and_spread_are_of_the_rounds() -> None:
    measured = figure(90.0, 120.0, 100.0, 110.0, 95.0)
    assert measured.median == 100.0
    assert measured.spread == pytest.approx(0.3)


def test_even_numbers_of_rounds_take_the_middle_of_the_two() -> None:
    assert figure(1.0, 2.0, 4.0, 8.0).median == 3.0


def test_a_single_sample_has_no_spread() -> None:
    assert figure(7.0).spread == 0


def test_ratios_are_taken_round_by_round() -> None:
    # The machine halves its speed in the last two rounds: medians of each side alone would say 1.0 / 2.0.
    ours, theirs = [1.0, 1.0, 1.0, 2.2, 2.2], [1.1, 1.1, 1.1, 2.0, 2.0]
    assert paired_ratios(theirs, ours) == pytest.approx((1.1, 1.1, 1.1, 2.0 / 2.2, 2.0 / 2.2))


def test_ratios_need_the_same_rounds_and_no_zero() -> None:
    with pytest.raises(ValueError, match="2 and 1 rounds"):
        paired_ratios([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="zero"):
        paired_ratios([1.0], [0.0])


@pytest.mark.parametrize(
    ("target", "value", "is_met"),
    [
        (Target(low=0.97), 0.97, True),
        (Target(low=0.97), 0.9699, False),
        (Target(high=2.0), 2.0, True),
        (Target(high=2.0), 2.1, False),
        (Target(0.95, 1.05), 1.0, True),
        (Target(0.95, 1.05), 1.06, False),
        (Target(0.95, 1.05), 0.94, False),
        (Target(low=0.0), math.nan, False),
    ],
)
def test_targets_include_their_bounds(target: Target, value: float, is_met: bool) -> None:
    assert target.is_met(value) is is_met


def test_a_target_says_what_it_asks() -> None:
    assert [str(each) for each in (Target(low=0.97), Target(high=3e-6), Target(0.95, 1.05))] == [
        "at least 0.97",
        "at most 3e-06",
        "0.95 to 1.05",
    ]


def test_targets_that_ask_nothing_or_the_impossible_are_refused() -> None:
    with pytest.raises(ValueError, match="needs a lowest"):
        Target()
    with pytest.raises(ValueError, match="above its highest"):
        Target(2.0, 1.0)


def test_the_median_is_what_meets_a_target() -> None:
    assert figure(0.90, 1.0, 1.1, target=Target(low=0.97)).is_met is True
    assert figure(0.90, 0.96, 1.5, target=Target(low=0.97)).is_met is False
    assert figure(1.0).is_met is None


def test_what_was_not_measured_does_not_meet_its_target() -> None:
    missing = figure(target=Target(low=0.97))
    assert math.isnan(missing.median)
    assert missing.is_met is False
    with pytest.raises(ValueError, match="no samples and no note"):
        Figure("S", "outgrow", "ratio", ())
