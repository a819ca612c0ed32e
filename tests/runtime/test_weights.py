"""Weight files: what is written can be read by anyone, by the model's own names."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from models import CASES
from safetensors import safe_open
from torch import nn

from outgrow.parallel.units import assign_chunks, find_units
from outgrow.runtime.weights import aliases_of, full_state_dict, load_weights, write_safetensors, write_weights

TENSORS = {
    "float32": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "float64": torch.tensor([1 / 3], dtype=torch.float64),
    "float16": torch.tensor([0.1, -2.0], dtype=torch.float16),
    "bfloat16": torch.tensor([[0.1], [3.0], [-7.5]], dtype=torch.bfloat16),
    "int64": torch.tensor([2**40, -1]),
    "int32": torch.tensor([2**30, -1], dtype=torch.int32),
    "int16": torch.tensor([300], dtype=torch.int16),
    "int8": torch.tensor([-128, 127], dtype=torch.int8),
    "uint8": torch.tensor([255], dtype=torch.uint8),
    "bool": torch.tensor([True, False, True]),
    "scalar": torch.tensor(7),
    "scalar float": torch.tensor(0.25),
    "empty": torch.empty(0),
    "empty with a shape": torch.empty(4, 0, 2, dtype=torch.bfloat16),
    "transposed": torch.arange(6.0).view(2, 3).t(),
    "complex": torch.tensor([1 + 2j, -3j]),
    'quote " and ünïcode': torch.ones(1),
}


def write(path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    frame = {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    write_safetensors(path, frame, tensors.items(), metadata or {})


def test_the_library_reads_what_was_written(tmp_path):
    path = tmp_path / "weights.safetensors"
    write(path, TENSORS, {"format": "pt"})
    found = safetensors.torch.load_file(path)
    assert list(found) == list(TENSORS) or set(found) == set(TENSORS)
    for name, value in TENSORS.items():
        assert found[name].dtype is value.dtype, name
        assert found[name].shape == value.shape, name
        assert torch.equal(found[name], value), name
    with safe_open(str(path), framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["weights.safetensors"], "nothing unfinished is left"


@pytest.mark.parametrize("name", ["a", "ab", "abc", "abcd", "abcde"])
def test_values_start_at_a_multiple_of_8_bytes(tmp_path, name):
    write(tmp_path / "w", {name: torch.ones(3)})
    content = (tmp_path / "w").read_bytes()
    assert int.from_bytes(content[:8], "little") % 8 == 0
    assert len(content) % 8 == 3 * 4 % 8


def test_values_come_in_any_order_and_are_cast_to_the_dtype_announced(tmp_path):
    frame = {"b": (torch.bfloat16, (2,)), "a": (torch.float32, (2,)), "none": (torch.float32, (0, 3))}
    values = [("none", torch.empty(0, 3)), *((name, torch.full((2,), 1 / 3)) for name in "ab")]
    write_safetensors(tmp_path / "w", frame, values, {})
    with safe_open(str(tmp_path / "w"), framework="pt") as file:
        assert list(file.offset_keys()) == ["b", "a", "none"], "the order of the frame"
    found = safetensors.torch.load_file(tmp_path / "w")
    assert torch.equal(found["b"], torch.full((2,), 1 / 3).bfloat16())
    assert torch.equal(found["a"], torch.full((2,), 1 / 3))


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    write(path, {"a": torch.ones(2)})

    def values() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.zeros(2)
        raise OSError(28, "no space left")

    with pytest.raises(OSError, match="no space left"):
        write_safetensors(path, {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))}, values(), {})
    assert torch.equal(safetensors.torch.load_file(path)["a"], torch.ones(2))
    assert list(tmp_path.iterdir()) == [path], "nothing unfinished is left"


def test_a_dtype_that_the_format_has_not_is_refused_by_name(tmp_path):
    odd = torch.zeros(2, dtype=torch.complex128)
    with pytest.raises(ValueError, match=r"odd\.one is torch\.complex128, which safetensors files cannot hold"):
        write(tmp_path / "w", {"odd.one": odd})
    assert not list(tmp_path.iterdir())


class Held:
    """What weights need of a model's state: chunks that are there only while they are gathered."""

    def __init__(self, model: nn.Module, masters: Mapping[str, torch.Tensor] | None = None) -> None:
        units = find_units(model)
        self.chunks = [SimpleNamespace(layout=layout) for layout in assign_chunks(model, units, 1)]
        self._model, self._masters = model, masters or {}
        self.asked: list[torch.Tensor] = []
        self.gathered: list[int] = []
        self.held = 0

    @contextmanager
    def gathered_chunk(self, index: int) -> Iterator[dict[str, torch.Tensor]]:
        assert self.held == 0, "one chunk at a time"
        self.gathered.append(index)
        self.held += 1
        fields = self.chunks[index].layout.fields
        values = {item.name: self._masters.get(item.name, self._model.get_parameter(item.name)) for item in fields}
        values = {name: value.detach().clone() for name, value in values.items()}
        yield values
        self.held -= 1
        for value in values.values():
            value.zero_()  # what lay there is gone

    def from_first_rank(self, value: torch.Tensor) -> torch.Tensor:
        self.asked.append(value)
        return value


class Shared(nn.Module):
    """Tied parameters, a buffer under two names, one that is not kept, one that is a number."""

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.tok.weight
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("mask", torch.tensor([True, False]))
        self.head.register_buffer("mask", self.mask)
        self.register_buffer("cache", torch.ones(9), persistent=False)


def dtypes_of(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in model.named_parameters()}


def test_further_names_point_to_the_first():
    assert aliases_of(Shared()) == {"head.weight": "tok.weight", "head.mask": "mask"}
    assert aliases_of(CASES["gpt-tied"].model()) == {"head.weight": "tok.weight"}
    assert aliases_of(CASES["gpt"].model()) == {}


def test_a_state_dict_has_every_name_of_the_models_own_and_copies():
    model = Shared()
    found = full_state_dict(model, Held(model), dtypes_of(model))
    expected = model.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    model.tok.weight.data.zero_()
    model.norm.running_mean.fill_(9)
    assert found["tok.weight"].any()
    assert not found["norm.running_mean"].any()


def test_masters_stand_for_the_parameters_that_have_them():
    model = Shared().to(torch.bfloat16)
    master = torch.full((5, 3), 1 / 3)
    dtypes = dtypes_of(model) | {"tok.weight": torch.float32}
    found = full_state_dict(model, Held(model, {"tok.weight": master}), dtypes)
    assert torch.equal(found["tok.weight"], master)
    assert torch.equal(found["head.weight"], master)
    assert found["norm.weight"].dtype is torch.bfloat16


def test_a_file_holds_tied_tensors_once_and_gives_both_names_back(tmp_path):
    model, path = Shared(), tmp_path / "weights.safetensors"
    write_weights(path, model, Held(model), dtypes_of(model))
    with safe_open(str(path), framework="pt") as file:
        stored = set(file.keys())
        aliases = json.loads(file.metadata()["aliases"])
    assert stored == set(model.state_dict()) - {"head.weight", "head.mask"}
    assert aliases == {"head.weight": "tok.weight", "head.mask": "mask"}
    found, expected = load_weights(path), model.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert found["head.weight"] is found["tok.weight"]
    Shared().load_state_dict(found)


def test_masters_are_what_is_written(tmp_path):
    model = nn.Linear(2, 1, bias=False).to(torch.bfloat16)
    state = Held(model, {"weight": torch.tensor([[1 / 3, 2 / 3]])})
    write_weights(tmp_path / "w", model, state, {"weight": torch.float32})
    assert torch.equal(load_weights(tmp_path / "w")["weight"], torch.tensor([[1 / 3, 2 / 3]]))


def test_ranks_without_a_path_write_nothing_but_take_part(tmp_path):
    model = CASES["conv"].model()
    state = Held(model)
    write_weights(None, model, state, dtypes_of(model))
    assert state.gathered == list(range(len(state.chunks))), "gathering is collective"
    assert len(state.asked) == len(list(model.buffers()))
    assert not list(tmp_path.iterdir())


def test_a_rank_that_cannot_write_does_not_keep_the_others_waiting(tmp_path):
    model = CASES["conv"].model()
    state = Held(model)
    with pytest.raises(FileNotFoundError):
        write_weights(tmp_path / "no" / "folder", model, state, dtypes_of(model))
    assert state.gathered == list(range(len(state.chunks)))
    assert state.held == 0


def test_parameters_that_are_elsewhere_are_written_in_the_models_order(tmp_path):
    model, whole = CASES["gpt-tied"].model(), CASES["gpt-tied"].model()
    state = Held(whole)
    dtypes = dtypes_of(model)
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    write_weights(tmp_path / "w", model, state, dtypes)
    found, expected = load_weights(tmp_path / "w"), whole.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert list(found) == [name for name in expected if name != "head.weight"] + ["head.weight"]


def test_files_of_others_can_be_read(tmp_path):
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "w")
    assert torch.equal(load_weights(tmp_path / "w")["a"], torch.ones(2))
