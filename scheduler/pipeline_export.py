"""Pipeline schedules in other people's words: JSON, and the action text of `torch.distributed.pipelining`.

Both are plain data; this loads neither torch nor anything else to make them.
"""

from ..parallel.actions import Kind
from .pipeline_data import Schedule
from .pipeline_timing import Timing

__all__ = ["as_json", "as_torch"]


def as_json(timing: Timing) -> dict[str, object]:
    """The schedule as plain data: what each rank computes, in order, with its bubble and its peaks.

    An offloading schedule has `copies` too: the full orders, with `SAVE` and `LOAD` where they are issued.
    """
    plan = timing.schedule
    data: dict[str, object] = {
        "placement": list(plan.placement),
        "orders": [[str(action) for action in order if action.kind.is_compute] for order in plan.orders],
        "bubble": round(timing.bubble_s, 9),
        "peak_activations": list(timing.peak_activations),
    }
    if any(action.kind is Kind.SAVE for order in plan.orders for action in order):
        data["copies"] = [[str(action) for action in order] for order in plan.orders]
    return data


def as_torch(schedule: Schedule) -> dict[int, list[str]]:
    """Rank -> its computation as torch writes it: `2F0` is the forward of stage 2 on micro-batch 0.

    torch has no words for copies of activations; they are left out.
    """
    return {
        rank: [f"{action.index}{action.kind}{action.micro_batch}" for action in order if action.kind.is_compute]
        for rank, order in enumerate(schedule.orders)
    }
