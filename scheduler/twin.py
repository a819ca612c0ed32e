"""Structural twins of a model: the same modules, with tensors that have shapes and no values.

Owns the copies that traced passes run on. A *fake* twin runs the kernels that the real device would run (so autograd
saves what it will save in training); a *meta* twin takes the generic ones, and serves where code asks a tensor for its
device. Neither allocates a parameter, and the model itself, its buffers and its random numbers stay as they are. Does
not own what is observed of a pass (`trace.py`, `storage_watch.py`).
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

__all__ = ["Shapes", "Twin", "fake_twin", "meta_twin", "shared_twin"]

Shapes = Mapping[str, tuple[Sequence[int], torch.dtype]]
"""Parameter name -> its true shape and dtype, where the parameter itself is a placeholder or dropped."""


@dataclass(frozen=True)
class Twin:
    """A model to run instead of the real one.

    Attributes:
        model: the copy.
        names: id of each of its parameters -> name.
        foreign: ids of the real model's parameters, which a pass over the copy must not meet.
        convert: the batch, as the copy takes it.
        mode: a context around everything that is done with the copy.
        has_values: whether its tensors hold numbers.
    """

    model: nn.Module
    names: dict[int, str]
    foreign: frozenset[int]
    convert: Callable[[Any], Any]
    mode: Callable[[], Any]
    has_values: bool = False


def fake_twin(model: nn.Module, shapes: Shapes | None = None) -> Twin:
    """A twin of fake tensors. Raises whatever copying the modules raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)

    with mode:
        return _twin(model, shapes or {}, fake, None, lambda: _reentrant(mode))


def meta_twin(model: nn.Module, shapes: Shapes | None = None) -> Twin:
    """A twin on the meta device. Raises whatever copying the modules raises."""
    return _twin(model, shapes or {}, lambda tensor: torch.empty_like(tensor, device="meta"), "meta", nullcontext)


def shared_twin(model: nn.Module) -> Twin:
    """A twin that shares the parameters' values, with gradients, buffers and module state of its own."""

    def same(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach() if isinstance(tensor, nn.Parameter) else tensor.detach().clone()

    twin = _twin(model, {}, same, None, nullcontext)
    return Twin(twin.model, twin.names, twin.foreign, lambda batch: batch, nullcontext, has_values=True)


@contextmanager
def _reentrant(mode: Any) -> Iterator[None]:
    with mode:
        yield


def _twin(
    model: nn.Module,
    shapes: Shapes,
    like: Callable[[torch.Tensor], torch.Tensor],
    device: str | None,
    mode: Callable[[], Any],
) -> Twin:
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        if name in shapes:
            shape, dtype = shapes[name]
            empty = torch.empty(tuple(shape), dtype=dtype, device=device or parameter.device)
        else:
            empty = like(parameter)
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    foreign = frozenset(memo)
    for buffer in model.buffers():
        memo[id(buffer)] = like(buffer)
    twin = copy.deepcopy(model, memo)
    names = {id(parameter): name for name, parameter in twin.named_parameters()}
    return Twin(twin, names, foreign, lambda batch: _converted(batch, like), mode)


def _converted(value: Any, like: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    def convert(leaf: Any) -> Any:
        if isinstance(leaf, Mapping):  # one that torch's trees do not know
            return type(leaf)({key: _converted(item, like) for key, item in leaf.items()})  # pyright: ignore[reportCallIssue]
        if isinstance(leaf, torch.Tensor):
            return like(leaf).requires_grad_(leaf.requires_grad)
        return leaf

    return tree_map(convert, value)
