"""How many micro-batches: the fewest that pay, and none that does not fit."""

import pytest

from outgrow.memory.errors import DoesNotFit
from outgrow.scheduler.counting import choose_count, possible_counts


def chosen(seconds: dict[int, float | None], least: int = 1) -> tuple[int, list[int]]:
    """With those below `least` not fitting; what was chosen, and what was looked at."""
    looked: list[int] = []

    def look(count: int) -> int:
        looked.append(count)
        if count < least:
            raise DoesNotFit(f"{count} is too few")
        return count

    count, found = choose_count(list(seconds), look, lambda count: seconds[count])
    assert list(found) == looked
    assert [count for count, each in found.items() if isinstance(each, DoesNotFit)] == [c for c in looked if c < least]
    return count, looked


def test_more_are_looked_at_only_as_long_as_they_pay() -> None:
    assert chosen({1: 1.0, 2: 1.1, 4: 0.1}) == (1, [1, 2])
    assert chosen({1: 1.0, 2: 0.9, 4: 0.8, 8: 0.9}) == (4, [1, 2, 4, 8])
    assert chosen({1: 1.0, 2: 0.99, 4: 0.1}) == (1, [1, 2]), "no prediction tells these apart"


def test_what_does_not_fit_is_passed_over_and_without_seconds_the_first_that_fits_is_taken() -> None:
    assert chosen({1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0}, least=4) == (4, [1, 2, 4, 8])
    assert chosen({1: None, 2: None, 4: None}, least=2) == (2, [1, 2])
    with pytest.raises(DoesNotFit, match="4 is too few"):
        chosen({1: 1.0, 2: 1.0, 4: 1.0}, least=8)


def test_numbers_halve_what_a_rank_has() -> None:
    assert possible_counts(8) == [1, 2, 4, 8]
    assert possible_counts(12, at_least=2) == [2, 4]
    assert max(possible_counts(1 << 20)) == 64
    with pytest.raises(ValueError, match="3 samples on a rank cannot be cut into 2 or more equal parts"):
        possible_counts(3, at_least=2)
