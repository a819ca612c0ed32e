"""How the ranks of a group exchange parameters and gradients: the transports.

Owns: where gathered parameters and summed gradients come from. Does not own when (programs) or what they are for.

    SharedMemoryTransport   ranks on one host: gathering is a look into shared memory, reducing one read of each peer's
                            buffer. A gloo barrier per reduction is all that goes over a socket.
    MessageTransport        torch.distributed everywhere else: all_gather and all_to_all.

Both form sums in rank order, so both give the same bits, and so does every ZeRO stage. `open_transport` chooses by
measurement. All methods are collective: every rank calls them in the same order.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..memory.block_pool import BlockPool
from .kernels import sum_ranks
from .placement import (
    CommonParameters,
    GatheredParameters,
    OffloadedParameters,
    ParameterStore,
    UploadedParameters,
    WindowParameters,
)
from .sharding import shard_range
from .shared_memory import SharedSegment, can_share, open_segment

__all__ = ["MessageTransport", "SharedMemoryTransport", "Transport", "open_transport"]


class Transport(ABC):
    """The exchange between the ranks of one group.

    Attributes:
        name: for reports.
        rank, size: in the group.
        copies: memory of gathered copies that come and go.
    """

    name: str

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.copies = BlockPool()

    def gather_rows(self, values: Sequence[float]) -> torch.Tensor:
        """Every rank's `values`: float64 [size, len(values)]. Also a barrier."""
        own = torch.tensor(values, dtype=torch.float64)
        rows = torch.empty(self.size * len(values), dtype=torch.float64)
        dist.all_gather_single(rows, own, group=self.group)
        return rows.view(self.size, len(values))

    def all_gather(self, shard: torch.Tensor) -> torch.Tensor:
        """Every rank's shard, one after the other: for what is asked for rarely."""
        full = torch.empty(self.size * shard.numel(), dtype=shard.dtype)
        dist.all_gather_single(full, shard.contiguous(), group=self.group)
        return full

    def broadcast_object(self, value: Any) -> Any:
        """The first rank's `value`, any object that pickles."""
        box = [value]
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]

    def broadcast(self, value: torch.Tensor) -> torch.Tensor:
        """The first rank's `value`, in place."""
        dist.broadcast(value, group=self.group, group_src=0)
        return value

    @property
    @abstractmethod
    def buffer_bytes(self) -> int:
        """Bytes of shared memory for reductions that count as this rank's."""

    @abstractmethod
    def parameters(self, num_elems: int, dtype: torch.dtype, sharded: bool) -> ParameterStore:
        """Storage for a chunk whose shards the ranks own.

        Args:
            num_elems: of the whole chunk; divides by the ranks.
            sharded: whether the gathered copy is dropped between uses (else it always stays).
        """

    def offloaded_parameters(self, num_elems: int, dtype: torch.dtype, uploads: bool = False) -> OffloadedParameters:
        """Storage for a chunk whose shards are at home on another tier; the gathered copy is dropped between uses.

        Args:
            uploads: whether it is gathered from copies of the shards on a device.
        """

        kind = UploadedParameters if uploads else OffloadedParameters
        return kind(num_elems, dtype, self.size, self.rank, self.gather_into, self.copies)

    def gather_into(self, full: torch.Tensor, shard: torch.Tensor) -> None:
        """Every rank's shard, one after the other, into `full`."""
        dist.all_gather_single(full, shard, group=self.group)

    @abstractmethod
    def prepare_reduce(self, max_elems: int, dtype: torch.dtype, max_fields: int) -> None:
        """Make the buffers for reductions of at most `max_elems` elements and `max_fields` flags."""

    @abstractmethod
    def reduce(
        self,
        pack: Callable[[torch.Tensor, torch.Tensor], None],
        num_elems: int,
        num_fields: int,
        out: torch.Tensor,
        whole: bool,
        accumulate: bool,
    ) -> tuple[float, torch.Tensor]:
        """Sum every rank's gradients of a chunk.

        Args:
            pack: writes this rank's gradients into the flat buffer [num_elems] and, for each parameter, whether it has
                one into the uint8 flags [num_fields].
            out: float32; [num_elems] where `whole`, else the shard [num_elems / size].
            accumulate: whether the sum is added to `out`.

        Returns:
            the sum of squares over this rank's shard afterwards, and the flags, true where any rank had a gradient.
        """

    def close(self) -> None:
        """Leave the group."""
        dist.destroy_process_group(self.group)


class SharedMemoryTransport(Transport):
    """Ranks of one host.

    Exchanges use two buffers in turn: a rank that has passed the barrier of exchange k knows that every peer has
    finished reading exchange k-1, whose buffer exchange k+1 may then overwrite. One barrier an exchange is enough.
    """

    name = "shared-memory"

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self._count = 0
        self._buffers: list[torch.Tensor] = []
        self._flags: list[torch.Tensor] = []
        self._segment: SharedSegment | None = None

    @property
    def buffer_bytes(self) -> int:
        return sum(buffer[self.rank].nbytes for buffer in self._buffers)

    def parameters(self, num_elems: int, dtype: torch.dtype, sharded: bool) -> ParameterStore:
        start, stop = shard_range(num_elems, self.size, self.rank)
        if sharded:
            segment = open_segment(self.group, num_elems * dtype.itemsize)
            return CommonParameters(segment.view(dtype, 0, num_elems), start, stop, self.size)
        segment = open_segment(self.group, self.size * num_elems * dtype.itemsize)
        copies = segment.view(dtype, 0, self.size * num_elems).view(self.size, num_elems)
        return WindowParameters(copies, self.rank)

    def gather_into(self, full: torch.Tensor, shard: torch.Tensor) -> None:
        """Through the buffers of reductions, where there are any that are large enough."""
        if not self._buffers or full.is_cuda or full.nbytes > self._buffers[0][0].nbytes:
            super().gather_into(full, shard)
            return
        rows = self._buffers[self._count % 2].view(torch.uint8)[:, : full.nbytes].view(self.size, self.size, -1)
        self._count += 1
        # Where the next rank looks for what it reduces: of two ranks, neither touches more pages than reductions do.
        rows[self.rank, (self.rank + 1) % self.size].copy_(shard.view(torch.uint8))
        dist.barrier(self.group)
        for owner, part in enumerate(full.view(torch.uint8).view(self.size, -1)):
            part.copy_(rows[owner, (owner + 1) % self.size])

    def prepare_reduce(self, max_elems: int, dtype: torch.dtype, max_fields: int) -> None:
        row_bytes = max_elems * dtype.itemsize
        flag_bytes = -(-max_fields // 64) * 64
        self._segment = open_segment(self.group, 2 * self.size * (row_bytes + flag_bytes))
        for turn in range(2):
            start = turn * self.size * (row_bytes + flag_bytes)
            rows = self._segment.view(dtype, start, self.size * max_elems).view(self.size, max_elems)
            flags = self._segment.view(torch.uint8, start + self.size * row_bytes, self.size * flag_bytes)
            self._buffers.append(rows)
            self._flags.append(flags.view(self.size, flag_bytes))

    def reduce(
        self,
        pack: Callable[[torch.Tensor, torch.Tensor], None],
        num_elems: int,
        num_fields: int,
        out: torch.Tensor,
        whole: bool,
        accumulate: bool,
    ) -> tuple[float, torch.Tensor]:
        turn = self._count % 2
        self._count += 1
        rows, flags = self._buffers[turn][:, :num_elems], self._flags[turn][:, :num_fields]
        pack(rows[self.rank], flags[self.rank])
        dist.barrier(self.group)
        squares = 0.0
        for owner in range(self.size) if whole else (self.rank,):
            start, stop = shard_range(num_elems, self.size, owner)
            squares_of_owner = sum_ranks(rows[:, start:stop], out[start:stop] if whole else out, accumulate)
            if owner == self.rank:
                squares = squares_of_owner
        return squares, flags.amax(dim=0).clone()


class MessageTransport(Transport):
    """Ranks anywhere, by torch.distributed."""

    name = "gloo"

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self._own = torch.empty(0)
        self._received = torch.empty(0)

    @property
    def buffer_bytes(self) -> int:
        return 0

    def parameters(self, num_elems: int, dtype: torch.dtype, sharded: bool) -> ParameterStore:
        return GatheredParameters(num_elems, dtype, self.size, self.rank, self._all_gather, sharded, self.copies)

    def _all_gather(self, full: torch.Tensor, shard: torch.Tensor) -> None:
        dist.all_gather_single(full, shard, group=self.group)

    def prepare_reduce(self, max_elems: int, dtype: torch.dtype, max_fields: int) -> None:
        self._own = torch.empty(max_elems, dtype=dtype)
        self._received = torch.empty(max_elems, dtype=dtype)

    def reduce(
        self,
        pack: Callable[[torch.Tensor, torch.Tensor], None],
        num_elems: int,
        num_fields: int,
        out: torch.Tensor,
        whole: bool,
        accumulate: bool,
    ) -> tuple[float, torch.Tensor]:
        own, flags = self._own[:num_elems], torch.zeros(num_fields, dtype=torch.uint8)
        pack(own, flags)
        received = self._received[:num_elems]
        dist.all_to_all_single(received, own, group=self.group)
        all_flags = torch.empty(self.size * num_fields, dtype=torch.uint8)
        dist.all_gather_single(all_flags, flags, group=self.group)
        start, stop = shard_range(num_elems, self.size, self.rank)
        shard = out[start:stop] if whole else out
        squares = sum_ranks(received.view(self.size, stop - start), shard, accumulate)
        if whole:
            dist.all_gather_single(out, shard.clone(), group=self.group)
        return squares, all_flags.view(self.size, num_fields).amax(dim=0)


_KINDS: dict[str, type[Transport]] = {
    transport.name: transport for transport in (SharedMemoryTransport, MessageTransport)
}


def open_transport(
    parent: dist.ProcessGroup | None = None, kind: str | None = None, timeout_s: float = 600
) -> Transport:
    """The transport for the ranks of `parent` (None: the default group). Collective.

    Args:
        kind: `shared-memory` or `gloo`; None: shared memory where the ranks can share, unless messages
            measure twice as fast.

    Raises:
        ValueError: a kind that does not exist, or shared memory asked for where the ranks cannot share.
    """
    if kind is not None and kind not in _KINDS:
        raise ValueError(f"transport {kind!r}: there is {' and '.join(_KINDS)}")
    ranks = dist.get_process_group_ranks(parent) if parent is not None else None
    group = dist.new_group(
        ranks, backend="gloo", timeout=timedelta(seconds=timeout_s), use_local_synchronization=parent is not None
    )
    assert isinstance(group, dist.ProcessGroup)
    if kind == MessageTransport.name:
        return MessageTransport(group)
    if not can_share(group):
        if kind is not None:
            raise ValueError(
                "transport 'shared-memory': the ranks cannot open each other's memory; use transport='gloo'"
            )
        return MessageTransport(group)
    if kind is None and _reduce_seconds(SharedMemoryTransport(group)) > 2 * _reduce_seconds(MessageTransport(group)):
        return MessageTransport(group)  # a clear margin: on busy cores a short measurement wavers
    return SharedMemoryTransport(group)


def _reduce_seconds(transport: Transport, num_elems: int = 1 << 20, rounds: int = 5) -> float:
    """The slowest rank's best of `rounds` reductions of 4 MiB: enough to tell memory from sockets."""
    num_elems = num_elems // transport.size * transport.size
    transport.prepare_reduce(num_elems, torch.float32, 1)
    out = torch.empty(num_elems // transport.size)
    source = torch.ones(num_elems)

    def pack(flat: torch.Tensor, flags: torch.Tensor) -> None:
        flat.copy_(source)
        flags.fill_(1)

    best = float("inf")
    for _ in range(rounds):
        transport.gather_rows([0.0])
        started = time.perf_counter()
        transport.reduce(pack, num_elems, 1, out, whole=False, accumulate=False)
        best = min(best, time.perf_counter() - started)
    return float(transport.gather_rows([best]).max())
