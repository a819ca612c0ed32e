"""Seconds of forward, of the two parts of a backward and of a whole one, of every unit run, measured alone.

Owns the measurement: each kind of unit is made once with values of its own, beside the model, which may have none or
lie elsewhere; units that are alike (the blocks of a transformer) are measured once. Before each pass a cache's worth of
other memory is walked over, as other units run in between in a step. What code outside of units takes,
the loss above all, counts to the last unit run. Does not own when that is done, nor beside what
(`stage_seconds.py`).
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..parallel.units import Unit
from ..scheduler.dataflow import Flow, Output, TensorSpec
from ..scheduler.stage_choice import UnitSeconds
from ..scheduler.stopwatch import OtherMemory, typical
from ..scheduler.trace import Trace
from ..scheduler.twin import Shapes
from .direct_layers import DirectLayers
from .passage import Passage
from .split_backward import Deferred, run_backward

__all__ = ["Round", "UnitTimer"]

_Seconds = tuple[float, float, float, float]  # of F, I, W and B
Round = Mapping[Any, _Seconds]
"""Seconds of every kind of unit, and of the loss, once."""


class UnitTimer:
    """Times the unit runs of one micro-batch. Random numbers and the model stay as they are.

    Args:
        shapes: of all parameters.
        part: a micro-batch.
    """

    def __init__(
        self, units: Sequence[Unit], trace: Trace, flow: Flow, passage: Passage, model: nn.Module, shapes: Shapes,
        part: Any,
    ) -> None:  # fmt: skip
        self._kinds: list[Any] = []
        self._makers: dict[Any, Callable[[bool, bool], _Seconds]] = {}
        known = {id(p): shapes[name] for name, p in model.named_parameters() if name in shapes}  # tied: one name
        others = OtherMemory()
        with torch.random.fork_rng(devices=[]):
            for run, call in enumerate(trace.calls):
                unit = units[call.unit]
                sizes = tuple(known.get(id(p), (p.shape, p.dtype)) for p in unit.module.parameters())
                given = tuple(leaf if isinstance(leaf, TensorSpec) else repr(leaf) for leaf in flow.inputs[run].leaves)
                kind = type(unit.module), sizes, given
                self._kinds.append(kind)
                if kind not in self._makers:
                    made = _with_values(unit, known)
                    layers = DirectLayers(made)
                    layers.install()
                    self._makers[kind] = partial(_run, made, layers, flow.inputs[run], call.has_backward, others)
        self._makers["loss"] = partial(_run_loss, flow.outputs[-1], passage, part, others)

    def round(self, halves: bool = True, whole: bool = True) -> Round:
        """Everything once, in turns: what slows the machine for a moment then slows all kinds alike.

        Args:
            halves: whether backward passes in two parts are timed; else I and W count as nothing.
            whole: whether those in one are.
        """
        with torch.random.fork_rng(devices=[]):
            return {kind: once(halves, whole) for kind, once in self._makers.items()}

    def seconds(self, rounds: Sequence[Round]) -> list[UnitSeconds]:
        """For each unit run, what it usually takes."""
        found = [_typical([each[kind] for each in rounds]) for kind in self._kinds]
        loss = _typical([each["loss"] for each in rounds])
        both = zip(found[-1].by_kind, loss.by_kind, strict=True)
        return [*found[:-1], UnitSeconds.of(unit_s + loss_s for unit_s, loss_s in both)]


def _with_values(unit: Unit, known: Mapping[int, tuple[Sequence[int], torch.dtype]]) -> nn.Module:
    """A copy of the unit's module with parameters of its own."""
    memo: dict[int, Any] = {}
    for parameter in unit.module.parameters():
        shape, dtype = known.get(id(parameter), (parameter.shape, parameter.dtype))
        value = torch.randn(tuple(shape)).mul_(0.02).to(dtype)
        memo[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    for buffer in unit.module.buffers():
        memo[id(buffer)] = torch.zeros_like(buffer, device="cpu")
    return copy.deepcopy(unit.module, memo)


def _values(spec: TensorSpec) -> torch.Tensor:
    if not spec.dtype.is_floating_point:
        return torch.zeros(spec.shape, dtype=spec.dtype)
    return torch.randn(spec.shape).to(spec.dtype).requires_grad_(spec.requires_grad)


def _made(output: Output) -> Any:
    return output.built([_values(spec) for spec in output.specs])


def _run(
    module: nn.Module, layers: DirectLayers, inputs: Output, has_backward: bool, others: OtherMemory,
    halves: bool, whole: bool,
) -> _Seconds:  # fmt: skip
    forwards: list[float] = []
    input_s = weight_s = whole_s = 0.0
    if halves:
        forward_s, input_s, weight_s = _run_once(module, layers, inputs, has_backward, others, Deferred())
        forwards.append(forward_s)
    if whole or not halves:
        forward_s, whole_s, _ = _run_once(module, layers, inputs, has_backward, others, Deferred(at_once=True))
        forwards.append(forward_s)
    return sum(forwards) / len(forwards), input_s, weight_s, whole_s


def _run_once(
    module: nn.Module, layers: DirectLayers, inputs: Output, has_backward: bool, others: OtherMemory, deferred: Deferred
) -> tuple[float, float, float]:
    args, kwargs = _made(inputs)
    others.walk(_tensors((args, kwargs)))
    with layers.deferring(deferred):
        started = time.perf_counter()
        output = module(*args, **kwargs)
        forward_s = time.perf_counter() - started
        roots = [leaf for leaf in _tensors(output) if leaf.requires_grad]
        if not roots or not has_backward:
            return forward_s, 0.0, 0.0
        gradients = [torch.randn_like(root) for root in roots]
        others.walk(gradients)
        started = time.perf_counter()
        run_backward(roots, gradients)
        input_s = time.perf_counter() - started
    others.walk(())
    started = time.perf_counter()
    deferred.finish()
    return forward_s, input_s, time.perf_counter() - started


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _run_loss(
    output: Output, passage: Passage, part: Any, others: OtherMemory, _halves: bool, _whole: bool
) -> _Seconds:
    """The loss, where the model's output is what the last unit returned; nothing where it is not."""
    value = _made(output)
    others.walk(_tensors(value))
    try:
        started = time.perf_counter()
        loss = passage.call_loss(value, part)
        forward_s = time.perf_counter() - started
    except Exception:  # the model's own code comes between the last unit and the loss, or is the loss
        return 0.0, 0.0, 0.0, 0.0
    if not loss.requires_grad:
        return forward_s, 0.0, 0.0, 0.0
    started = time.perf_counter()
    loss.backward()
    backward_s = time.perf_counter() - started
    return forward_s, backward_s, 0.0, backward_s


def _typical(rounds: Sequence[_Seconds]) -> UnitSeconds:
    return UnitSeconds.of(typical(column) for column in zip(*rounds, strict=True))
