"""Seconds of forward, input gradient and weight gradient of every unit run, measured by running units alone.

Owns the measurement: each kind of unit is made once with values of its own, beside the model, which may have none or
lie elsewhere; units that are alike (the blocks of a transformer) are measured once. What code outside of units takes,
the loss above all, counts to the last unit run. Does not own what is made of the seconds
(`scheduler/stage_choice.py`).
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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

_NUM_ROUNDS = 5

_Seconds = tuple[float, float, float]  # of F, I and W


def measure_units(
    units: Sequence[Unit], trace: Trace, flow: Flow, passage: Passage, model: nn.Module, shapes: Shapes, part: Any
) -> list[UnitSeconds]:
    """For each unit run. Random numbers and the model stay as they are.

    Args:
        shapes: of all parameters.
        part: a micro-batch.
    """
    kinds: list[Any] = []
    makers: dict[Any, Callable[[], _Seconds]] = {}
    known = {id(p): shapes[name] for name, p in model.named_parameters() if name in shapes}  # tied ones have one name
    with torch.random.fork_rng(devices=[]):
        for run, call in enumerate(trace.calls):
            unit = units[call.unit]
            sizes = tuple(known.get(id(p), (p.shape, p.dtype)) for p in unit.module.parameters())
            given = tuple(leaf if isinstance(leaf, TensorSpec) else repr(leaf) for leaf in flow.inputs[run].leaves)
            kinds.append((type(unit.module), sizes, given))
            if kinds[-1] not in makers:
                makers[kinds[-1]] = partial(_run, _with_values(unit, known), flow.inputs[run], call.has_backward)
        makers["loss"] = partial(_run_loss, flow.outputs[-1], passage, part)
        # In turns: what slows the machine for a moment then slows all kinds alike.
        rounds = [{kind: once() for kind, once in makers.items()} for _ in range(1 + _NUM_ROUNDS)][1:]
    found = [_median([each[kind] for each in rounds]) for kind in kinds]
    loss = _median([each["loss"] for each in rounds])
    last = found[-1]
    with_loss = UnitSeconds(last.forward_s + loss.forward_s, last.input_s + loss.input_s, last.weight_s)
    return [*found[:-1], with_loss]


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


def _run(module: nn.Module, inputs: Output, has_backward: bool) -> _Seconds:
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


def _run_loss(output: Output, passage: Passage, part: Any) -> _Seconds:
    """The loss, where the model's output is what the last unit returned; nothing where it is not."""
    value = _made(output)
    try:
        started = time.perf_counter()
        loss = passage.call_loss(value, part)
        forward_s = time.perf_counter() - started
    except Exception:  # the model's own code comes between the last unit and the loss, or is the loss
        return 0.0, 0.0, 0.0
    if not loss.requires_grad:
        return forward_s, 0.0, 0.0
    started = time.perf_counter()
    loss.backward()
    return forward_s, time.perf_counter() - started, 0.0


def _median(rounds: Sequence[_Seconds]) -> UnitSeconds:
    return UnitSeconds(*(median(column) for column in zip(*rounds, strict=True)))
