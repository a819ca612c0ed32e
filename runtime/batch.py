"""Batches: how many samples one has, how it is cut, how it goes into a model.

Owns the conventions for dicts, tuples and tensors. Does not own where batches come from (`runtime/data.py`).
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["call_loss", "call_model", "cast_floats", "map_tensors", "num_samples", "num_tokens", "split_batch"]

Forward = Callable[[nn.Module, Any], Any]
Loss = Callable[[Any, Any], torch.Tensor]


def num_samples(batch: Any) -> int:
    """Samples in a batch: the length of its first tensor's first dimension; 0 for None.

    Raises:
        ValueError: no tensor to count by, or tensors of different lengths.
    """
    if batch is None:
        return 0
    lengths = {leaf.shape[0] for leaf in _leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.dim() > 0}
    if not lengths:
        raise ValueError(
            f"a batch of type {type(batch).__name__} holds no tensor with a first dimension to count samples by"
        )
    if len(lengths) > 1:
        raise ValueError(f"the tensors of a batch have different numbers of samples: {sorted(lengths)}")
    return lengths.pop()


def num_tokens(batch: Any) -> int:
    """Elements of the batch's first tensor of integers of two dimensions or more (token ids), or else its samples."""
    for leaf in _leaves(batch):
        if isinstance(leaf, torch.Tensor) and leaf.dim() >= 2 and not leaf.is_floating_point():
            return leaf.numel()
    return num_samples(batch)


def _leaves(value: Any) -> Iterator[Any]:
    """All that lies in a structure, mappings included that torch's trees do not know (what tokenizers return)."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Mapping):
            for item in leaf.values():
                yield from _leaves(item)
        else:
            yield leaf


def split_batch(batch: Any, parts: int) -> list[Any]:
    """Cut a batch into `parts` along the samples, as equal as possible; None for parts without a sample.

    Sequences that are no tensors are cut where their length is the number of samples; everything else is repeated.
    """
    if parts == 1:
        return [batch]
    total = num_samples(batch)
    if total == 0:
        return [None] * parts
    sizes = [total // parts + (part < total % parts) for part in range(parts)]
    starts = [sum(sizes[:part]) for part in range(parts)]
    return [
        _take(batch, start, start + size, total) if size else None for start, size in zip(starts, sizes, strict=True)
    ]


def _take(value: Any, start: int, stop: int, total: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value[start:stop] if value.dim() else value
    if isinstance(value, Mapping):
        items = {key: _take(item, start, stop, total) for key, item in value.items()}
        return type(value)(items) if type(value) is not dict else items  # pyright: ignore[reportCallIssue]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_take(item, start, stop, total) for item in value))
    if isinstance(value, (list, tuple)):
        if len(value) == total and not any(isinstance(leaf, torch.Tensor) for leaf in _leaves(value)):
            return value[start:stop]
        return type(value)(_take(item, start, stop, total) for item in value)
    return value


def call_model(model: nn.Module, batch: Any, has_loss: bool) -> Any:
    """A dict goes in as `model(**batch)`; a tuple as `model(*batch[:-1])`, or whole where no loss is given; the rest as
    `model(batch)`."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*(batch[:-1] if has_loss and len(batch) > 1 else batch))
    return model(batch)


def call_loss(loss: Loss | None, output: Any, batch: Any) -> torch.Tensor:
    """The scalar to minimise: `loss(output, batch[-1])` for tuples, `loss(output, batch)` for others; without a loss
    the output itself, or its `.loss`, or its item "loss".

    Raises:
        ValueError: what came out is no scalar tensor.
    """
    if loss is not None:
        value = loss(output, batch[-1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else batch)
    elif isinstance(output, torch.Tensor):
        value = output
    elif isinstance(output, Mapping) and "loss" in output:
        value = output["loss"]
    else:
        value = getattr(output, "loss", None)
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        hint = "give `loss=f(output, target)`, or let the model return a scalar or an object with `.loss`"
        raise ValueError(f"the loss must be one number, a mean over the samples; it is {found}: {hint}")
    return value.reshape(())


def cast_floats(value: Any, dtype: torch.dtype) -> Any:
    """Every floating tensor of a structure, as `dtype`."""
    return map_tensors(value, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The structure with `change` of every tensor in its place."""

    def changed(leaf: Any) -> Any:
        if isinstance(leaf, Mapping):  # one that torch's trees do not know
            return type(leaf)({key: map_tensors(item, change) for key, item in leaf.items()})  # pyright: ignore[reportCallIssue]
        return change(leaf) if isinstance(leaf, torch.Tensor) else leaf

    return tree_map(changed, value)
