"""A micro-batch's way through the model and back: forward, loss, backward, in the dtype that is computed with.

Owns how batches go in and losses come out. Does not own what happens at the borders of units (`unit_hooks.py`) nor
which micro-batch goes when (`engine.py`, `turns.py`).
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..memory.errors import NotFinite
from .batch import Forward, Loss, call_loss, call_model, cast_floats
from .model_state import ModelState
from .saved_tensors import saved_by_place
from .unit_hooks import UnitHooks

__all__ = ["Passage"]


@dataclass(frozen=True)
class Passage:
    """What a model is called with.

    Attributes:
        loss, custom_forward: the caller's, or None.
        dtype: that is computed with, where it is not the model's own.
        rank: for errors.
    """

    model: nn.Module
    loss: Loss | None
    custom_forward: Forward | None
    dtype: torch.dtype | None
    rank: int

    def run(
        self, hooks: UnitHooks, state: ModelState, step: int, number: int, part: Any, weight: float,
        before: Callable[[], None],
    ) -> float:  # fmt: skip
        """Take micro-batch `number` through the model and back.

        Args:
            weight: its share of the global batch's samples; its gradients are scaled by it.
            before: called once the hooks expect the model.

        Returns: its part of the global batch's loss.

        Raises:
            NotFinite: the loss is NaN or infinite.
            ValueError: it depends on nothing that could be trained.
        """
        hooks.begin_forward(step, number)
        before()
        with saved_by_place(state) if state.drops_copies else nullcontext():
            output = self.forward(self.model, part)
            loss = self.call_loss(output, part)
        value = self.checked(loss, hooks, step, number)
        del output
        if not loss.requires_grad:
            raise ValueError("the loss does not depend on any trainable parameter: nothing can be trained")
        hooks.begin_backward()
        loss.backward(None if weight == 1 else torch.tensor(weight, dtype=loss.dtype, device=loss.device))
        hooks.end_backward()
        return value

    def checked(self, loss: torch.Tensor, hooks: UnitHooks, step: int, number: int) -> float:
        """The loss's value.

        Raises:
            NotFinite: it is NaN or infinite.
        """
        value = loss.item()
        if not math.isfinite(value):
            raise self._not_finite(hooks, value, step, number)
        return value

    def forward(self, model: nn.Module, part: Any) -> Any:
        """The model's output for a micro-batch, by the caller's function or the conventions."""
        if self.dtype is not None:
            part = cast_floats(part, self.dtype)
        if self.custom_forward is not None:
            return self.custom_forward(model, part)
        return call_model(model, part, self.loss is not None)

    def call_loss(self, output: Any, part: Any) -> torch.Tensor:
        """The loss, in float32 whatever is computed with."""
        return call_loss(self.loss, output if self.dtype is None else cast_floats(output, torch.float32), part)

    def input_dtype(self, module: nn.Module) -> torch.dtype | None:
        """In bf16, a unit's floating inputs come in the dtype of its parameters."""
        if self.dtype is None:
            return None
        dtypes = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
        dtypes.discard(torch.float32)  # modules with running statistics take what the others compute with
        return dtypes.pop() if len(dtypes) == 1 else self.dtype

    def _not_finite(self, hooks: UnitHooks, value: float, step: int, number: int) -> NotFinite:
        unit = hooks.first_not_finite()
        where = f"the first unit whose output was not finite is {unit}" if unit else "every unit's output was finite"
        error = NotFinite(
            f"step {step}, rank {self.rank}, micro-batch {number}: the loss is {value}; {where}. The weights are "
            "those after the step before. A smaller learning rate, clip_grad_norm, or a look at this batch may help."
        )
        error.outgrow_unit = unit  # pyright: ignore[reportAttributeAccessIssue]
        return error
