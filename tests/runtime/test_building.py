"""Models that are built only where they fit: counted without memory, ties and buffers and all."""

import random
import subprocess
import sys

import numpy
import pytest
import torch
from models import CASES
from torch import nn

from outgrow.memory.errors import DoesNotFit
from outgrow.runtime.building import (
    build_model,
    fits_beside,
    is_placeholder,
    meta_buffers,
    needed_bytes,
    with_placeholders,
)

NAMES = list(CASES)
REGISTER, APPLY = nn.Module.register_parameter, nn.Module._apply


def never(num_bytes: int) -> bool:
    return False


def always(num_bytes: int) -> bool:
    return True


def bytes_of(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("name", NAMES)
def test_what_fits_is_built_as_it_is(name):
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(5)
        expected = CASES[name].build()
    asked: list[int] = []
    built = build_model(CASES[name].build, 5, lambda num_bytes: asked.append(num_bytes) is None)
    assert built.has_values
    assert built.num_bytes == bytes_of(expected) < asked[0] == needed_bytes(expected)
    assert not any(is_placeholder(parameter) for parameter in built.model.parameters())
    for key, value in expected.state_dict().items():
        assert torch.equal(built.model.state_dict()[key], value), key


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_has_every_name_and_shape_and_no_memory(name):
    expected = CASES[name].model()
    built = build_model(CASES[name].build, 5, never)
    model = built.model
    assert not built.has_values
    assert built.num_bytes == bytes_of(expected)
    alike = dict(expected.named_parameters(remove_duplicate=False))
    found = dict(model.named_parameters(remove_duplicate=False))
    assert list(found) == list(alike)
    for key, parameter in found.items():
        assert is_placeholder(parameter), key
        assert isinstance(parameter, nn.Parameter)
        assert parameter.is_leaf
        assert (parameter.shape, parameter.dtype, parameter.device.type) == (alike[key].shape, alike[key].dtype, "cpu")
        assert parameter.requires_grad == alike[key].requires_grad
        assert parameter.untyped_storage().nbytes() == parameter.itemsize
    assert len(set(map(id, found.values()))) == len(set(map(id, alike.values()))), "ties are kept"
    for key, buffer in expected.named_buffers():
        assert torch.equal(dict(model.named_buffers())[key], buffer), "buffers are real"
    assert nn.Module.register_parameter is REGISTER


@pytest.mark.parametrize("name", NAMES)
def test_a_placeholder_that_gets_memory_is_the_parameter_that_the_model_computes_with(name):
    case = CASES[name]
    expected, model = case.model().eval(), build_model(case.build, 5, never).model.eval()
    torch.optim.AdamW(model.parameters(), fused=True)
    for parameter, source in zip(model.parameters(), expected.parameters(), strict=True):
        parameter.data = source.detach().clone()
        assert not is_placeholder(parameter)
    inputs = case.batch(1, 2)[:-1]
    assert torch.equal(model(*inputs), expected(*inputs))


class Odd(nn.Module):
    """One parameter object under two names, set before and after; attributes, a scalar, nothing, a list, a table."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Parameter(torch.ones(3))
        self.a, self.b = shared, shared
        self.c = self.a
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.register_parameter("none", None)
        self.many = nn.ParameterList([torch.ones(2), torch.ones(2)])
        self.frozen = nn.Parameter(torch.arange(3), requires_grad=False)
        shared.scaled = True  # type: ignore[attr-defined]
        self.narrow = nn.Linear(2, 2).half()
        self.register_buffer("table", torch.arange(4.0), persistent=False)


def test_odd_parameters():
    built = build_model(Odd, 0, never)
    model = built.model
    assert isinstance(model, Odd)
    assert model.a is model.b is model.c
    assert model.none is None
    assert model.scalar.shape == ()
    assert model.empty.shape == (0, 4)
    assert model.narrow.weight.dtype is torch.float16
    assert (model.frozen.dtype, model.frozen.requires_grad) == (torch.int64, False)
    assert all(is_placeholder(parameter) for parameter in model.parameters())
    assert torch.equal(model.table, torch.arange(4.0))
    assert len(list(model.parameters())) == len(list(Odd().parameters()))
    assert built.num_bytes == bytes_of(Odd())


def test_attributes_and_classes_of_parameters_stay():
    class Special(nn.Parameter):
        pass

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = Special(torch.ones(2))
            weight.no_decay = True  # type: ignore[attr-defined]
            self.weight = weight

    weight = build_model(Model, 0, never).model.weight
    assert isinstance(weight, Special)
    assert weight.no_decay


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        (lambda model: model.to("cpu"), torch.float32),
        (lambda model: model.to("cpu", torch.bfloat16), torch.bfloat16),
        (lambda model: model.half().eval(), torch.float16),
        (lambda model: model.to_empty(device="cpu"), torch.float32),
        (lambda model: model.to(memory_format=torch.channels_last), torch.float32),
    ],
)
def test_a_function_may_move_and_convert_what_it_builds(change, dtype):
    for name in ("conv", "lstm", "gpt-tied"):
        model = build_model(lambda name=name: change(CASES[name].build()), 0, never).model
        assert all(is_placeholder(parameter) for parameter in model.parameters())
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert not meta_buffers(model)
    assert model.head.weight is model.tok.weight
    assert nn.Module._apply is APPLY


def test_a_module_that_keeps_a_list_of_its_parameters_hears_of_placeholders():
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kept = {}
            self.weight = nn.Parameter(torch.ones(2))

        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, value)
            if isinstance(value, nn.Parameter):
                self.kept[name] = value

    model = build_model(Keeps, 0, never).model
    assert model.kept["weight"] is model.weight


def test_counting_leaves_no_trace_in_random_numbers():
    def build() -> nn.Module:
        model = nn.Linear(2, 2)
        with torch.no_grad():
            model.weight.fill_(random.random() + numpy.random.rand())
        return model

    random.seed(1)
    numpy.random.seed(1)
    expected = random.random() + numpy.random.rand()
    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model = build_model(build, 0, always).model
    assert model.weight[0, 0].item() == torch.tensor(expected, dtype=torch.float32).item()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_that_was_there_before_is_not_built_again():
    model, calls = nn.Linear(2, 2), []
    built = build_model(lambda: calls.append(1) or model, 0, never)
    assert built.model is model
    assert built.has_values
    assert len(calls) == 1


class Reads(nn.Module):
    """Decides by a value of a parameter, which counting does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(10, 10)
        if self.inner.weight.sum().item() > 1e9:
            raise AssertionError


def test_a_function_that_cannot_be_counted_is_called_as_it_is_where_that_fits():
    asked: list[int] = []
    built = build_model(Reads, 0, lambda num_bytes: asked.append(num_bytes) is None)
    assert built.has_values
    assert asked == [440]
    with pytest.raises(
        DoesNotFit, match=r"without memory .*440 B when it stopped.* and raised RuntimeError: .*meta"
    ) as e:
        build_model(Reads, 0, never)
    assert isinstance(e.value.__cause__, RuntimeError)
    assert nn.Module.register_parameter is REGISTER


def test_an_error_of_the_functions_own_comes_as_it_is():
    def build() -> nn.Module:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        build_model(build, 0, always)
    assert nn.Module.register_parameter is REGISTER


def test_a_model_on_meta_gets_placeholders_and_its_buffers_are_named():
    with torch.device("meta"):
        model = CASES["conv"].build()
    built = with_placeholders(model)
    assert built.model is model
    assert not built.has_values
    assert all(is_placeholder(parameter) for parameter in model.parameters())
    assert meta_buffers(model)[:2] == ["stem.1.running_mean", "stem.1.running_var"]
    assert meta_buffers(CASES["conv"].model()) == []
    assert with_placeholders(CASES["conv"].model()).has_values

    def build() -> nn.Module:
        with torch.device("meta"):
            return nn.Linear(2, 2)

    assert not build_model(build, 0, always).has_values, "a function may use meta itself"


def test_what_building_takes_is_the_state_and_the_largest_unit_again():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8))
    state = 4 * (16 + 32 + 16) + 4 * 16 + 8
    assert needed_bytes(model) == state + 4 * 32
    assert needed_bytes(model, ["0"]) == state + 4 * 16


@pytest.mark.parametrize(
    ("needed", "process", "budget", "fits"),
    [(60, 40, 100, True), (61, 40, 100, False), (10**15, 1, None, True), (0, 101, 100, False)],
)
def test_what_fits_beside_the_process(needed, process, budget, fits):
    assert fits_beside(needed, process, budget) is fits


def test_counting_takes_the_memory_of_one_layer():
    code = """
import torch
from torch import nn
from outgrow.memory.process import read_process_memory
from outgrow.runtime.building import build_model
layer = 64 << 20
before = read_process_memory().resident_bytes
built = build_model(lambda: nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(12))), 0, lambda n: False)
grown = read_process_memory().peak_bytes - before
assert built.num_bytes == 12 * layer
assert grown < 3 * layer, grown
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
