"""Values for one unit at a time: what a function gives, what files give, and that no value is made up."""

from collections.abc import Callable

import pytest
import safetensors.torch
import torch
from models import CASES, GPT
from torch import nn

from outgrow.parallel.units import ROOT, assign_chunks, find_units
from outgrow.runtime.building import build_model, is_placeholder, with_placeholders
from outgrow.runtime.filling import Filler, InitFiller, WeightsFiller, make_filler
from outgrow.runtime.weights import DTYPES

NAMES = list(CASES)


def empty(build: Callable[[], nn.Module]) -> nn.Module:
    return build_model(build, 0, lambda num_bytes: False).model


def filled(filler: Filler, model: nn.Module, units: list[str] | None = None) -> dict[str, torch.Tensor]:
    """First name -> value, filled unit by unit as an engine does; the model is as before in the end."""
    found = find_units(model, units)
    modules = {unit.name: unit.module for unit in found} | {ROOT: model}
    owned: dict[str, list[str]] = {}
    for layout in assign_chunks(model, found, 1):
        owned.setdefault(layout.unit, []).extend(item.name for item in layout.fields)
    values = {}
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters(remove_duplicate=False)}
    for unit, names in owned.items():
        parameters = {name: model.get_parameter(name) for name in names}
        tensors = {name: torch.full(p.shape, 7, dtype=p.dtype) for name, p in parameters.items()}
        filler.fill(unit, modules[unit], tensors)
        values |= tensors
    assert before == {name: (id(p), p.data_ptr()) for name, p in model.named_parameters(remove_duplicate=False)}
    assert set(values) == {name for name, _ in model.named_parameters()}
    return values


# ---- a function of the user's


def by_module(module: nn.Module) -> None:
    """Own parameters only, in the way of most `_init_weights`."""
    if isinstance(module, nn.LSTM | nn.MultiheadAttention):
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.5)
    elif isinstance(module, GPT):
        nn.init.normal_(module.pos, std=0.02)
    elif hasattr(module, "reset_parameters"):
        module.reset_parameters()


def recursive(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)


@pytest.mark.parametrize("init", [by_module, recursive])
@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_values_of_its_own(name, init):
    model = empty(CASES[name].build)
    values = filled(InitFiller(init, 3, model), model)
    assert all(bool(torch.isfinite(value).all()) for value in values.values())
    drawn = [value.flatten()[:8].tolist() for value in values.values() if value.numel() >= 8 and value.std() > 0]
    assert len({tuple(numbers) for numbers in drawn}) == len(drawn), "no two got the same random numbers"
    again = filled(InitFiller(init, 3, model), model)
    assert all(torch.equal(values[key], again[key]) for key in values)
    other = filled(InitFiller(init, 4, model), model)
    assert any(not torch.equal(values[key], other[key]) for key in values)


def test_a_modules_own_values_do_not_depend_on_units_or_on_values_that_were_there():
    model = empty(GPT)
    values = filled(InitFiller(by_module, 3, model), model)
    blocks = [f"blocks.{index}" for index in range(3)]
    for other, units in ((model, blocks), (model, ["blocks", "tok", "ln"]), (CASES["gpt"].model(), None)):
        found = filled(InitFiller(by_module, 3, other), other, units)
        assert all(torch.equal(found[name], value) for name, value in values.items())


def test_what_is_set_from_further_up_counts_as_in_apply():
    def init(module: nn.Module) -> None:
        if isinstance(module, GPT):
            nn.init.constant_(module.pos, 1)
            nn.init.constant_(module.blocks[1].fc.bias, 2)
            module.head.weight.data.fill_(3)
        elif isinstance(module, nn.ModuleList):
            for index, block in enumerate(module):
                nn.init.constant_(block.ln1.bias, index)
        else:
            for parameter in module.parameters(recurse=False):
                parameter.fill_(0.5)

    expected = CASES["gpt"].model()
    with torch.no_grad():
        expected.apply(init)
    model = empty(GPT)
    values = filled(InitFiller(init, 0, model), model)
    for name, parameter in expected.named_parameters():
        assert torch.equal(values[name], parameter), name


def test_a_tied_parameter_is_its_first_owners():
    def init(module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.fill_(1 if isinstance(module, nn.Embedding) else 2)

    for units in (None, ["tok", "layers"]):  # in two units, and outside of all
        model = empty(CASES["tied-frozen"].build)
        assert set(filled(InitFiller(init, 0, model), model, units)["tok.weight"].flatten().tolist()) == {1.0}
    with torch.device("meta"):
        tied = nn.Sequential(nn.Embedding(3, 3), nn.Linear(3, 3, bias=False))
    tied[1].weight = tied[0].weight
    both = nn.ModuleDict({"both": tied})
    with_placeholders(both)
    values = filled(InitFiller(init, 0, both), both, ["both"])  # in one unit
    assert {name: set(value.flatten().tolist()) for name, value in values.items()} == {"both.0.weight": {1.0}}
    assert tied[1].weight is tied[0].weight


def test_values_that_are_there_may_stay():
    model = CASES["gpt"].model()

    def init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.mul_(2)

    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    values = filled(InitFiller(init, 0, model), model)
    for name, value in values.items():
        linear = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear) and name.endswith("weight")
        assert torch.equal(value, expected[name] * 2 if linear else expected[name]), name


def test_a_parameter_that_nobody_initialised_is_named():
    model = empty(GPT)
    with pytest.raises(ValueError, match=r"init= left pos of unit <model> without values"):
        filled(InitFiller(lambda m: None if isinstance(m, GPT) else by_module(m), 0, model), model)

    def first_row(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight[:1])
            nn.init.zeros_(module.bias)

    model = empty(lambda: nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"left weight of unit <model> without"):
        filled(InitFiller(first_row, 0, model), model)
    assert is_placeholder(model.weight), "the model is as it was"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.float8_e4m3fn])
def test_no_dtype_hides_missing_values(dtype):
    def build() -> nn.Module:
        model = nn.Module()
        model.weight = nn.Parameter(torch.zeros(3).to(dtype))
        return model

    model = empty(build)
    with pytest.raises(ValueError, match="left weight"):
        filled(InitFiller(lambda m: None, 0, model), model)
    values = filled(InitFiller(lambda m: m.weight.zero_(), 0, model), model)
    assert not values["weight"].to(torch.complex64).any()


def test_a_tensor_put_in_place_of_a_parameters_is_taken_over():
    def init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(torch.full_like(module.weight, 3))
            module.bias.data = torch.full_like(module.bias, 4)

    model = empty(lambda: nn.Linear(2, 3))
    values = filled(InitFiller(init, 0, model), model)
    assert values["weight"].eq(3).all()
    assert values["bias"].eq(4).all()

    def other_shape(module: nn.Module) -> None:
        module.weight = nn.Parameter(torch.zeros(5))

    with pytest.raises(ValueError, match=r"replaced weight of a Linear of shape \(3, 2\) by shape \(5,\)"):
        filled(InitFiller(other_shape, 0, model), model)


def test_an_error_in_init_names_the_module_and_leaves_the_model_as_it_was():
    def init(module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            raise KeyError("mine")
        by_module(module)

    model = empty(GPT)
    before = {name: id(p) for name, p in model.named_parameters()}
    with pytest.raises(KeyError, match="mine") as caught:
        filled(InitFiller(init, 0, model), model)
    assert "in init= for tok (Embedding)" in caught.value.__notes__[0]
    assert before == {name: id(p) for name, p in model.named_parameters()}
    assert all(is_placeholder(parameter) for parameter in model.parameters())


# ---- files


def save(model: nn.Module, path, dtype: torch.dtype = torch.float32, drop: tuple[str, ...] = ()) -> dict:
    state = {
        name: (value.to(dtype) if value.is_floating_point() else value).clone()
        for name, value in model.state_dict().items()
        if name not in drop
    }
    safetensors.torch.save_file(state, path)
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_files_give_every_value_also_in_another_dtype(tmp_path, name, dtype):
    source = CASES[name].model()
    for buffer in source.buffers():
        buffer.add_(1)
    state = save(source, tmp_path / "model.safetensors", dtype)
    model = empty(CASES[name].build)
    filler = make_filler(None, tmp_path, 0, model)
    values = filled(filler, model)
    for key, parameter in source.named_parameters():
        assert torch.equal(values[key], state[key].to(parameter.dtype)), key
    for key, buffer in source.named_buffers():
        assert torch.equal(dict(model.named_buffers())[key], state[key].to(buffer.dtype)), key


def test_a_tied_parameter_may_be_stored_under_any_of_its_names(tmp_path):
    source = CASES["gpt-tied"].model()
    for drop in ("tok.weight", "head.weight"):
        save(source, tmp_path / "model.safetensors", drop=(drop,))
        model = empty(CASES["gpt-tied"].build)
        assert torch.equal(filled(WeightsFiller(tmp_path, model), model)["tok.weight"], source.tok.weight)
    untied = CASES["gpt"].model()
    save(untied, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"tok\.weight and head\.weight are one tied parameter .* but differ"):
        filled(WeightsFiller(tmp_path, model), model)


def test_our_own_aliases_are_understood_by_a_model_without_the_tie(tmp_path):
    value = torch.randn(67, 32)
    source = CASES["gpt"].model()
    state = {name: tensor.clone() for name, tensor in source.state_dict().items() if name != "head.weight"}
    state["tok.weight"] = value
    safetensors.torch.save_file(state, tmp_path / "w.safetensors", {"aliases": '{"head.weight": "tok.weight"}'})
    model = empty(CASES["gpt"].build)
    assert torch.equal(filled(WeightsFiller(tmp_path, model), model)["head.weight"], value)


class Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.register_buffer("scale", torch.tensor([1.0, 2.0]))
        self.register_buffer("table", torch.tensor([True, False]), persistent=False)
        self.inner.register_buffer("scale", self.scale)


def test_buffers_are_read_where_they_belong_to_the_state_dict(tmp_path):
    state = {name: value.clone() for name, value in Buffers().state_dict().items() if name != "inner.scale"}
    state |= {"scale": torch.tensor([5.0, 6.0]), "table": torch.zeros(9)}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    model = Buffers()
    make_filler(None, tmp_path, 0, model)
    assert model.scale.tolist() == model.inner.scale.tolist() == [5.0, 6.0]
    assert model.table.tolist() == [True, False], "what the model computes for itself stays"
    with torch.device("meta"):
        bare = Buffers()
    with_placeholders(bare)
    state["table"] = torch.tensor([False, True])
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    make_filler(None, tmp_path, 0, bare)
    assert bare.scale is bare.inner.scale
    assert bare.scale.tolist() == [5.0, 6.0]
    assert bare.table.tolist() == [False, True]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("inner.bias"), r"not those of this model. Without values: inner\.bias"),
        (lambda s: s.update(extra=torch.ones(1)), r"Not in the model: extra\. Rename"),
        (
            lambda s: s.update({"inner.bias": torch.ones(3)}),
            r"w\.safetensors: inner\.bias has the shape \[3\], .* \[2\]",
        ),
        (lambda s: s.update({"inner.bias": torch.ones(2, dtype=torch.int8)}), r"inner\.bias is torch\.int8, .*float32"),
        (lambda s: s.update({"scale": torch.ones(3)}), r"scale has the shape"),
    ],
)
def test_files_of_another_model_are_refused_before_anything_is_read(tmp_path, change, words):
    state = {name: value.clone() for name, value in Buffers().state_dict().items() if name != "inner.scale"}
    change(state)
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=words):
        make_filler(None, tmp_path, 0, empty(Buffers))


def test_names_that_differ_by_a_prefix_get_a_hint(tmp_path):
    model = nn.ModuleDict({"body": Buffers()})
    save(Buffers(), tmp_path / "a.safetensors")
    save(model, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"model's names have the prefix 'body\.', those in the files do not"):
        WeightsFiller(tmp_path / "a.safetensors", model)
    with pytest.raises(ValueError, match=r"names in the files have the prefix 'body\.', the model's do not"):
        WeightsFiller(tmp_path / "b.safetensors", Buffers())


def test_a_filler_is_made_of_one_of_both_or_none(tmp_path):
    model = nn.Linear(2, 2)
    assert make_filler(None, None, 0, model) is None
    assert isinstance(make_filler(by_module, None, 0, model), InitFiller)
    with pytest.raises(ValueError, match="init= and weights= both"):
        make_filler(by_module, tmp_path, 0, model)


def test_every_floating_dtype_of_the_format_can_be_read_into_a_parameter(tmp_path):
    for dtype in DTYPES:
        if dtype.is_floating_point:
            save(nn.Linear(2, 2), tmp_path / "w.safetensors", dtype)
            model = nn.Linear(2, 2)
            filled(WeightsFiller(tmp_path, model), model)
