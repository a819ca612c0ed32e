"""Bytes that are kept for backward, read off the storages themselves.

Owns a weak look at storages: they live exactly as long as without it, and what is counted is what really lives. Does
not own what is looked at, nor when.
"""

from collections.abc import Iterable

import torch
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["LiveBytes"]


class LiveBytes:
    """Counts the storages of tensors that it was shown, as long as something holds them.

    A storage counts once, whole, however many tensors lie in it. Parameters and views of them do not count.
    """

    def __init__(self) -> None:
        self._found: dict[int, tuple[StorageWeakRef, int]] = {}
        self._ignored: set[int] = set()

    def begin(self, ignored: Iterable[torch.Tensor] = ()) -> None:
        """Forget all storages, and pass over those of `ignored`, which live anyway (buffers, the batch)."""
        self._found = {}
        self._ignored = {each.untyped_storage()._cdata for each in ignored if _has_storage(each)}

    def show(self, tensor: torch.Tensor) -> None:
        """Something keeps `tensor`."""
        if isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter):
            return
        if not _has_storage(tensor):
            return
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._found and address not in self._ignored:  # a weak reference keeps the address its own
            self._found[address] = StorageWeakRef(storage), storage.nbytes()

    def num_bytes(self) -> int:
        """Of those that live now."""
        self._found = {at: entry for at, entry in self._found.items() if not entry[0].expired()}
        return sum(num_bytes for _, num_bytes in self._found.values())


def _has_storage(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta
