"""Whatever happens to the activations of units, gradients, losses, buffers and random numbers keep their bits."""

from typing import Any

import pytest
import torch
from models import CASES
from unit_runs import POLICIES, FarTier, UnitRuns, plain_bits

from outgrow import Engine


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


def test_an_engine_that_recomputes_selectively_trains_with_the_same_bits() -> None:
    case, found = CASES["gpt"], {}
    words = ("keep", "recompute:selective", "recompute", "recompute:selective", "keep", "recompute:selective")
    for activations in ("keep", "recompute:selective", words):
        engine = Engine(case.model(), loss=case.loss, activations=activations)
        losses = [engine.step(case.batch(step, 4)).loss for step in range(3)]
        found[activations] = losses, {name: value.clone() for name, value in engine.state_dict().items()}
        engine.close()
    losses, weights = found["keep"]
    for other_losses, other_weights in found.values():
        assert other_losses == losses
        assert all(torch.equal(weights[name], value) for name, value in other_weights.items())
