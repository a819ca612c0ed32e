from itertools import chain

import torch
from torch import nn

from outgrow.parallel.stage_chunks import holders_of, stage_chunks
from outgrow.parallel.units import find_units


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(3, 3), nn.Linear(3, 5), nn.Linear(3, 3)
        self.last.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(2))
        self.middle.bias.requires_grad_(False)


USED = [frozenset({"first.weight", "first.bias"}), frozenset({"middle.weight", "middle.bias"}),
        frozenset({"first.weight", "last.bias"})]  # fmt: skip


def test_holders_are_the_ranks_whose_stages_use_a_parameter():
    holders = holders_of(Tied(), USED, (0, 1, 1))
    assert holders["first.weight"] == (0, 1)
    assert holders["first.bias"] == (0,)
    assert holders["middle.bias"] == holders["last.bias"] == (1,)
    assert holders["scale"] == (0,)  # no stage uses it
    assert holders_of(Tied(), USED, (0, 1, 0))["first.weight"] == (0,)


def test_each_rank_has_its_own_chunks_and_shared_ones_apart_laid_out_alike():
    model = Tied()
    units = find_units(model, ["first", "middle", "last"])
    holders = holders_of(model, USED, (0, 1, 1))
    found = [stage_chunks(model, units, holders, rank, 2) for rank in (0, 1)]
    names = [[[field.name for field in layout.fields] for layout in layouts] for layouts, _ in found]
    assert sorted(chain.from_iterable(names[0])) == ["first.bias", "first.weight", "scale"]
    assert sorted(chain.from_iterable(names[1])) == ["first.weight", "last.bias", "middle.bias", "middle.weight"]
    shared = []
    for (layouts, peers), own in zip(found, names, strict=True):
        assert [layout.index for layout in layouts] == list(range(len(layouts)))
        (index,) = peers
        assert peers[index] == (0, 1)
        assert own[index] == ["first.weight"]
        shared.append(layouts[index])
        assert all(layout.num_elems % 2 == 0 for layout in layouts)
    assert shared[0].fields == shared[1].fields
    assert shared[0].num_elems == shared[1].num_elems
    frozen = [layout for layout in found[1][0] if not layout.trainable]
    assert [field.name for layout in frozen for field in layout.fields] == ["middle.bias"]
    narrow, _ = stage_chunks(model, units, holders, 1, 1, {"middle.weight": torch.bfloat16})
    assert {layout.dtype for layout in narrow} == {torch.float32, torch.bfloat16}
