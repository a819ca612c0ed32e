"""Memory for tensors that come and go, kept from one to the next of its size.

Owns the blocks that are free and a bound on all of them. A block that the kernel took back costs a page fault for each
of its pages when the next one of its size is made; gathered copies are made many times a step. Does not own how many
may be alive together (programs), nor what lies in them.
"""

import threading

import torch

__all__ = ["BlockPool"]

_ALONE = 2  # references to a storage that only the pool's own tensor has, while one looks at it


class BlockPool:
    """Flat tensors on the host. Safe to use from several threads.

    A block serves again when it was given back and nobody looks at it any more: views that someone still has keep
    their values.

    Attributes:
        limit_bytes: of all blocks together, those in use included: nothing is kept beyond it. 0 keeps nothing.
    """

    def __init__(self, limit_bytes: int = 0) -> None:
        self.limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._free: list[torch.Tensor] = []  # in the order in which they were given back
        self._used: dict[int, torch.Tensor] = {}  # by address

    @property
    def free_bytes(self) -> int:
        """Kept, and not in use."""
        return sum(block.nbytes for block in self._free)

    def take(self, num_elems: int, dtype: torch.dtype) -> torch.Tensor:
        """A tensor [num_elems], with whatever values."""
        with self._lock:
            block = self._found(num_elems, dtype)
            if block is None:
                self._make_room(num_elems * dtype.itemsize)
                block = torch.empty(num_elems, dtype=dtype)
            if block.nbytes:
                self._used[block.data_ptr()] = block
            return block.detach()  # whoever holds it, or a view of it, is seen in the storage's references

    def give(self, tensor: torch.Tensor) -> None:
        """What was taken is done with. Anything else is left alone."""
        with self._lock:
            block = self._used.pop(tensor.data_ptr(), None)
            if block is not None and self._held_bytes + block.nbytes <= self.limit_bytes:
                self._free.append(block)

    @property
    def _held_bytes(self) -> int:
        return self.free_bytes + sum(block.nbytes for block in self._used.values())

    def _found(self, num_elems: int, dtype: torch.dtype) -> torch.Tensor | None:
        for number, block in enumerate(self._free):
            if block.numel() == num_elems and block.dtype is dtype and _is_alone(block):
                return self._free.pop(number)
        return None

    def _make_room(self, num_bytes: int) -> None:
        """Let go of what was given back longest ago."""
        while self._free and self._held_bytes + num_bytes > self.limit_bytes:
            self._free.pop(0)


def _is_alone(block: torch.Tensor) -> bool:
    """Whether nothing but the pool refers to a block's storage."""
    return torch._C._storage_Use_Count(block.untyped_storage()._cdata) == _ALONE
