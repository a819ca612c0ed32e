"""Seconds of every unit, measured on one copy of each kind alone: a model larger than memory takes seconds.

Owns the shapes of what units are given (one pass without values), the copies with random values, and their timing. Does
not own what becomes of the numbers (`cost.py`).

Two unit runs are alike if their modules have the same classes and parameters and they are given tensors of the same
shapes and types. One of them is made real, timed forward and backward, and let go before the next. Each kind has a name
under which its seconds can be kept: where there is no room to make a unit real, those of an earlier time serve.
"""

import copy
import hashlib
import inspect
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ..memory.errors import DoesNotFit
from ..parallel.units import Unit
from .cost import TimeProfile, UnitSeconds
from .dataflow import Flow, Output, TensorSpec, trace_flow
from .selective import selective_contexts
from .stopwatch import Stopwatch, Way, expected, typical
from .trace import Forward, InputDtype, Loss, Trace
from .twin import Shapes

__all__ = ["measure_seconds"]

_OFTEN = 2.0  # times as long for a kind that runs more than once: its errors add up
_TILE_ELEMS = 1 << 20  # of random numbers, which are repeated: they take longer to make than to copy


def measure_seconds(
    model: nn.Module,
    units: Sequence[Unit],
    trace: Trace,
    forward: Forward,
    loss: Loss,
    micro_batch: Any,
    shapes: Shapes | None = None,
    input_dtype: InputDtype | None = None,
    known: MutableMapping[str, UnitSeconds] | None = None,
    has_room: Callable[[int], bool] = lambda run: True,
    watch: Stopwatch | None = None,
    takes_turns: bool = True,
) -> TimeProfile:
    """The profile of one micro-batch. The model, its buffers and the random numbers stay as they are.

    Args:
        trace: of the model, from the same micro-batch.
        shapes, input_dtype: as in `trace_model`.
        known: seconds by the name of a unit's kind. Those measured now are put there; those that cannot be measured
            now are taken from there.
        watch: what units are timed with.
        takes_turns: whether threads that compute in turns are timed too; else they count as one.
        has_room: f(unit run) -> whether there is memory to make it real; f(number of runs): to run the loss alone.

    Raises:
        ValueError: the model does not run without values.
        DoesNotFit: no room for a unit whose seconds are not known either.
        whatever a unit raises on random inputs.
    """
    watch = watch or Stopwatch()
    flow = trace_flow(model, units, forward, micro_batch, shapes)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kept: MutableMapping[str, UnitSeconds] = {} if known is None else known
    timed: dict[str, UnitSeconds] = {}
    made: dict[str, _Alone] = {}  # what there is room for
    result = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        runs: list[_Alone] = []
        for run, call in enumerate(trace.calls):
            module = units[call.unit].module
            dtype = input_dtype(module) if input_dtype is not None else None
            runs.append(_Alone(module, names, shapes or {}, flow.inputs[run], call.has_backward, dtype))
        kinds = [_kind(alone) for alone in runs]
        for run, (alone, kind) in enumerate(zip(runs, kinds, strict=True)):
            if kind not in timed and has_room(run):
                made[kind] = alone
                timed[kind] = kept[kind] = _time_unit(alone, watch, _OFTEN if kinds.count(kind) > 1 else 1.0)
            elif kind not in timed:
                if kind not in kept:
                    name = units[trace.calls[run].unit].name
                    raise DoesNotFit(
                        f"there is no room to run unit {name} alone, and how long it takes is not known yet"
                    )
                timed[kind] = kept[kind]
            result.append(timed[kind])
        loss_s, loss_backward_s = 0.0, 0.0
        loss_kind = f"loss of {_text(flow.outputs[-1])}"
        if has_room(len(trace.calls)):
            loss_s, loss_backward_s = _time_loss(flow, loss, micro_batch, watch)
            kept[loss_kind] = UnitSeconds(loss_s, loss_backward_s, 0.0, 0.0)
        elif loss_kind in kept:
            loss_s, loss_backward_s = kept[loss_kind].forward_s, kept[loss_kind].backward_s
        in_turns = 1.0
        if made and takes_turns:  # of the kind that takes most of a step
            most = max(made, key=lambda kind: kinds.count(kind) * (timed[kind].forward_s + timed[kind].backward_s))
            in_turns = watch.in_turns(_ready(made[most])[0])
    return TimeProfile(tuple(result), loss_s, loss_backward_s, in_turns)


@dataclass(frozen=True, slots=True)
class _Alone:
    """One run of a unit, to be done alone: its module, the names and true shapes of all parameters, what it is given,
    whether it has a backward, and the dtype that floating inputs come in (None: their own)."""

    module: nn.Module
    names: dict[int, str]
    shapes: Shapes
    given: Output
    has_backward: bool
    dtype: torch.dtype | None


def _kind(alone: _Alone) -> str:
    """Equal for units that take the same time, also in other runs: classes and their sources, parameters, inputs."""
    module = alone.module
    parts = tuple((_class_name(type(part)), part.extra_repr()) for part in module.modules())
    shapes = tuple((_shape_of(p, alone.names, alone.shapes), p.requires_grad) for p in module.parameters())
    text = repr((parts, shapes, _text(alone.given), alone.has_backward, alone.dtype))
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _text(given: Output) -> str:
    return repr(tuple(leaf if isinstance(leaf, TensorSpec) else repr(leaf) for leaf in given.leaves))


@cache
def _class_name(kind: type) -> str:
    """Of a module's class, with what it does."""
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):  # made where there is no file
        source = ""
    digest = hashlib.blake2b(source.encode(), digest_size=8).hexdigest()
    return f"{kind.__module__}.{kind.__qualname__} {digest}"


def _shape_of(parameter: nn.Parameter, names: dict[int, str], shapes: Shapes) -> tuple[tuple[int, ...], torch.dtype]:
    name = names.get(id(parameter), "")
    shape, dtype = shapes.get(name, (parameter.shape, parameter.dtype))
    return tuple(shape), dtype


def _real_copy(module: nn.Module, names: dict[int, str], shapes: Shapes) -> nn.Module:
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        shape, dtype = _shape_of(parameter, names, shapes)
        memo[id(parameter)] = nn.Parameter(_random(shape, dtype), requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.zeros_like(buffer, device="cpu") if buffer.is_meta else buffer.detach().clone()
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    twin = copy.deepcopy(module, memo)
    for part in twin.modules():  # those of the run belong to the original
        for name in (*hooks, "_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks"):
            getattr(part, name).clear()
    return twin


def _random(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    if dtype.is_floating_point:
        values = torch.empty(tuple(shape), dtype=dtype)
        tile = torch.empty(min(values.numel(), _TILE_ELEMS), dtype=dtype).normal_(0, 0.02)
        for part in values.view(-1).split(_TILE_ELEMS):
            part.copy_(tile[: part.numel()])
        return values
    return torch.zeros(tuple(shape), dtype=dtype)  # a token, an index or a mask that every unit understands


def _built(given: Output, dtype: torch.dtype | None, needs_grad: bool) -> Any:
    tensors = []
    for spec in given.specs:
        tensor = _random(spec.shape, dtype if dtype is not None and spec.dtype.is_floating_point else spec.dtype)
        tensors.append(tensor.requires_grad_(needs_grad and spec.requires_grad))
    return given.built(tensors)


def _time_unit(alone: _Alone, watch: Stopwatch, times_as_long: float = 1.0) -> UnitSeconds:
    """In turns: all of it; without gradients of weights; likewise recomputed, whole and selectively."""
    whole, inputs, weights, again, selectively = _ready(alone)
    ways = [whole]
    if inputs and alone.has_backward:
        ways += [Way(run, whole.given, inputs, weights) for run in (whole.run, again, selectively)]
    rounds = watch.rounds(ways, times_as_long)
    forward_s, backward_s = (expected([each[0][part] for each in rounds]) for part in (0, 1))
    if len(ways) == 1:
        return UnitSeconds(forward_s, backward_s, backward_s, forward_s if alone.has_backward else 0.0)
    # Of differences, those within a round: the machine was as fast in both parts.
    of_all = [each for each in rounds if len(each) == len(ways)]
    weight_s = typical([whole[1] - kept[1] for whole, kept, *_ in of_all])
    handed_s = typical([again[0] - kept[0] for _, kept, again, _ in of_all])  # to torch's checkpoint, or to us
    # What a recompute adds: a pass under it less one that keeps everything. It ends where all that was saved is there
    # again, and leaves that in the caches.
    again_s, selective_s = (max(0.0, typical([sum(each[way]) - sum(each[1]) for each in of_all])) for way in (2, 3))
    weight_s = min(max(0.0, weight_s), backward_s)
    return UnitSeconds(forward_s, backward_s, weight_s, again_s, min(selective_s, again_s), max(0.0, handed_s))


def _ready(alone: _Alone) -> tuple[Way, list[torch.Tensor], list[nn.Parameter], Callable[[], Any], Callable[[], Any]]:
    """A copy of the unit: how to run all of it, the inputs and the weights that get gradients, and how to run it so
    that its backward recomputes it, whole and selectively."""
    twin, has_backward = _real_copy(alone.module, alone.names, alone.shapes), alone.has_backward
    args, kwargs = _built(alone.given, alone.dtype, has_backward)

    def run() -> Any:
        with torch.set_grad_enabled(has_backward):
            return twin(*args, **kwargs)

    def again() -> Any:
        return checkpoint(twin, *args, use_reentrant=False, **kwargs)

    def selectively() -> Any:
        return checkpoint(twin, *args, use_reentrant=False, context_fn=selective_contexts, **kwargs)

    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    weights = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    inputs = [leaf for leaf in given if leaf.requires_grad]
    return Way(run, given, [*inputs, *weights]), inputs, weights, again, selectively


def _time_loss(flow: Flow, loss: Loss, micro_batch: Any, watch: Stopwatch) -> tuple[float, float]:
    """The caller's loss on what the last unit returns: what the model itself does behind it counts as nothing."""
    output = _built(flow.outputs[-1], None, True)
    given = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    try:
        (found,) = watch.seconds([Way(lambda: loss(output, micro_batch), given, given)])
    except Exception:  # a loss of something that the model makes of the last unit's output: nothing is known of it
        return 0.0, 0.0
    return found
