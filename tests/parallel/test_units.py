"""Finding units, and cutting a model's parameters into chunks."""

import pytest
import torch
from models import CASES
from torch import nn

from outgrow.parallel.units import ROOT, Unit, assign_chunks, find_units, named_trainable


def names(model: nn.Module, given: list[str] | None = None) -> list[str]:
    units = find_units(model, given)
    modules = dict(model.named_modules())
    assert all(unit.module is (model if unit.name == ROOT else modules[unit.name]) for unit in units)
    return [unit.name for unit in units]


class BasicBlock(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3), nn.BatchNorm2d(out)
        self.downsample = nn.Sequential(nn.Conv2d(width, out, 1), nn.BatchNorm2d(out)) if width != out else None


class ResNet(nn.Module):
    """The outline of torchvision's: stages are Sequentials of blocks, whose first may have another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 4, 7), nn.BatchNorm2d(4), nn.ReLU()
        self.layer1 = nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 4))
        self.layer2 = nn.Sequential(BasicBlock(4, 8), BasicBlock(8, 8))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 10)


class Wrapped(nn.Module):
    """A GPT two levels down, as libraries wrap them, with a parameter and a norm on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.scale = nn.Parameter(torch.ones(3))
        self.model.embed = nn.Embedding(5, 4)
        self.model.decoder = nn.Module()
        self.model.decoder.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        self.model.decoder.norm = nn.LayerNorm(4)
        self.lm_head = nn.Linear(4, 5)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (CASES["gpt"].build(), ["tok", "blocks.0", "blocks.1", "blocks.2", "ln", "head"]),
        (CASES["conv"].build(), ["stem.0", "stem.1", "body.0", "body.1", "body.2", "head"]),
        (CASES["lstm"].build(), ["embed", "lstm", "head"]),
        (ResNet(), ["conv1", "bn1", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "fc"]),
        (
            Wrapped(),
            ["model.embed", "model.decoder.layers.0", "model.decoder.layers.1", "model.decoder.norm", "lm_head"],
        ),
        (
            nn.Transformer(8, 2, 2, 2, 8, batch_first=True),
            [
                *("encoder.layers.0", "encoder.layers.1", "encoder.norm"),
                *("decoder.layers.0", "decoder.layers.1", "decoder.norm"),
            ],
        ),
        (nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), ["0", "2"]),
        (nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 1)), ["0.0", "0.1", "1"]),
        (nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), nn.Linear(3, 2)), ["0", "1"]),
        (
            nn.ModuleList([nn.ModuleList([nn.Linear(2, 2) for _ in range(2)]) for _ in range(2)]),
            ["0.0", "0.1", "1.0", "1.1"],
        ),
        (nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}), ["a", "b"]),
        (nn.Linear(2, 3), [ROOT]),
        (nn.ParameterList([torch.ones(2)]), [ROOT]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_units_are_the_repeated_blocks_and_what_lies_beside_them(model, expected):
    assert names(model) == expected


def test_a_block_used_twice_is_one_unit():
    block = nn.Linear(2, 2)
    assert names(nn.Sequential(block, nn.ReLU(), block)) == ["0"]


def test_given_units_are_taken_as_they_are():
    model = CASES["gpt"].build()
    assert names(model, ["head", "blocks.0.fc", "blocks.1"]) == ["head", "blocks.0.fc", "blocks.1"]
    assert names(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), ["1"]) == ["1"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["blocks.7"], r"units: 'blocks\.7' is no module of this GPT; it has tok, blocks, blocks\.0"),
        ([""], "units: '' is no module"),
        (["pos"], "units: 'pos' is no module"),
        (["blocks.1", "blocks"], r"units: 'blocks\.1' lies inside 'blocks'; give one of the two"),
        (["blocks", "blocks.1.fc"], r"units: 'blocks\.1\.fc' lies inside 'blocks'"),
        (["tok", "head", "tok"], "units: a name is given twice: tok, head, tok"),
        ([], "units: the list is empty"),
    ],
)
def test_given_units_that_cannot_be_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        find_units(CASES["gpt"].build(), given)


def test_names_that_only_begin_alike_do_not_lie_in_each_other():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "ab": nn.Linear(2, 2)})
    assert names(model, ["a", "ab"]) == ["a", "ab"]


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
@pytest.mark.parametrize("num_shards", [1, 3])
def test_chunks_hold_every_parameter_once_with_its_kind(case, num_shards):
    model = case.build()
    units = find_units(model)
    layouts = assign_chunks(model, units, num_shards)
    assert [layout.index for layout in layouts] == list(range(len(layouts)))
    fields = [(layout, field) for layout in layouts for field in layout.fields]
    parameters = dict(model.named_parameters())
    assert sorted(field.name for _, field in fields) == sorted(parameters)
    for layout, field in fields:
        parameter = parameters[field.name]
        assert field.shape == tuple(parameter.shape)
        assert layout.dtype is parameter.dtype
        assert layout.trainable == parameter.requires_grad
        assert layout.unit == ROOT or field.name.startswith(layout.unit + ".")
        assert layout.num_elems % num_shards == 0


def test_what_belongs_to_no_unit_lies_in_the_root_chunk_which_comes_first():
    model = CASES["gpt"].build()
    layouts = assign_chunks(model, find_units(model), 1)
    assert [layout.unit for layout in layouts] == [ROOT, "tok", "blocks.0", "blocks.1", "blocks.2", "ln", "head"]
    assert [field.name for field in layouts[0].fields] == ["pos"]


def test_tied_parameters_lie_where_they_are_named_first():
    model = CASES["gpt-tied"].build()
    units = find_units(model)
    assert "head" in [unit.name for unit in units], "the unit runs, though its only parameter lies elsewhere"
    layouts = assign_chunks(model, units, 1)
    assert [layout.unit for layout in layouts] == [ROOT, "tok", "blocks.0", "blocks.1", "blocks.2", "ln"]
    assert [field.name for field in layouts[1].fields] == ["tok.weight"]


def test_frozen_and_trained_parameters_and_dtypes_of_a_unit_lie_apart():
    block = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2).to(torch.float64))
    block[1].bias.requires_grad_(False)
    model = nn.ModuleDict({"block": block})
    layouts = assign_chunks(model, [Unit("block", block)], 1)
    found = [(layout.dtype, layout.trainable, [field.name for field in layout.fields]) for layout in layouts]
    assert found == [
        (torch.float32, True, ["block.0.weight", "block.0.bias", "block.1.weight"]),
        (torch.float32, False, ["block.1.bias"]),
        (torch.float64, True, ["block.2.weight", "block.2.bias"]),
    ]
    assert {layout.unit for layout in layouts} == {"block"}


def test_the_dtype_that_is_computed_with_decides():
    model = nn.ModuleDict({"a": nn.Linear(2, 2)})
    layouts = assign_chunks(model, find_units(model), 1, {"a.weight": torch.bfloat16})
    assert [(layout.dtype, [f.name for f in layout.fields]) for layout in layouts] == [
        (torch.bfloat16, ["a.weight"]),
        (torch.float32, ["a.bias"]),
    ]


def test_chunks_follow_the_order_of_units():
    model = CASES["gpt"].build()
    layouts = assign_chunks(model, find_units(model, ["head", "blocks.2"]), 1)
    assert [layout.unit for layout in layouts] == [ROOT, "head", "blocks.2"]


def test_the_trainable_parameters_by_their_first_names():
    model = CASES["tied-frozen"].build()
    found = [name for name, _ in named_trainable(model)]
    assert "tok.weight" in found
    assert "head.weight" not in found
    assert not [name for name in found if name.startswith("layers.1")]
    assert len(found) == 1 + 2 * 4
