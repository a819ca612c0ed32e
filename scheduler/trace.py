"""Recording the order in which a model runs its units, and which parameters each run of a unit uses.

Owns the traced pass: a structural copy of the model, without values, runs one micro-batch, so nothing is computed,
nothing is allocated and no buffer, random number or weight of the real model changes. Where a model cannot run so (its
control flow looks at values), the real one runs once, and its buffers and random numbers are put back. Does not own
the copies (`twin.py`), what becomes of storages (`storage_watch.py`), nor what is made of the order (`passes.py`).
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ..parallel.units import Unit
from .selective import is_kept
from .storage_watch import StorageWatch
from .twin import Shapes, Twin, fake_twin, meta_twin
from .workspace import hidden_bytes, library_bytes, workspace_bytes

__all__ = ["Call", "Phase", "Trace", "record", "record_without_values", "trace_model"]

_log = logging.getLogger(__name__)

Forward = Callable[[nn.Module, Any], Any]
Loss = Callable[[Any, Any], torch.Tensor]
InputDtype = Callable[[nn.Module], torch.dtype | None]

Phase = tuple[str, int]
"""What a pass is doing: ("F", run) from the begin of a unit run to the next one's, ("B", run) likewise, ("before", 0)
until the first unit, ("loss", 0) from the end of the last unit, ("loss", 1) the backward pass up to the first unit."""


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
    model: nn.Module,
    units: Sequence[Unit],
    forward: Forward,
    micro_batch: Any,
    shapes: Shapes | None = None,
    input_dtype: InputDtype | None = None,
) -> Trace:
    """Record one forward pass of `forward(model, micro_batch)`.

    Args:
        shapes: name -> (shape, dtype) of parameters that are placeholders or dropped.
        input_dtype: f(unit's module) -> dtype that its floating inputs are cast to, or None; for units whose module
            has no hook that does so already.

    Raises:
        whatever the model raises when its real forward pass fails: a user's error, unchanged.
    """
    found = record_without_values(model, units, forward, None, micro_batch, shapes, input_dtype)
    if found is not None:
        return found[0]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    real = Twin(model, names, frozenset(), lambda batch: batch, nullcontext, has_values=True)
    try:
        with torch.random.fork_rng(), torch.no_grad():
            return record(real, units, forward, None, micro_batch, None, input_dtype)
    finally:
        for buffer, value in buffers:
            buffer.copy_(value)


def record_without_values(
    model: nn.Module,
    units: Sequence[Unit],
    forward: Forward,
    loss: Loss | None,
    micro_batch: Any,
    shapes: Shapes | None = None,
    input_dtype: InputDtype | None = None,
) -> tuple[Trace, StorageWatch, str] | None:
    """A pass on fake tensors, or else on the meta device; with a loss, its backward too. None: the model needs values.

    Returns:
        The order, the log of storages, and how: "fake" or "meta".
    """
    for how, make in (("fake", fake_twin), ("meta", meta_twin)):
        try:
            twin = make(model, shapes)
            watch = StorageWatch(replaces=True)
            with torch.random.fork_rng(devices=[]):
                return record(twin, units, forward, loss, micro_batch, watch, input_dtype), watch, how
        except Exception as error:  # any model code may fail without values, in any way: then the next kind decides
            _log.info("the model does not run on %s tensors (%s: %s)", how, type(error).__name__, error)
    return None


def record(
    twin: Twin,
    units: Sequence[Unit],
    forward: Forward,
    loss: Loss | None,
    micro_batch: Any,
    watch: StorageWatch | None,
    input_dtype: InputDtype | None = None,
) -> Trace:
    """One pass over `twin`: forward, and where a loss is given, the loss and the backward pass."""
    modules = dict(twin.model.named_modules())
    recorder = _Recorder(twin, watch)
    handles = []
    for index, unit in enumerate(units):
        module = modules.get(unit.name, twin.model)
        dtype = input_dtype(module) if input_dtype is not None else None
        handles.append(module.register_forward_pre_hook(recorder.enter(index, dtype), with_kwargs=True, prepend=True))
        handles.append(module.register_forward_hook(recorder.leave(index), with_kwargs=True))
    if loss is not None:
        assert watch is not None
        for parameter in twin.model.parameters():
            if parameter.requires_grad:
                handles.append(parameter.register_post_accumulate_grad_hook(_take_gradient(watch)))
    try:
        with twin.mode():
            batch = twin.convert(micro_batch)
            if watch is not None:
                for leaf in [*twin.model.parameters(), *twin.model.buffers(), *_tensors(batch)]:
                    watch.ignore(leaf)
            with recorder:
                _run(twin.model, forward, loss, batch, recorder)
    finally:
        if watch is not None:
            watch.close()
        for handle in handles:
            handle.remove()
    return Trace(tuple(recorder.calls), frozenset(recorder.between), not twin.has_values)


def _run(model: nn.Module, forward: Forward, loss: Loss | None, batch: Any, recorder: "_Recorder") -> None:
    watch = recorder.watch
    recorder.begin(("before", 0))
    with watch.saving() if watch is not None else nullcontext():
        output = forward(model, batch)
        recorder.begin(("loss", 0))
        if loss is None:
            return
        value = loss(output, batch)
    del output
    recorder.in_forward = False
    recorder.begin(("loss", 1))
    if value.requires_grad:
        value.backward()


def _take_gradient(watch: StorageWatch) -> Callable[[torch.Tensor], None]:
    def hook(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        watch.gradient(parameter.grad)
        parameter.grad = None

    return hook


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


class _Recorder(TorchDispatchMode):
    """Notes every operator that takes a parameter, with the unit that is running, and every storage that one makes."""

    def __init__(self, twin: Twin, watch: StorageWatch | None) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.between: set[str] = set()
        self.watch = watch
        self.in_forward = True
        self._names = twin.names
        self._foreign = twin.foreign
        self._has_values = twin.has_values
        self._open: list[tuple[int, set[str]]] = []

    def begin(self, phase: Phase) -> None:
        if self.watch is not None:
            self.watch.phase(phase)

    def enter(self, unit: int, dtype: torch.dtype | None) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if self.in_forward:  # else a checkpoint of the model's own code runs the unit again
                self._open.append((unit, {self._names[id(parameter)] for parameter in module.parameters()}))
                run = len(self.calls)
                self.begin(("F", run))
                if self.watch is not None:
                    self.watch.enter(run)
                    for leaf in _tensors((args, kwargs)):
                        given = self.watch.find(leaf)
                        if given is not None and run not in given.passed_to:
                            given.passed_to.append(run)
            return None if dtype is None else (_cast(args, dtype), _cast(kwargs, dtype))

        return hook

    def leave(self, unit: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not self.in_forward:
                return
            opened, used = self._open.pop()
            assert opened == unit, f"units {opened} and {unit} overlap"
            run = len(self.calls)
            outputs = _tensors(output)
            has_backward = self._has_values and not torch.is_grad_enabled()
            has_backward = has_backward or any(leaf.requires_grad for leaf in outputs)
            self.calls.append(Call(unit, frozenset(used), has_backward))
            if self.watch is None:
                return
            self.watch.leave(run)
            for leaf in outputs:
                made = self.watch.find(leaf)
                if made is not None and run not in made.returned_by:
                    made.returned_by.append(run)
            inputs = {id(leaf) for leaf in _tensors((args, kwargs))}
            reached = [leaf for leaf in outputs if leaf.requires_grad and id(leaf) not in inputs]
            if reached:
                register_multi_grad_hook(reached, lambda _gradient: self.begin(("B", run)), mode="any")

        return hook

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        into = self._open[-1][1] if self._open else self.between
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                if (name := self._names.get(id(leaf))) is not None:
                    if self.in_forward:
                        into.add(name)
                elif id(leaf) in self._foreign:
                    raise RuntimeError("the copy of the model reaches back to the model's own parameters")
        result = func(*args, **kwargs)
        if self.watch is not None:
            made = _tensors(result)
            larger = hidden_bytes(func, args)
            stays, is_write = is_kept(func, args), func._schema.is_mutable
            for position, leaf in enumerate(made):
                storage = self.watch.made(leaf, larger.get(position, 0))
                if is_write:
                    self.watch.changed(storage)
                elif stays:
                    self.watch.keep(storage)
            self.watch.library(library_bytes(func, args))
            if extra := workspace_bytes(func, args, made):
                self.watch.workspace(extra)
        return result


def _cast(value: Any, dtype: torch.dtype) -> Any:
    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    return tree_map(cast, value)
