"""How many micro-batches a step has, where that may be decided: the number changes how gradients round.

Owns the numbers that are looked at and when to stop. Does not own what a plan with a number takes, nor its seconds.

More micro-batches are smaller ones: less memory, and more of what each of them costs anew (exchange, sums, kernels on
fewer rows). So the numbers are looked at from the fewest on, and no further than they pay.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from ..memory.errors import DoesNotFit

__all__ = ["choose_count", "possible_counts"]

_Found = TypeVar("_Found")
_ALIKE = 0.02  # predictions that differ by less say nothing
_MOST = 64  # micro-batches


def possible_counts(num_samples: int, at_least: int = 1) -> list[int]:
    """Powers of two that divide a rank's samples, the fewest first.

    Raises:
        ValueError: none of them does.
    """
    found = [1 << power for power in range(_MOST.bit_length()) if num_samples % (1 << power) == 0]
    counts = [count for count in found if at_least <= count <= num_samples]
    if not counts:
        raise ValueError(
            f"micro_batches='auto': {num_samples} samples on a rank cannot be cut into {at_least} or more equal parts "
            "by halving; give micro_batches= a number, or a batch that divides"
        )
    return counts


def choose_count(
    counts: Sequence[int], look: Callable[[int], _Found], seconds_of: Callable[[_Found], float | None]
) -> tuple[int, dict[int, _Found | DoesNotFit]]:
    """The number of micro-batches of the fastest plan; of those that are alike within 2%, the fewest.

    Args:
        counts: from the fewest on.
        look: the best plan with so many; raises DoesNotFit.
        seconds_of: of a step of it; None where that is not known: then the fewest that fit are taken.

    Returns:
        The number, and what was found for each that was looked at.

    Raises:
        DoesNotFit: with no number a plan fits; of the last one.
    """
    found: dict[int, _Found | DoesNotFit] = {}
    best: tuple[int, float | None] | None = None
    for count in counts:
        try:
            plan = look(count)
        except DoesNotFit as error:
            found[count] = error
            if best is not None:
                break
            continue
        found[count] = plan
        seconds = seconds_of(plan)
        if best is None or (best[1] is not None and seconds is not None and seconds < best[1] * (1 - _ALIKE)):
            best = count, seconds
        else:
            break
        if seconds is None:
            break
    if best is None:
        last = found[counts[-1]]
        assert isinstance(last, DoesNotFit)
        raise last
    return best[0], found
