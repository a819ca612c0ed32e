"""What a plan takes of host memory beside its program: state, gradients, buffers between ranks, updates.

Owns these sums, from layouts and plan alone, before anything is made. Does not own adding them up over a step
(`scheduler/ledger.py`).
"""

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..memory.chunk import ChunkLayout
from ..memory.process import read_process_memory
from ..scheduler.ledger import HostFigures
from ..scheduler.plan import ChunkPlan, Home, MicroBatchOrder, Plan
from .adopting import TILE_ELEMS
from .optimizer import PiecewiseOptimizer

__all__ = ["RESERVE_BYTES", "TURN_BYTES", "RankState", "host_figures", "process_bytes", "update_bytes"]

RESERVE_BYTES = 32 << 20  # the heap's gaps, stacks of the lanes' threads, what kernels keep after their first call
_PAGE_BYTES = mmap.PAGESIZE
TURN_BYTES = 2 << 20  # of a micro-batch's own thread, where micro-batches take turns


@dataclass(frozen=True)
class RankState:
    """What is the same for every plan of one rank.

    Attributes:
        original_dtypes: of parameters as they were given.
        transport: name of it; `single` on one rank.
        process_bytes: of the process without the model.
        freed_share: as in `HostFigures`.
    """

    layouts: Sequence[ChunkLayout]
    optimizer: PiecewiseOptimizer
    original_dtypes: Mapping[str, torch.dtype]
    transport: str
    process_bytes: int
    freed_share: float = 0.0


def process_bytes(parameters: Sequence[torch.Tensor]) -> int:
    """Resident bytes of this process without the model's parameters, as far as they have memory.

    In memory that ranks share, what this one has not looked at yet is not resident: it looks at it now, as it will in
    every step.
    """
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in parameters if not p.is_meta}
    for storage in storages.values():
        torch.empty(0, dtype=torch.uint8).set_(storage)[::_PAGE_BYTES].sum()
    return max(read_process_memory().resident_bytes - sum(each.nbytes() for each in storages.values()), 0)


def host_figures(rank: RankState, plan: Plan) -> HostFigures:
    """The figures of one rank."""
    optimizer, original_dtypes, transport = rank.optimizer, rank.original_dtypes, rank.transport
    is_summed = plan.sums_gradients
    state: dict[int, int] = {}
    gradients: dict[int, int] = {}
    updates: dict[int, int] = {}
    copies: dict[int, int] = {}  # chunk -> bytes of a gathered copy that comes and goes
    for layout, decision in zip(rank.layouts, plan.chunks, strict=True):
        owned = layout.num_elems // (plan.world_size if decision.optimizer_sharded else 1)
        has_master = original_dtypes[layout.fields[0].name] is not layout.dtype
        state[layout.index] = _parameter_bytes(layout, decision, plan, transport)
        if plan.world_size > 1 and decision.parameters_sharded and not _is_shared(decision, transport):
            copies[layout.index] = layout.num_bytes
        if decision.optimizer_home is Home.HOST:
            state[layout.index] += owned * original_dtypes[layout.fields[0].name].itemsize * has_master
        if not layout.trainable:
            continue
        slots = sum(dtype.itemsize for dtype in optimizer.slots.values())
        if decision.optimizer_home is Home.HOST:
            state[layout.index] += owned * slots
        sharded = plan.world_size if decision.gradients_sharded else 1
        gradients[layout.index] = layout.num_elems // sharded * 4 if is_summed else layout.num_bytes
        updates[layout.index] = update_bytes(layout, decision, optimizer, owned, slots)
    exchange = max(map(partial(_exchange_bytes, plan, transport), rank.layouts, plan.chunks), default=0)
    threads = plan.micro_batches if plan.order is MicroBatchOrder.BY_UNIT else 0
    reserve = RESERVE_BYTES + TURN_BYTES * threads
    return HostFigures(
        rank.process_bytes, state, gradients, exchange, updates, is_summed, reserve, copies, rank.freed_share
    )


def _exchange_bytes(plan: Plan, transport: str, layout: ChunkLayout, decision: ChunkPlan) -> int:
    """Of two buffers in turn."""
    if plan.world_size == 1 or not layout.trainable:
        return 0
    others = plan.world_size - 1 if transport == "shared-memory" else 0  # whose buffers it reads: whole, or its shard
    is_gathered = decision.parameter_home is Home.DISK and plan.world_size > 2  # from the same part of every buffer
    reads_shard = decision.gradients_sharded and not is_gathered
    read_bytes = others * layout.num_bytes // (plan.world_size if reads_shard else 1)
    return 2 * (layout.num_bytes + read_bytes)


def _is_shared(decision: ChunkPlan, transport: str) -> bool:
    return transport == "shared-memory" and decision.parameter_home is Home.HOST


def _parameter_bytes(layout: ChunkLayout, decision: ChunkPlan, plan: Plan, transport: str) -> int:
    if decision.parameter_home is Home.DISK:
        return 0
    if not decision.optimizer_sharded or plan.world_size == 1:
        return layout.num_bytes
    if transport == "shared-memory":  # the kernel counts every page that a process touches
        return layout.num_bytes * (1 if decision.parameters_sharded else plan.world_size)
    return layout.num_bytes // (plan.world_size if decision.parameters_sharded else 1)


def update_bytes(
    layout: ChunkLayout, decision: ChunkPlan, optimizer: PiecewiseOptimizer, owned: int, slots: int
) -> int:
    """Temporaries of torch's update, and the slots that the first one makes before they go to their buffer."""
    largest = min(max(field.num_elems for field in layout.fields), owned)
    on_disk = decision.optimizer_home is Home.DISK
    if on_disk:
        largest = min(largest, TILE_ELEMS)
    temporaries = 0 if optimizer.is_fused else 4 * (3 * owned if optimizer.is_foreach else 2 * largest)
    return temporaries + (largest * slots if on_disk else 0)
