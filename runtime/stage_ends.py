"""The two ends of a stage inside the model's own forward: units of other stages left out, and what was received.

Owns the stand-in for a unit's forward, and the node of the graph that takes gradients out of a stage. Does not own what
stands in for the outputs, nor what becomes of the gradients (`stage_pass.py`).
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .unit_hooks import Pass, UnitHooks

__all__ = ["LeftOut", "Receive"]


class LeftOut:
    """Stands in the module's place for its `forward`: runs it where the pass of this thread computes it, and gives what
    `stand_in(pass, unit run)` says where it does not."""

    def __init__(
        self, module: nn.Module, forward: Callable[..., Any], hooks: UnitHooks, stand_in: Callable[[Pass, int], Any]
    ) -> None:
        self._own: Mapping[str, Any] = dict(module.__dict__)
        self._module = module
        self._forward = forward
        self._hooks = hooks
        self._stand_in = stand_in
        self.__signature__ = getattr(forward, "__signature__", None)
        self.__wrapped__ = forward  # signatures are looked at

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = self._hooks.run_in_forward()
        if found is None or found[1] in found[0].runs:
            return self._forward(*args, **kwargs)
        return self._stand_in(*found)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._forward, memo)  # copies of the model run all of it

    def put_back(self) -> None:
        del self._module.__dict__["forward"]
        if "forward" in self._own:
            self._module.__dict__["forward"] = self._own["forward"]


class Receive(torch.autograd.Function):
    """Makes what was received part of the graph; its backward notes the gradients instead of passing them on."""

    @staticmethod
    def forward(ctx: Any, into: dict[int, torch.Tensor], places: list[int], anchor: Any, *tensors: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.into, ctx.places = into, places
        ctx.set_materialize_grads(False)
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        for place, gradient in zip(ctx.places, gradients, strict=True):
            if gradient is not None:
                ctx.into[place] = gradient
        return None, None, None, *(None for _ in gradients)
