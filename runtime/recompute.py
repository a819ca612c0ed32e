"""Recomputing a unit: its forward saves nothing but its inputs, and runs once more when backward comes to it; or, where
it is selective, all of it but matrix products and attention, whose outputs are kept (`scheduler/selective.py`).

Owns wrapping a module's `forward` in torch's non-reentrant checkpoint, and what torch's leaves open: buffers are not
updated twice, and inputs are held by saved-tensor hooks wherever in the arguments they stand. Does not own which units
recompute (plans), random numbers (checkpoint puts back the generator's state of the forward's start) nor the hooks on
units, which stay outside: a recomputation is no run of the unit.
"""

import functools
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from ..memory.errors import OutgrowError
from ..scheduler.selective import selective_contexts

__all__ = ["Recomputed"]

_SMALL_BYTES = 1 << 20  # buffers up to this size are compared after every forward, larger ones after the first


class Recomputed:
    """A module whose forward is recomputed in backward, from `install` to `remove`; also a context.

    Forwards that record no gradients pass through, evaluation's too. Any arguments and results will do, also lists and
    dictionaries that the forward changes. Tensors among the arguments are held as autograd holds saved tensors, so that
    saved-tensor hooks around the forward are asked about them (views of chunks are packed by place, activations moved);
    tensors in objects that torch's pytree does not look into are held as they are.

    Args:
        module: the unit. Copies of it made meanwhile recompute as well, each its own forward.
        name: for errors.
        is_selective: whether outputs of matrix products and attention stay, and only the cheap rest runs again.
    """

    def __init__(self, module: nn.Module, name: str = "", is_selective: bool = False) -> None:
        self._module = module
        self._is_selective = is_selective
        self._name = name or type(module).__name__
        self._before: Any = None

    def install(self) -> Self:
        """Wrap the module's forward."""
        own = self._module.__dict__
        assert not isinstance(own.get("forward"), _Forward), f"{self._name} is recomputed already"
        self._before = own.get("forward")
        own["forward"] = _Forward(self._module, self._module.forward, self._name, self._is_selective)
        return self

    def remove(self) -> None:
        """Put the module's own forward back. What ran before can still be recomputed. May be repeated."""
        own = self._module.__dict__
        if not isinstance(own.get("forward"), _Forward):
            return
        del own["forward"]
        if self._before is not None:
            own["forward"] = self._before

    def __enter__(self) -> Self:
        return self.install()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class _Forward:
    """Stands in the module's place for its `forward`."""

    def __init__(self, module: nn.Module, forward: Any, name: str, is_selective: bool) -> None:
        functools.update_wrapper(self, forward)  # signatures are looked at
        self._forward = forward
        self._is_selective = is_selective
        self.name = name
        self.modules = list(module.named_modules())
        self.changing: set[str] = set()  # buffers that some forward has changed
        self.seen = False  # whether there has been a forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if not torch.is_grad_enabled() or any(_is_without_values(tensor) for tensor in tensors):
            return self._forward(*args, **kwargs)
        others = [None if isinstance(leaf, torch.Tensor) else (leaf,) for leaf in leaves]
        callers = [(args, kwargs)]  # the caller's own objects are for the first run, which may change them

        def run(*held: torch.Tensor) -> Any:
            if callers:
                own_args, own_kwargs = callers.pop()
            else:
                left = iter(held)
                again = [next(left) if other is None else other[0] for other in others]
                own_args, own_kwargs = tree_unflatten(again, structure)
            return self._forward(*own_args, **own_kwargs)

        return checkpoint(run, *tensors, use_reentrant=False, context_fn=self._contexts)

    def _contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """What a forward runs in, and what its recomputation runs in."""
        before = _BuffersBefore(self)
        again = _BuffersAgain(before, self.name)
        if not self._is_selective:
            return before, again
        keeping, giving_back = selective_contexts()
        return _Both(before, keeping), _Both(again, giving_back)


def _is_without_values(tensor: torch.Tensor) -> bool:
    """Of a pass that only looks at shapes: on `meta`, or torch's fake tensors."""
    return tensor.is_meta or hasattr(tensor, "fake_mode")


@dataclass
class _Buffer:
    """A buffer as one forward found it. Without `value` it is the tensor itself, at `version`."""

    name: str
    tensor: torch.Tensor
    version: int
    value: torch.Tensor | None


class _Both:
    """Two contexts, the second inside the first; may be entered several times, one after the other."""

    def __init__(self, outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> None:
        self._outer, self._inner = outer, inner
        self._stack = ExitStack()

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(self._outer)
            stack.enter_context(self._inner)
            self._stack = stack.pop_all()

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


class _BuffersBefore:
    """The context of a forward: keeps how its buffers were at its start, where that is not how they are afterwards."""

    def __init__(self, forward: _Forward) -> None:
        self._forward = forward
        self.tables: list[tuple[nn.Module, dict[str, torch.Tensor | None]]] = []
        self.buffers: dict[int, _Buffer] = {}  # by id of the tensor: modules may share one

    def __enter__(self) -> None:
        known = self._forward.changing
        for prefix, module in self._forward.modules:
            if module._buffers:
                self.tables.append((module, dict(module._buffers)))
            for key, tensor in module._buffers.items():
                if tensor is None or id(tensor) in self.buffers:
                    continue
                name = f"{prefix}.{key}" if prefix else key
                looks = not self._forward.seen or name in known or tensor.nbytes <= _SMALL_BYTES
                value = tensor.detach().clone() if looks else None
                self.buffers[id(tensor)] = _Buffer(name, tensor, tensor._version, value)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            return
        for buffer in self.buffers.values():
            if buffer.value is None:
                if buffer.tensor._version != buffer.version:
                    raise OutgrowError(
                        f"{self._forward.name} changed its buffer {buffer.name} ({buffer.tensor.nbytes:,} bytes) in "
                        "its forward, and had not done so in the first one: it cannot be recomputed. Keep or offload "
                        "this unit's activations"
                    )
            elif buffer.name in self._forward.changing:
                continue
            elif torch.equal(buffer.tensor, buffer.value):  # versions do not tell: batch norm does not count its own
                buffer.version, buffer.value = buffer.tensor._version, None
            else:
                self._forward.changing.add(buffer.name)
        self._forward.seen = True


class _BuffersAgain:
    """The context of a recomputation: buffers are as the forward found them, and what becomes of them is forgotten."""

    def __init__(self, before: _BuffersBefore, name: str) -> None:
        self._before = before
        self._name = name
        self._present: list[tuple[nn.Module, dict[str, torch.Tensor | None]]] = []

    def __enter__(self) -> None:
        found = {key: self._found(buffer) for key, buffer in self._before.buffers.items()}
        self._present = [(module, dict(module._buffers)) for module, _ in self._before.tables]
        for module, table in self._before.tables:
            module._buffers.clear()
            module._buffers.update({key: None if old is None else found[id(old)] for key, old in table.items()})

    def __exit__(self, *_: object) -> None:  # also where checkpoint stops early, by an exception
        for module, table in self._present:
            module._buffers.clear()
            module._buffers.update(table)
        self._present = []

    def _found(self, buffer: _Buffer) -> torch.Tensor:
        if buffer.value is not None:
            return buffer.value.clone()
        if buffer.tensor._version != buffer.version:
            raise OutgrowError(
                f"{self._name} cannot be recomputed: its buffer {buffer.name} was changed between its forward and its "
                "backward. Keep or offload this unit's activations"
            )
        return buffer.tensor
