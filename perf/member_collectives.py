"""The member of the case `collectives`: one rank with every transport open, and raw gloo beside them."""

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..parallel.collectives import Transport, open_transport
from ..parallel.placement import ParameterStore
from .case_collectives import COPY, WAYS
from .rank import Rank

__all__ = ["CollectivesMember", "build"]

_AT_LEAST_BYTES = 16 * 2**20  # moved in one timing, so that small sizes are repeated


class CollectivesMember:
    """Times every operation at every size.

    Args:
        rank: one of two or more.
        sizes_mib: of the whole tensors.
    """

    def __init__(self, rank: Rank, sizes_mib: Sequence[int]) -> None:
        self._rank = rank
        self._transports = [open_transport(kind=kind) for kind in ("gloo", "shared-memory")]
        for transport in self._transports:
            transport.prepare_reduce(max(sizes_mib) * 2**18, torch.float32, 1)
        self._operations: list[tuple[str, int, Callable[[], Tensor]]] = []
        for size_mib in sizes_mib:
            for name, operation in self._operations_of(size_mib * 2**18).items():
                self._operations.append((name, size_mib, operation))
        for name, size_mib, operation in self._operations:
            _check(name, size_mib, operation(), rank)

    def _operations_of(self, num_elems: int) -> dict[str, Callable[[], Tensor]]:
        """Name -> what does it once and returns its result. Shard k of a gathered tensor is full of k + 1."""
        gradients = torch.full((num_elems,), self._rank.index + 1.0)
        flat, shard = torch.empty(num_elems), torch.empty(num_elems // self._rank.count)
        own = torch.full_like(shard, self._rank.index + 1.0)

        def copy() -> Tensor:
            return flat.copy_(gradients)

        def gather_raw() -> Tensor:
            dist.all_gather_single(flat, own)
            flat.sum()
            return flat

        def reduce_raw() -> Tensor:
            flat.copy_(gradients)
            dist.reduce_scatter_tensor(shard, flat)
            return shard

        def pack(buffer: Tensor, flags: Tensor) -> None:
            buffer.copy_(gradients)
            flags.fill_(1)

        raw, *ways = WAYS
        operations = {COPY: copy, f"gather, {raw}": gather_raw, f"reduce, {raw}": reduce_raw}
        for way, transport in zip(ways, self._transports, strict=True):
            store = transport.parameters(num_elems, torch.float32, sharded=True)
            store.shard.copy_(own)
            operations[f"gather, {way}"] = _gather(store)
            operations[f"reduce, {way}"] = _reduce(transport, pack, num_elems, shard)
        return operations

    def turn(self, number: int) -> dict[tuple[str, int], float]:
        """(operation, MiB) -> seconds of one, the mean of as many as move 16 MiB."""
        start = number % len(self._operations)
        seconds: dict[tuple[str, int], float] = {}
        for name, size_mib, operation in self._operations[start:] + self._operations[:start]:
            repeats = max(1, _AT_LEAST_BYTES // (size_mib * 2**20))
            self._rank.barrier()
            started = time.perf_counter()
            for _ in range(repeats):
                operation()
            seconds[name, size_mib] = (time.perf_counter() - started) / repeats
        return seconds

    def close(self) -> None:
        for transport in self._transports:
            transport.close()


def _gather(store: ParameterStore) -> Callable[[], Tensor]:
    def gather() -> Tensor:
        store.gather()
        full = store.full
        assert full is not None
        full.sum()
        result = full
        store.drop()
        return result

    return gather


def _reduce(
    transport: Transport, pack: Callable[[Tensor, Tensor], None], num_elems: int, shard: Tensor
) -> Callable[[], Tensor]:
    def reduce() -> Tensor:
        transport.reduce(pack, num_elems, 1, shard, whole=False, accumulate=False)
        return shard

    return reduce


def _check(name: str, size_mib: int, result: Tensor, rank: Rank) -> None:
    """A rate of wrong results says nothing."""
    rank.barrier()  # shards that lie in shared memory are written by then
    if name == COPY:
        expected = torch.full_like(result, rank.index + 1.0)
    elif name.startswith("gather"):
        expected = torch.arange(1.0, rank.count + 1).repeat_interleave(result.numel() // rank.count)
    else:
        expected = torch.full_like(result, sum(range(1, rank.count + 1)))
    if not torch.equal(result, expected):
        raise RuntimeError(f"{name} of {size_mib} MiB gave a wrong result")


def build(rank: Rank, sizes_mib: Sequence[int]) -> CollectivesMember:
    """See `CollectivesMember`."""
    return CollectivesMember(rank, sizes_mib)
