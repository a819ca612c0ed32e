"""Whatever happens to the activations of units, gradients, losses, buffers and random numbers keep their bits."""

from typing import Any

import pytest
from models import CASES
from unit_runs import POLICIES, FarTier, UnitRuns, plain_bits


@pytest.mark.parametrize("name", CASES)
def test_units_whose_activations_move_have_the_bits_of_plain_autograd(name: str, tmp_path: Any) -> None:
    """Parameters move too, between forward and backward, and leave NaN behind. With `together`, every micro-batch's
    forward comes before any backward."""
    for policies, together in (
        (("offload:host",), False),
        (("offload:disk",), True),
        (POLICIES, True),
        (POLICIES[2:] + POLICIES[:2], False),
    ):
        plain = plain_bits(name, together=together)
        stays = UnitRuns(name, policies, None, moves=True, together=together).step()
        assert plain.differ(stays) == [], policies
        far = FarTier(tmp_path, stays.sizes)
        moved = UnitRuns(name, policies, far, moves=True, together=together).step()
        far.close()
        assert plain.differ(moved) == [], policies
        assert moved.sizes == stays.sizes


def test_without_moving_parameters_their_views_are_not_stored_either() -> None:
    assert (
        UnitRuns("gpt", ("offload:host",)).step().sizes == UnitRuns("gpt", ("offload:host",), moves=True).step().sizes
    )
