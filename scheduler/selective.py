"""Selective recomputation inside a unit: outputs of matrix products and attention stay, the cheap rest runs again.

Owns which operators' outputs stay, and the two contexts of a checkpoint that keep them and give them back. Does not own
the checkpoint (`runtime/recompute.py`), nor what they amount to in bytes (`memory_profile.py`). Source: ALGORITHMS 3.3;
Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models, 2022.

The contexts do what `torch.utils.checkpoint.create_selective_checkpoint_contexts` makes, but for one thing: torch's
fail where a kept output is changed in place afterwards, as `Linear` and then `ReLU(inplace=True)` do. Here such an
output is let go, and its product runs again. Nor is there an entry for every operator that runs.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["is_kept", "selective_contexts"]

_aten = torch.ops.aten
_NAMES = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
_KEPT = frozenset(
    {
        # Not the products of batches (bmm): those of an attention that is written out make a score for every pair of
        # tokens, which is large and, for its size, cheap.
        _aten.mm.default,
        _aten.addmm.default,
        _aten.convolution.default,
        *(getattr(_aten, name).default for name in _NAMES if hasattr(_aten, name)),
    }
)


def is_kept(func: Any, args: Sequence[Any]) -> bool:
    """Whether an operator's outputs stay. An attention that drops some of its weights does not: what it would draw has
    to be drawn again, or whatever draws after it would get other numbers."""
    if func not in _KEPT:
        return False
    names = [argument.name for argument in func._schema.arguments]
    place = names.index("dropout_p") if "dropout_p" in names else len(args)
    return not (place < len(args) and args[place])


def selective_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """What a forward runs in, and what its recomputation runs in: the `context_fn` of `torch.utils.checkpoint`."""
    kept: list[_Kept | None] = []
    return _Keeping(kept), _GivingBack(kept)


class _Kept:
    """The outputs of one operator."""

    def __init__(self, func: Any, result: Any) -> None:
        self.func = func
        self.result = tree_map(lambda leaf: _alias(leaf) if isinstance(leaf, torch.Tensor) else leaf, result)
        self._versions = self._now()

    @property
    def is_unchanged(self) -> bool:
        """Whether nothing was written to them since."""
        return self._versions == self._now()

    def _now(self) -> list[int]:
        return [leaf._version for leaf in tree_leaves(self.result) if isinstance(leaf, torch.Tensor)]


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes, without the graph that it becomes part of, which would hold itself; it counts writes with the tensor
    itself, as a view made above this layer would."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):  # pyright: ignore
        return tensor.detach()


class _Keeping(TorchDispatchMode):
    """Of a forward."""

    def __init__(self, kept: "list[_Kept | None]") -> None:
        super().__init__()
        self._kept = kept

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._kept[:] = [each if each is not None and each.is_unchanged else None for each in self._kept]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if is_kept(func, args):
            self._kept.append(_Kept(func, result))
        return result


class _GivingBack(TorchDispatchMode):
    """Of a recomputation. What was given back once is computed if it is asked for again."""

    def __init__(self, kept: "list[_Kept | None]") -> None:
        super().__init__()
        self._kept = kept
        self._next = 0

    def __enter__(self) -> Any:
        self._next = 0
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:  # also where checkpoint stops early, by an exception
        super().__exit__(*error)
        self._kept.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_kept(func, args):
            found = self._kept[self._next] if self._next < len(self._kept) else None
            if found is not None:
                self._kept[self._next] = None
            self._next += 1
            if found is not None and found.func is func and found.is_unchanged:
                return found.result
        return func(*args, **(kwargs or {}))
