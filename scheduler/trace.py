"""Recording the order in which a model runs its units, and which parameters each run of a unit uses.

Owns the traced pass: a structural copy of the model on the `meta` device runs one micro-batch forward, so nothing is
computed, nothing is allocated and no buffer, random number or weight of the real model changes. Where a model cannot
run on `meta` (its control flow looks at values), the real one runs forward once, and its buffers and random numbers
are put back. Does not own what is made of the order (`scheduler/passes.py`).
"""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ..parallel.units import Unit

__all__ = ["Call", "Trace", "trace_model"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Call:
    """One run of a unit within a forward pass; its place in `Trace.calls` is the unit index in actions.

    Attributes:
        unit: index into the units that were given.
        parameters: names of the parameters used while it ran, its own and others' (tied weights).
        has_backward: whether a gradient can flow back into it.
    """

    unit: int
    parameters: frozenset[str]
    has_backward: bool


@dataclass(frozen=True, slots=True)
class Trace:
    """The order of unit runs of one forward pass.

    Attributes:
        calls: the runs, in order.
        between: names of parameters used outside of every unit.
        on_meta: False where the real model had to run.
    """

    calls: tuple[Call, ...]
    between: frozenset[str]
    on_meta: bool


def trace_model(
    model: nn.Module, units: Sequence[Unit], forward: Callable[[nn.Module, Any], Any], micro_batch: Any
) -> Trace:
    """Record one forward pass of `forward(model, micro_batch)`.

    Raises:
        whatever the model raises when its real forward pass fails: a user's error, unchanged.
    """
    try:
        memo: dict[int, Any] = {}
        for tensor in [*model.parameters(), *model.buffers()]:
            memo[id(tensor)] = _meta_like(tensor)
        twin = copy.deepcopy(model, memo)
        with torch.random.fork_rng(devices=[]):
            return _record(twin, units, forward, tree_map(_to_meta, micro_batch), on_meta=True)
    except Exception as error:  # any model code may fail on meta tensors, in any way: then the real pass decides
        _log.info("the model does not run on meta tensors (%s: %s); tracing it for real", type(error).__name__, error)
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng(), torch.no_grad():
            return _record(model, units, forward, micro_batch, on_meta=False)
    finally:
        for buffer, value in buffers:
            buffer.copy_(value)


def _meta_like(tensor: torch.Tensor) -> torch.Tensor:
    meta = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(meta, requires_grad=tensor.requires_grad)
    return meta


def _to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def _record(
    model: nn.Module, units: Sequence[Unit], forward: Callable[[nn.Module, Any], Any], micro_batch: Any, on_meta: bool
) -> Trace:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    modules = dict(model.named_modules())
    recorder = _Recorder(names)
    handles = []
    for index, unit in enumerate(units):
        module = modules.get(unit.name, model)
        handles.append(module.register_forward_pre_hook(recorder.enter(index)))
        handles.append(module.register_forward_hook(recorder.leave(index, on_meta)))
    try:
        with recorder:
            forward(model, micro_batch)
    finally:
        for handle in handles:
            handle.remove()
    return Trace(tuple(recorder.calls), frozenset(recorder.between), on_meta)


class _Recorder(TorchDispatchMode):
    """Notes every operator that takes a parameter, with the unit that is running."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names
        self.calls: list[Call] = []
        self.between: set[str] = set()
        self._open: list[tuple[int, set[str]]] = []

    def enter(self, unit: int) -> Callable[..., None]:
        def hook(module: nn.Module, _args: Any) -> None:
            own = {self.names[id(parameter)] for parameter in module.parameters()}
            self._open.append((unit, own))

        return hook

    def leave(self, unit: int, knows_gradients: bool) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            opened, used = self._open.pop()
            assert opened == unit, f"units {opened} and {unit} overlap"
            has_backward = not knows_gradients or any(
                isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree_leaves(output)
            )
            self.calls.append(Call(unit, frozenset(used), has_backward))

        return hook

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        into = self._open[-1][1] if self._open else self.between
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor) and (name := self.names.get(id(leaf))) is not None:
                into.add(name)
        return func(*args, **kwargs)
