"""Linear layers and embeddings that defer their weight gradients by themselves.

Owns what stands in for their forwards. A function mode, which finds such layers in any code, looks at every torch
function of a pass, some hundred a transformer block: where it has found nothing in a pass that these layers do not do
themselves, the next one like it goes without. Does not own the deferral (`split_backward.py`).
"""

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .split_backward import Deferred, SplitBackward, deferred_embedding, deferred_linear

__all__ = ["DirectLayers"]


class DirectLayers:
    """The layers of a model whose forward is that of `nn.Linear` or `nn.Embedding`; others are left alone.

    Args:
        model: in which they are looked for when they are installed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.deferred: Deferred | None = None
        """To whom they give their gradients now; None: to autograd."""
        self._needs_mode: dict[Hashable, bool] = {}

    def install(self) -> None:
        for module in self._model.modules():
            kind = getattr(module.forward, "__func__", None)
            if kind in _DIRECT:
                module.__dict__["forward"] = _Direct(self, module, module.forward, _DIRECT[kind])

    def remove(self) -> None:
        """Put their forwards back. May be repeated."""
        for module in self._model.modules():
            if isinstance(direct := module.__dict__.get("forward"), _Direct):
                direct.put_back()

    @contextmanager
    def deferring(self, deferred: Deferred, what: Hashable = None) -> Iterator[None]:
        """Around a forward pass, and around a backward pass too, for what that recomputes.

        Args:
            what: the same for passes that are alike: the first one's forward finds out whether these layers alone
                defer, or other code too.
        """
        self.deferred = deferred
        try:
            if not self._needs_mode.get(what, True):
                yield
                return
            with SplitBackward(deferred) as mode:
                yield
            self._needs_mode.setdefault(what, mode.num_found > 0)
        finally:
            self.deferred = None


def _linear(deferred: Deferred, module: Any, input: torch.Tensor) -> Any:
    return deferred_linear(deferred, input, module.weight, module.bias)


def _embedding(deferred: Deferred, module: Any, input: torch.Tensor) -> Any:
    words = (module.padding_idx, module.max_norm, module.norm_type, module.scale_grad_by_freq, module.sparse)
    return deferred_embedding(deferred, input, module.weight, *words)


_DIRECT: Mapping[Any, Callable[..., Any]] = {nn.Linear.forward: _linear, nn.Embedding.forward: _embedding}


class _Direct:
    """Stands in a layer's place for its `forward`."""

    def __init__(self, layers: DirectLayers, module: nn.Module, forward: Any, deferring: Callable[..., Any]) -> None:
        self._layers = layers
        self._module = module
        self._forward = forward
        self._deferring = deferring
        self._was_own = "forward" in module.__dict__
        self.__wrapped__ = forward  # signatures are looked at

    def __call__(self, input: torch.Tensor) -> Any:
        deferred = self._layers.deferred
        if deferred is not None and torch.is_grad_enabled():
            found = self._deferring(deferred, self._module, input)
            if found is not None:
                return found
        return self._forward(input)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._forward, memo)  # copies of the model have none of it

    def put_back(self) -> None:
        del self._module.__dict__["forward"]
        if self._was_own:
            self._module.__dict__["forward"] = self._forward
