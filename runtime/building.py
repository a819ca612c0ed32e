"""Building a model that may be larger than memory: counted first, built in full only where it fits.

Owns the call of the user's function, and what stands in for parameters that have no memory yet. Does not own where
values come from then (`runtime/filling.py`), nor the budget (`memory/budget.py`).

    counted      the function runs while every parameter goes to `meta` as soon as it is registered: parameters never
                 exist together, buffers (masks, rotary tables, running statistics) are real
    it fits      the function is called again, as it is, and its values are kept
    it does not  the counted model is kept, with a placeholder for every parameter: a tensor on the CPU of the right
                 shape and dtype whose elements are all the same few bytes (optimizers and `.data =` refuse `meta`)
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakTensorKeyDictionary

from ..memory.budget import format_bytes
from ..memory.errors import DoesNotFit
from ..parallel.units import find_units

__all__ = [
    "Built",
    "build_model",
    "fits_beside",
    "is_placeholder",
    "meta_buffers",
    "needed_bytes",
    "twin_of",
    "with_placeholders",
]

_MARK = "outgrow_placeholder"


@dataclass(frozen=True)
class Built:
    """A model as it came out of its function.

    Attributes:
        has_values: every parameter has its values; else some are placeholders (`is_placeholder`).
        num_bytes: of all parameters and buffers, as built.
    """

    model: nn.Module
    has_values: bool
    num_bytes: int


def build_model(
    build: Callable[[], nn.Module], seed: int, fits: Callable[[int], bool], units: Sequence[str] | None = None
) -> Built:
    """Call the user's function under a seed, so that every rank builds the same weights; in full only where it fits.

    The function is called once to count and, where what it builds fits, a second time as it is. Counting leaves no
    trace in the random numbers of torch, numpy and Python.

    Args:
        fits: bytes that building in full takes (see `needed_bytes`) -> whether they are there.
        units: names of the model's units, as in `find_units`.

    Raises:
        DoesNotFit: the function cannot run without memory for its parameters, and what it had built by then does not
            fit already; the error that it raised is the cause.
        Whatever the function raises when it is called as it is.
    """
    counter = _Counter()
    model = None
    with _seeded(seed), _no_trace():
        try:
            with _parameters_on_meta(counter):
                model = build()
        except Exception as error:
            if not fits(counter.num_bytes):
                raise _cannot_count(error, counter.num_bytes) from error
    if model is not None:
        if not _on_meta(model):  # a model that was there before: nothing was built
            return Built(model, True, _state_bytes(model))
        if not fits(needed_bytes(model, units)):
            return with_placeholders(model)
        del model
    with _seeded(seed):
        return with_placeholders(build())


def with_placeholders(model: nn.Module) -> Built:
    """Put placeholders in the places of the model's parameters on `meta`, in the model itself.

    Ties stay ties; `requires_grad`, subclasses of Parameter and attributes on parameters stay as they are. Buffers on
    `meta` stay there (see `meta_buffers`).
    """
    placeholders: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter.is_meta and not is_lazy(parameter):
                if id(parameter) not in placeholders:
                    placeholders[id(parameter)] = _placeholder(parameter)
                setattr(module, name, placeholders[id(parameter)])  # not past the module: some keep lists of their own
    return Built(model, not placeholders, _state_bytes(model))


def is_placeholder(parameter: torch.Tensor) -> bool:
    """Whether a parameter has no values yet. One whose `.data` was pointed at real memory since is none."""
    return getattr(parameter, _MARK, None) == parameter.data_ptr() and parameter.untyped_storage().nbytes() <= max(
        parameter.itemsize, 1
    )


def meta_buffers(model: nn.Module) -> list[str]:
    """Names of the buffers that have no values."""
    return [name for name, buffer in model.named_buffers() if buffer.is_meta]


def needed_bytes(model: nn.Module, units: Sequence[str] | None = None) -> int:
    """What building in full takes: all parameters and buffers, and the largest unit once more, while it is moved to
    where it is to lie."""
    largest = max(
        sum(p.nbytes for p in unit.module.parameters() if not is_lazy(p)) for unit in find_units(model, units)
    )
    return _state_bytes(model) + largest


def fits_beside(needed: int, process_bytes: int, budget_bytes: int | None) -> bool:
    """Whether `needed` bytes fit beside what the process holds already; without a budget everything does."""
    return budget_bytes is None or process_bytes + needed <= budget_bytes


# ---- counting


@dataclass
class _Counter:
    """Bytes of the parameters registered so far."""

    num_bytes: int = 0


@contextmanager
def _parameters_on_meta(counter: _Counter) -> Iterator[None]:
    """Every parameter that is registered meanwhile goes to `meta`; one registered twice stays one parameter.

    What moves or converts a model (`.to("cpu")`, `.bfloat16()`) changes dtypes there, and leaves it on `meta`.
    """
    twins: Any = WeakTensorKeyDictionary()  # the parameter as it was registered -> on meta; the first is let go
    register, apply = nn.Module.register_parameter, nn.Module._apply

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is None or param.is_meta or is_lazy(param):
            return
        if param not in twins:
            twins[param] = twin_of(param, param.data.to("meta"))
            counter.num_bytes += param.nbytes
        self._parameters[name] = twins[param]

    def apply_on_meta(self: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        def keeping_meta(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.is_meta:
                return fn(tensor)
            return torch.empty_like(tensor, dtype=fn(torch.empty(0, dtype=tensor.dtype)).dtype)

        return apply(self, keeping_meta, recurse)

    nn.Module.register_parameter, nn.Module._apply = register_on_meta, apply_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter, nn.Module._apply = register, apply


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        yield


@contextmanager
def _no_trace() -> Iterator[None]:
    """Put numpy's and Python's random numbers back to where they were."""
    states = random.getstate(), numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])


def _cannot_count(error: Exception, num_bytes: int) -> DoesNotFit:
    return DoesNotFit(
        "the function that builds the model was called without memory for its parameters, because they need more than "
        f"the budget has ({format_bytes(num_bytes)} when it stopped), and raised {type(error).__name__}: {error}. It "
        "may set up layers and buffers, but not read parameters' values or assign to their .data; take that "
        "out of it and give init= or weights=, or give more memory"
    )


# ---- placeholders


def _placeholder(parameter: nn.Parameter) -> nn.Parameter:
    data = torch.empty((), dtype=parameter.dtype).expand(parameter.shape)
    placeholder = twin_of(parameter, data)
    setattr(placeholder, _MARK, placeholder.data_ptr())
    return placeholder


def twin_of(parameter: nn.Parameter, data: torch.Tensor) -> nn.Parameter:
    """A parameter with other data, else the same: its class, its attributes, whether it is trained."""
    twin = torch.Tensor._make_subclass(type(parameter), data, parameter.requires_grad)
    vars(twin).update(vars(parameter))
    return twin


def _on_meta(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _state_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each once; those without a shape yet count nothing."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.nbytes for tensor in tensors if not is_lazy(tensor))
