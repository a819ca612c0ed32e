"""Where a chunk's parameters lie on one rank: the shard that it owns and the gathered copy that units compute with.

Owns the storage and what gathering and dropping do to it. Does not own when (programs) or over what (transports).

    LocalParameters      one rank, or every rank a full copy of its own: nothing to gather
    WindowParameters     a full copy per rank in shared memory; gathering copies the peers' shards into one's own copy
    CommonParameters     one copy for all ranks in shared memory; gathering costs nothing
    GatheredParameters   a private shard; gathering is an all_gather into a copy that may be dropped
    OffloadedParameters  a shard that is in memory only between attach and detach; gathering as above
    UploadedParameters   likewise, or a shard that stays; what is computed with or gathered is a copy on another device
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from ..memory.block_pool import BlockPool
from .sharding import shard_range

__all__ = [
    "CommonParameters",
    "GatheredParameters",
    "LocalParameters",
    "OffloadedParameters",
    "ParameterStore",
    "UploadedParameters",
    "WindowParameters",
]


class ParameterStore(ABC):
    """The `param` slot of one chunk on one rank.

    Attributes:
        start, stop: the elements that this rank owns.
        shard: [stop - start], what the optimizer updates.
    """

    start: int
    stop: int
    shard: torch.Tensor
    moves = False
    """Whether the shard is in memory only while something holds it there."""

    @property
    def comes_and_goes(self) -> bool:
        """Whether the memory of what units compute with is used for something else meanwhile: tensors that autograd
        saves must then not hold on to it."""
        return False

    @property
    @abstractmethod
    def full(self) -> torch.Tensor | None:
        """The gathered copy [num_elems], or None while there is none."""

    @abstractmethod
    def gather(self) -> None:
        """Make `full` hold every rank's latest shard."""

    @abstractmethod
    def drop(self) -> None:
        """Forget the gathered copy, where it is a copy."""

    @abstractmethod
    def fill(self, values: torch.Tensor) -> None:
        """Set the parameters: `values` [num_elems] are the same on every rank."""

    @property
    @abstractmethod
    def held_bytes(self) -> int:
        """Bytes that this rank holds now; what ranks share is counted once, at its owner."""


class LocalParameters(ParameterStore):
    """Everything is this rank's own."""

    def __init__(self, values: torch.Tensor) -> None:
        self.start, self.stop = 0, values.numel()
        self.shard = values

    @property
    def full(self) -> torch.Tensor:
        return self.shard

    def gather(self) -> None:
        """Nothing to do: there are no other shards."""

    def drop(self) -> None:
        """Nothing to do: the copy is the original."""

    def fill(self, values: torch.Tensor) -> None:
        self.shard.copy_(values)

    @property
    def held_bytes(self) -> int:
        return self.shard.nbytes


class WindowParameters(ParameterStore):
    """Each rank's full copy lies where its peers can read it."""

    def __init__(self, copies: torch.Tensor, rank: int) -> None:
        self._copies = copies  # [size, num_elems], shared
        self._rank = rank
        self.start, self.stop = shard_range(copies.shape[1], copies.shape[0], rank)
        self.shard = copies[rank, self.start : self.stop]

    @property
    def full(self) -> torch.Tensor:
        return self._copies[self._rank]

    def gather(self) -> None:
        size, num_elems = self._copies.shape
        for peer in range(size):
            if peer != self._rank:
                start, stop = shard_range(num_elems, size, peer)
                self.full[start:stop].copy_(self._copies[peer, start:stop])

    def drop(self) -> None:
        """Nothing to do: the copy always stays."""

    def fill(self, values: torch.Tensor) -> None:
        self.full.copy_(values)

    @property
    def held_bytes(self) -> int:
        return self.full.nbytes


class CommonParameters(ParameterStore):
    """One copy, shared; each rank writes its own part and reads all."""

    def __init__(self, common: torch.Tensor, start: int, stop: int, size: int) -> None:
        self._common = common
        self._size = size
        self.start, self.stop = start, stop
        self.shard = common[start:stop]

    @property
    def full(self) -> torch.Tensor:
        return self._common

    def gather(self) -> None:
        """Nothing to do: the peers' shards are in place."""

    def drop(self) -> None:
        """Nothing to do: there is no copy."""

    def fill(self, values: torch.Tensor) -> None:
        self.shard.copy_(values[self.start : self.stop])

    @property
    def held_bytes(self) -> int:
        return self.shard.nbytes


class GatheredParameters(ParameterStore):
    """A private shard and, between gather and drop, a private full copy."""

    def __init__(
        self,
        num_elems: int,
        dtype: torch.dtype,
        size: int,
        rank: int,
        all_gather: Callable[[torch.Tensor, torch.Tensor], None],
        droppable: bool,
        copies: BlockPool | None = None,
    ) -> None:
        self.start, self.stop = shard_range(num_elems, size, rank)
        self._num_elems = num_elems
        self._all_gather = all_gather
        self._copies = copies or BlockPool()
        self.droppable = droppable
        self._full = None if droppable else torch.zeros(num_elems, dtype=dtype)
        self.shard = (
            torch.zeros(self.stop - self.start, dtype=dtype)
            if self._full is None
            else self._full[self.start : self.stop]
        )

    @property
    def comes_and_goes(self) -> bool:
        return self.droppable

    @property
    def full(self) -> torch.Tensor | None:
        return self._full

    def gather(self) -> None:
        if self._full is None:
            self._full = self._copies.take(self._num_elems, self.shard.dtype)
        self._all_gather(self._full, self.shard if self.droppable else self.shard.clone())

    def drop(self) -> None:
        if self.droppable and self._full is not None:
            self._copies.give(self._full)
            self._full = None

    def fill(self, values: torch.Tensor) -> None:
        self.shard.copy_(values[self.start : self.stop])
        if self._full is not None:
            self._full.copy_(values)

    @property
    def held_bytes(self) -> int:
        return self.shard.nbytes if self._full is None else self._full.nbytes + self.droppable * self.shard.nbytes


class OffloadedParameters(ParameterStore):
    """A shard at home on another tier: it is in memory only while a buffer that holds it is attached.

    On a single rank (no `all_gather`) the shard is the full chunk.
    """

    moves = True

    def __init__(
        self,
        num_elems: int,
        dtype: torch.dtype,
        size: int = 1,
        rank: int = 0,
        all_gather: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
        copies: BlockPool | None = None,
    ) -> None:
        self.start, self.stop = shard_range(num_elems, size, rank)
        self.dtype = dtype
        self._num_elems = num_elems
        self._all_gather = all_gather
        self._copies = copies or BlockPool()
        self._nothing = torch.empty(0, dtype=dtype)
        self.shard = self._nothing
        self._full: torch.Tensor | None = None

    @property
    def comes_and_goes(self) -> bool:
        return self.moves or self.gathers

    @property
    def full(self) -> torch.Tensor | None:
        return self._full if self.gathers else self._source

    @property
    def _source(self) -> torch.Tensor | None:
        """What is computed with, or gathered."""
        return self.shard if self.is_attached else None

    @property
    def computes_with_shard(self) -> bool:
        """Whether units find the shard itself."""
        return not self.gathers

    @property
    def gathers(self) -> bool:
        """Whether `full` is a copy of all ranks' shards; else it is the shard."""
        return self._all_gather is not None

    @property
    def is_attached(self) -> bool:
        """Whether the shard is in memory."""
        return self.shard is not self._nothing

    def attach(self, shard: torch.Tensor) -> None:
        """The shard lies in `shard` [stop - start] from now on."""
        assert shard.numel() == self.stop - self.start
        assert shard.dtype is self.dtype
        self.shard = shard

    def settle(self, shard: torch.Tensor) -> None:
        """The shard lies in `shard` for good."""
        self.attach(shard)
        self.moves = False

    def detach(self) -> None:
        """The buffer is about to hold something else."""
        self.shard = self._nothing

    def gather(self) -> None:
        if self._all_gather is None:
            return
        source = self._source
        assert source is not None, "a shard is gathered that is not in memory"
        if self._full is None:
            self._full = (
                torch.empty(self._num_elems, dtype=self.dtype, device=source.device)
                if source.is_cuda
                else self._copies.take(self._num_elems, self.dtype)
            )
        self._all_gather(self._full, source)

    def drop(self) -> None:
        if self._full is not None:
            self._copies.give(self._full)
        self._full = None

    def fill(self, values: torch.Tensor) -> None:
        assert self.is_attached
        self.shard.copy_(values[self.start : self.stop])

    @property
    def held_bytes(self) -> int:
        return self.shard.nbytes + (0 if self._full is None else self._full.nbytes)


class UploadedParameters(OffloadedParameters):
    """A shard on the host, and on a device with memory of its own a copy of it that comes and goes."""

    _copy: torch.Tensor | None = None

    @property
    def comes_and_goes(self) -> bool:
        return True

    @property
    def computes_with_shard(self) -> bool:
        return False

    @property
    def is_up(self) -> bool:
        """Whether the device has a copy."""
        return self._copy is not None

    @property
    def _source(self) -> torch.Tensor | None:
        return self._copy

    def bring(self, copy: torch.Tensor) -> None:
        """The device's copy lies in `copy` [stop - start] from now on."""
        assert copy.numel() == self.stop - self.start
        assert copy.dtype is self.dtype
        self._copy = copy

    def forget(self) -> None:
        """The copy's memory is about to hold something else."""
        self._copy = None

    @property
    def held_bytes(self) -> int:
        return super().held_bytes + (0 if self._copy is None or self._copy is self.shard else self._copy.nbytes)
