"""Levels of chains whose bytes can be counted by hand."""

import pytest
import torch
from models import CASES
from torch import nn

from outgrow.parallel.units import find_units
from outgrow.scheduler.memory_levels import Keeping, levels_under, peak_of
from outgrow.scheduler.memory_profile import MemoryProfile, measure_memory

SAMPLES, DIM, WIDTH = 64, 16, 64
X, WIDE = SAMPLES * DIM * 4, SAMPLES * WIDTH * 4
KEEP, RECOMPUTE, OFFLOAD = Keeping.KEEP, Keeping.RECOMPUTE, Keeping.OFFLOAD
SELECTIVE = Keeping.SELECTIVE


class Block(nn.Module):
    """Saves its input and two wide tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(DIM, WIDTH, bias=False), nn.Linear(WIDTH, DIM, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.sin(self.up(x)))


def chain(num_blocks: int) -> MemoryProfile:
    model = nn.Sequential(*[Block() for _ in range(num_blocks)])
    units = find_units(model)
    return measure_memory(model, units, lambda m, x: m(x), lambda out, _: out.sum(), torch.zeros(SAMPLES, DIM))


def begins(profile: MemoryProfile, *policies: Keeping) -> dict[tuple[str, int], int]:
    levels = levels_under(profile, policies)
    return dict(zip(levels.order, levels.begin_bytes, strict=True))


def test_what_lies_between_forward_and_backward_is_what_the_policies_keep():
    profile = chain(3)
    kept = begins(profile, KEEP, KEEP, KEEP)
    assert kept["F", 1] == 2 * WIDE + X, "two wide tensors, and the next one's input"
    assert kept["F", 2] == 2 * (2 * WIDE + X)
    rerun = begins(profile, RECOMPUTE, RECOMPUTE, RECOMPUTE)
    assert rerun["F", 1] == X
    assert rerun["F", 2] == 2 * X
    moved = begins(profile, OFFLOAD, OFFLOAD, OFFLOAD)
    assert moved["F", 1] == X
    assert moved["F", 2] == X, "the inputs are moved too, the running unit's own excepted"
    selective = begins(profile, SELECTIVE, SELECTIVE, SELECTIVE)
    assert selective["F", 1] == WIDE + X, "the wide product, not its sine; the other product is the next one's input"
    assert selective["F", 2] == 2 * (WIDE + X)
    mixed = begins(profile, RECOMPUTE, KEEP, RECOMPUTE)
    assert mixed["F", 2] == X + 2 * WIDE + X


def test_in_backward_everything_that_a_unit_saved_is_there():
    profile = chain(3)
    for policy in (KEEP, RECOMPUTE, OFFLOAD, SELECTIVE):
        levels = levels_under(profile, [policy] * 3)
        place = levels.order.index(("B", 0))
        assert levels.top_bytes[place] >= 2 * WIDE + X, f"{policy}: what it saved, and a gradient"
        assert levels.summing_top_bytes[place] >= levels.top_bytes[place]


def test_a_kept_product_is_there_while_the_rest_of_its_unit_runs():
    profile = chain(2)
    tops = {policy: levels_under(profile, [policy] * 2).top_bytes[1] for policy in (KEEP, RECOMPUTE, SELECTIVE)}
    assert profile.order[1] == ("F", 0)
    assert tops == {KEEP: 2 * WIDE + X, RECOMPUTE: 2 * WIDE, SELECTIVE: 2 * WIDE + X}


def test_a_kept_product_that_nothing_else_needs_is_there_until_the_backward():
    class Added(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + super().forward(x)

    model = nn.Sequential(Added(), Added())
    forward, batch = lambda m, x: m(x), torch.zeros(SAMPLES, DIM)
    profile = measure_memory(model, find_units(model), forward, lambda out, _: out.sum(), batch)
    assert [unit.kept_beside_bytes for unit in profile.units] == [X, X]
    assert [profile.selective_bytes(run) for run in (0, 1)] == [WIDE + X, WIDE + X + X], "the batch is not counted"
    kept = begins(profile, SELECTIVE, SELECTIVE)
    assert kept["F", 1] == WIDE + X + X, "the wide product, the one that was added, and the next one's input"
    rerun = begins(profile, RECOMPUTE, RECOMPUTE)
    assert {phase: kept[phase] - rerun[phase] for phase in kept} == {
        **dict.fromkeys([("before", 0), ("F", 0)], 0),
        **dict.fromkeys([("F", 1), ("B", 0)], WIDE + X),
        **dict.fromkeys([("loss", 0), ("loss", 1), ("B", 1)], 2 * (WIDE + X)),
    }


def test_all_kept_is_the_profile_itself():
    for name in ("gpt", "encoder-decoder", "conv"):
        case = CASES[name]
        model, batch = case.model(), case.batch(0, 2)
        profile = measure_memory(
            model, find_units(model), lambda m, b: m(*b[:-1]), lambda out, b, case=case: case.loss(out, b[-1]), batch
        )
        levels = levels_under(profile, [KEEP] * len(profile.units))
        assert max(levels.top_bytes) == profile.peak_bytes
        assert max(levels.summing_top_bytes) == profile.summing_peak_bytes


def test_micro_batches_add_up_in_the_order_in_which_they_run():
    profile = chain(3)
    levels = levels_under(profile, [KEEP] * 3)
    one = [("F", 0, 0), ("F", 1, 0), ("F", 2, 0), ("B", 2, 0), ("B", 1, 0), ("B", 0, 0)]
    two = [(kind, run, 1) for kind, run, _ in one]
    alone, _ = peak_of(levels, one)
    assert alone == profile.summing_peak_bytes
    assert peak_of(levels, one + two)[0] == alone, "one after the other"
    unit_by_unit = [action for pair in zip(one, two, strict=True) for action in pair]
    peak, where = peak_of(levels, unit_by_unit)
    assert where == ("B", 2, 0), "the first one's loss and backward, when the second has run forward"
    assert peak == alone + levels.begin_bytes[levels.order.index(("loss", 0))]


def test_every_unit_run_has_a_policy():
    with pytest.raises(ValueError, match="2 policies for 3 unit runs"):
        levels_under(chain(3), [KEEP, KEEP])


def test_growth_is_all_that_a_phase_makes_and_the_loss_goes_with_the_last_unit():
    profile = chain(3)
    kept = levels_under(profile, [KEEP] * 3)
    growth = dict(zip(kept.order, kept.growth_bytes, strict=True))
    assert growth["F", 0] == growth["F", 1] == 2 * WIDE + X
    assert growth["F", 2] == 2 * WIDE + X + 64, "and the loss, a scalar"
    assert growth["loss", 0] == 0
    weights = 2 * DIM * WIDTH * 4
    # of `down` the gradient of its input; of `sin` a cosine and a product; of `up` the gradient of its input
    assert growth["B", 1] == 3 * WIDE + X + weights
    again = levels_under(profile, [KEEP, RECOMPUTE, KEEP])
    assert dict(zip(again.order, again.growth_bytes, strict=True))["B", 1] == growth["B", 1] + 2 * WIDE + X
    for levels in (kept, again, levels_under(profile, [OFFLOAD] * 3)):
        assert all(
            top >= summing
            for top, summing, phase in zip(levels.kept_top_bytes, levels.summing_top_bytes, levels.order, strict=True)
            if phase[0] in "FB"
        )
    place = kept.order.index(("B", 1))
    assert kept.kept_top_bytes[place] == kept.begin_bytes[place] + growth["B", 1]
