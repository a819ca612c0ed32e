"""Seconds of forward, input gradient and weight gradient of every unit run, measured by running units alone.

Owns the measurement: each kind of unit is made once with values of its own, beside the model, which may have none or
lie elsewhere; units that are alike (the blocks of a transformer) are measured once. What code outside of units takes,
the loss above all, counts to the last unit run. Does not own what is made of the seconds
(`scheduler/stage_choice.py`).
"""

import copy
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..parallel.units import Unit
from ..scheduler.dataflow import Flow, Output, TensorSpec
from ..scheduler.stage_choice import UnitSeconds
from ..scheduler.trace import Trace
from ..scheduler.twin import Shapes
from .passage import Passage
from .split_backward import Deferred, SplitBackward

__all__ = ["measure_units"]

_NUM_RUNS = 5


def measure_units(
    units: Sequence[Unit], trace: Trace, flow: Flow, passage: Passage, model: nn.Module, shapes: Shapes, part: Any
) -> list[UnitSeconds]:
    """For each unit run. Random numbers and the model stay as they are.

    Args:
        shapes: of all parameters.
        part: a micro-batch.
    """
    known: dict[Any, UnitSeconds] = {}
    found: list[UnitSeconds] = []
    with torch.random.fork_rng(devices=[]):
        for run, call in enumerate(trace.calls):
            unit = units[call.unit]
            sizes = tuple(
                (tuple(shapes[name][0]) if (name := f"{unit.name}.{own}") in shapes else tuple(p.shape))
                for own, p in unit.module.named_parameters()
            )
            given = tuple(leaf if isinstance(leaf, TensorSpec) else repr(leaf) for leaf in flow.inputs[run].leaves)
            key = (type(unit.module), sizes, given)
            if key not in known:
                module = _with_values(unit, shapes)
                known[key] = _seconds(module, flow.inputs[run], call.has_backward)
            found.append(known[key])
    return [*found[:-1], _with_loss(found[-1], flow.outputs[-1], passage, part)]


def _with_values(unit: Unit, shapes: Shapes) -> nn.Module:
    """A copy of the unit's module with parameters of its own."""
    memo: dict[int, Any] = {}
    for own, parameter in unit.module.named_parameters():
        shape, dtype = shapes.get(f"{unit.name}.{own}", (parameter.shape, parameter.dtype))
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


def _seconds(module: nn.Module, inputs: Output, has_backward: bool) -> UnitSeconds:
    def once() -> tuple[float, float, float]:
        args, kwargs = _made(inputs)
        deferred = Deferred()
        with SplitBackward(deferred):
            started = time.perf_counter()
            output = module(*args, **kwargs)
            forward_s = time.perf_counter() - started
            roots = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
            if not roots or not has_backward:
                return forward_s, 0.0, 0.0
            gradients = [torch.randn_like(root) for root in roots]
            started = time.perf_counter()
            torch.autograd.backward(roots, gradients)
            input_s = time.perf_counter() - started
        started = time.perf_counter()
        deferred.finish()
        return forward_s, input_s, time.perf_counter() - started

    return _median(once)


def _with_loss(seconds: UnitSeconds, output: Output, passage: Passage, part: Any) -> UnitSeconds:
    """The last unit run with the loss, where the model's output is what that unit returned and gives one."""

    def once() -> tuple[float, float, float]:
        value = _made(output)
        started = time.perf_counter()
        loss = passage.call_loss(value, part)
        forward_s = time.perf_counter() - started
        if not loss.requires_grad:
            return forward_s, 0.0, 0.0
        started = time.perf_counter()
        loss.backward()
        return forward_s, time.perf_counter() - started, 0.0

    try:
        more = _median(once)
    except Exception:  # the model's own code comes between the last unit and the loss, or is the loss
        return seconds
    return UnitSeconds(seconds.forward_s + more.forward_s, seconds.input_s + more.input_s, seconds.weight_s)


def _median(once: Callable[[], tuple[float, float, float]]) -> UnitSeconds:
    once()
    rounds = [once() for _ in range(_NUM_RUNS)]
    return UnitSeconds(*(median(column) for column in zip(*rounds, strict=True)))
