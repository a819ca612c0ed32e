"""What a plan takes of a device's memory and of the host's beside it, where the two are apart.

Owns these sums, from layouts and plan alone, before anything is made. Does not own adding them up over a step
(`scheduler/device_ledger.py`), nor a unified machine's (`host_figures.py`).
"""

from ..scheduler.ledger import HostFigures
from ..scheduler.plan import Home, MicroBatchOrder, Plan
from .host_figures import RESERVE_BYTES, TURN_BYTES, RankState, update_bytes

__all__ = ["separate_figures"]


def separate_figures(rank: RankState, plan: Plan) -> tuple[HostFigures, HostFigures]:
    """The figures of one rank: the host's and the device's."""
    layouts, optimizer = rank.layouts, rank.optimizer
    state: dict[Home, dict[int, int]] = {home: {} for home in Home}
    sums: dict[Home, dict[int, int]] = {home: {} for home in Home}
    updates: dict[Home, dict[int, int]] = {home: {} for home in Home}
    copies: dict[int, int] = {}  # gathered ones, which lie on the device
    for layout, decision in zip(layouts, plan.chunks, strict=True):
        c = layout.index
        owned = layout.num_elems // (plan.world_size if decision.optimizer_sharded else 1)
        original = rank.original_dtypes[layout.fields[0].name]
        slots = sum(dtype.itemsize for dtype in optimizer.slots.values()) if layout.trainable else 0
        kept = slots + (original.itemsize if original is not layout.dtype else 0)
        for home, num_bytes in (
            (decision.parameter_home, owned * layout.dtype.itemsize),
            (decision.optimizer_home, owned * kept),
        ):
            state[home][c] = state[home].get(c, 0) + num_bytes
        if plan.world_size > 1 and decision.optimizer_sharded:
            copies[c] = layout.num_bytes
        if layout.trainable:
            place = Home.HOST if plan.updates_on_host(c) else Home.DEVICE
            sums[place][c] = layout.num_elems // (plan.world_size if decision.gradients_sharded else 1) * 4
            updates[place][c] = update_bytes(layout, decision, optimizer, owned, slots)
    exchange = 0
    if plan.world_size > 1:
        largest = max((layout.num_bytes for layout in layouts if layout.trainable), default=0)
        exchange = 2 * largest * (plan.world_size if rank.transport == "shared-memory" else 1)
    threads = plan.micro_batches if plan.order is MicroBatchOrder.BY_UNIT else 0
    reserve = RESERVE_BYTES + TURN_BYTES * threads
    host = HostFigures(
        rank.process_bytes, state[Home.HOST], sums[Home.HOST], exchange, updates[Home.HOST], True, reserve
    )
    device = HostFigures(0, state[Home.DEVICE], sums[Home.DEVICE], 0, updates[Home.DEVICE], True, 0, copies)
    return host, device
