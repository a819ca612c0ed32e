"""The backward pass in two parts: input gradients at once, weight gradients of large layers later.

Owns the deferral of the weight gradients of linear layers, convolutions and embeddings: while it is on, these save
their input, and in the backward pass note the gradient of their output instead of multiplying the two. Nothing is
computed twice, and what else autograd had saved is let go of at once. A product is added straight to the gradient that
is there, without a tensor of its own in between, which spares a pass over memory for each micro-batch; also where the
backward pass is not divided, so that all schedules give the same bits. Does not own when the parts run (programs), nor
the layers that come here by themselves (`direct_layers.py`).

Gradients of biases and of all other parameters are made with the input gradients: they cost little.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

__all__ = ["Deferred", "SplitBackward", "deferred_embedding", "deferred_linear", "run_backward"]

_CONVOLUTIONS = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}


class Deferred:
    """Weight gradients that are still to be made, in the order in which the backward pass came to them.

    Args:
        at_once: they are made as soon as the backward pass comes to them: an undivided backward pass.
        shown: is given every tensor that is kept for them.
    """

    def __init__(self, at_once: bool = False, shown: Callable[[torch.Tensor], object] = lambda tensor: None) -> None:
        self._waiting: list[tuple[nn.Parameter, int | None, _Make, _Add | None]] = []
        self._at_once = at_once
        self._shown = shown
        self.run_of: Callable[[], int | None] = lambda: None
        """The unit run whose backward goes on."""

    def put(
        self, parameter: nn.Parameter, make: "_Make", add: "_Add | None", kept: Sequence[torch.Tensor] = ()
    ) -> None:
        """Args:
        make: gives the gradient.
        add: adds it to a gradient that is there already, in place, without making it first.
        kept: what the two need.
        """
        if self._at_once:
            _accumulate(parameter, make, add)
        else:
            self._waiting.append((parameter, self.run_of(), make, add))
            for tensor in kept:
                self._shown(tensor)

    def finish(self, run: int | None = None) -> None:
        """Make and add those of a unit run, or all that are left."""
        due = [entry for entry in self._waiting if run is None or entry[1] == run]
        self._waiting = [entry for entry in self._waiting if not (run is None or entry[1] == run)]
        while due:
            parameter, _, make, add = due.pop(0)  # what it holds goes with it
            _accumulate(parameter, make, add)

    def __len__(self) -> int:
        return len(self._waiting)


_Make = Callable[[], torch.Tensor]
_Add = Callable[[torch.Tensor], object]


def _accumulate(parameter: nn.Parameter, make: _Make, add: _Add | None) -> None:
    with torch.no_grad():
        if parameter.grad is None:
            parameter.grad = make()
        elif add is not None:
            add(parameter.grad)
        else:
            parameter.grad += make()


class SplitBackward(TorchFunctionMode):
    """While it is entered, layers with a trainable parameter as their weight defer its gradient to `deferred`.

    Entered around the forward pass, and around the backward pass too, for what that recomputes.

    Attributes:
        num_found: how many it has met.
    """

    def __init__(self, deferred: Deferred) -> None:
        super().__init__()
        self._deferred = deferred
        self.num_found = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_grad_enabled():
            if func is F.linear:
                found = deferred_linear(self._deferred, *args, **kwargs)
            elif func in _CONVOLUTIONS:
                found = _convolution(self._deferred, _CONVOLUTIONS[func], *args, **kwargs)
            elif func is F.embedding:
                found = deferred_embedding(self._deferred, *args, **kwargs)
            else:
                found = None
            if found is not None:
                self.num_found += 1
                return found
        return func(*args, **kwargs)


def deferred_linear(deferred: Deferred, input: Any, weight: Any, bias: Any = None) -> Any:
    """`F.linear` whose weight gradient is given to `deferred`; None where that is not possible."""
    if not _defers(weight) or input.dim() < 2 or input.dtype is not weight.dtype:
        return None
    return _Linear.apply(input, weight, bias, deferred)


def deferred_embedding(
    deferred: Deferred, input: Any, weight: Any, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Any:  # fmt: skip
    """`F.embedding` likewise."""
    if not _defers(weight) or max_norm is not None or sparse:
        return None
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    return _Embedding.apply(input, weight, padding, scale_grad_by_freq, deferred)


def _convolution(
    deferred: Deferred, dims: int, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Any:  # fmt: skip
    if not _defers(weight) or isinstance(padding, str) or input.dim() != dims + 2:
        return None
    shape = [_tuple(value, dims) for value in (stride, padding, dilation)]
    return _Convolution.apply(input, weight, bias, *shape, groups, deferred)


def run_backward(roots: Sequence[Any], gradients: Sequence[torch.Tensor]) -> None:
    """`torch.autograd.backward`, with the function modes that are entered: it would leave them, and what checkpoints
    run again in backward would save other tensors than in forward."""
    _engine_run_backward(tuple(roots), tuple(gradients), False, False, (), allow_unreachable=True, accumulate_grad=True)


def _defers(weight: Any) -> bool:
    return isinstance(weight, nn.Parameter) and weight.requires_grad


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, weight: nn.Parameter, bias: Any, deferred: Deferred) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x, weight)
        ctx.parameter, ctx.deferred = weight, deferred  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        for_input = flat.mm(weight).view(x.shape) if ctx.needs_input_grad[0] else None
        if ctx.needs_input_grad[1]:
            rows = x.reshape(-1, x.shape[-1])
            ctx.deferred.put(
                ctx.parameter, lambda: flat.t().mm(rows), lambda grad: grad.addmm_(flat.t(), rows), (flat, rows)
            )
        for_bias = flat.sum(0) if ctx.needs_input_grad[2] else None
        return for_input, None, for_bias, None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: torch.Tensor, weight: nn.Parameter, bias: Any, stride: Any, padding: Any, dilation: Any,
        groups: int, deferred: Deferred,
    ) -> Any:  # fmt: skip
        ctx.save_for_backward(x, weight)
        ctx.parameter, ctx.deferred, ctx.has_bias = weight, deferred, bias is not None
        ctx.shape = (stride, padding, dilation, False, [0] * len(stride), groups)
        return torch.convolution(x, weight, bias, *ctx.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        parameter = ctx.parameter
        sizes = [weight.shape[0]] if ctx.has_bias else None
        kernel: Any = torch.ops.aten.convolution_backward
        needs_input, _, needs_bias = ctx.needs_input_grad[:3]
        for_input, _, for_bias = kernel(gradient, x, weight, sizes, *ctx.shape, [needs_input, False, needs_bias])
        if ctx.needs_input_grad[1]:
            shape = ctx.shape
            like = torch.empty((), dtype=weight.dtype).expand(weight.shape)  # its values do not matter here
            ctx.deferred.put(
                parameter,
                lambda: kernel(gradient, x, like, sizes, *shape, [False, True, False])[1],
                None,
                (gradient, x),
            )
        return for_input, None, for_bias, None, None, None, None, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, indices: torch.Tensor, weight: nn.Parameter, padding: int, by_frequency: bool, deferred: Deferred
    ) -> Any:
        ctx.save_for_backward(indices)
        ctx.parameter, ctx.deferred = weight, deferred
        ctx.shape = (weight.shape[0], padding, by_frequency)
        return torch.ops.aten.embedding(weight, indices, padding, by_frequency, False)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (indices,) = ctx.saved_tensors
        num_rows, padding, by_frequency = ctx.shape

        def make() -> torch.Tensor:
            return torch.ops.aten.embedding_dense_backward(gradient, indices, num_rows, padding, by_frequency)

        def add(grad: torch.Tensor) -> torch.Tensor:
            return grad.index_add_(0, indices.reshape(-1), gradient.reshape(-1, gradient.shape[-1]))

        in_place = add if padding < 0 and not by_frequency else None
        ctx.deferred.put(ctx.parameter, make, in_place, (gradient, indices))
        return None, None, None, None, None
