"""A plan with what it takes of every tier, budgets to hold it against, and both in words.

Owns what the ways to a plan (`fit.py`, `search.py`) have in common: the record, what they may decide, whether a plan
fits, and the refusal where none does. Does not own what a plan takes (`ledger.py`, `device_ledger.py`).
"""

from dataclasses import dataclass, replace

from ..memory.budget import format_bytes
from ..memory.errors import DoesNotFit
from .ledger import Ledger
from .plan import Activations, ChunkPlan, GatheredFor, Home, MicroBatchOrder, Plan, UpdateTime
from .program import Program

__all__ = ["Assessment", "Budgets", "Open", "against", "describe", "offloaded", "refusal"]


@dataclass(frozen=True, slots=True)
class Assessment:
    """A plan with what it takes: of the host, and of a device with memory of its own."""

    plan: Plan
    program: Program
    ledger: Ledger
    device: Ledger | None = None


@dataclass(frozen=True, slots=True)
class Open:
    """What may be decided; the rest is fixed by the caller.

    Attributes:
        disk: whether homes on disk are among the choices.
        zero: what ranks share of the state, and how long its copies live.
        may_adapt: whether prefetch and spare memory may be used as the budgets allow; not where a whole plan was given.
    """

    homes: bool
    activations: bool
    order: bool
    update: bool
    disk: bool = True
    zero: bool = False
    may_adapt: bool = True

    @property
    def is_any(self) -> bool:
        return self.homes or self.activations or self.order or self.update or self.zero


@dataclass(frozen=True, slots=True)
class Budgets:
    """What the tiers have.

    Attributes:
        host: bytes of the whole process.
        device: bytes of a device with memory of its own; None where there is none.
    """

    host: int
    device: int | None = None

    def lack_bytes(self, found: Assessment) -> int:
        """What is missing on both tiers together; 0 where the plan fits."""
        device = 0 if found.device is None else found.device.peak_bytes - (self.device or 0)
        return max(found.ledger.peak_bytes - self.host, 0) + max(device, 0)

    def fit(self, found: Assessment) -> bool:
        return self.lack_bytes(found) == 0

    def fate(self, found: Assessment) -> str:
        """Why a plan that does not fit is refused, in a line."""
        missing = found.ledger.peak_bytes - self.host
        if missing > 0:
            return f"refused: {format_bytes(missing)} too much at {found.ledger.where}"
        assert found.device is not None
        missing = found.device.peak_bytes - (self.device or 0)
        return f"refused: {format_bytes(missing)} too much on the device at {found.device.where}"


def against(seconds: float | None, best_s: float) -> str:
    """The fate of a plan that fits, beside the chosen one."""
    if seconds is None:
        return "its seconds were not measured"
    ratio = seconds / best_s
    if ratio >= 1:
        return f"slower by {100 * (ratio - 1):.0f}%"
    return f"faster by {100 * (1 - ratio):.1f}%, no more than a prediction can tell"


def offloaded(chunk: ChunkPlan, parameters: Home, slots: Home) -> ChunkPlan:
    """A chunk's decision with other homes. Parameters that go to disk have no gathered copy that stays."""
    if parameters is Home.DISK and chunk.optimizer_sharded and chunk.gathered_for is GatheredFor.STEP:
        chunk = replace(chunk, gathered_for=GatheredFor.USE, gradients_sharded=True)
    return replace(chunk, parameter_home=parameters, optimizer_home=slots)


def refusal(leanest: Assessment, open_: Open, budgets: Budgets) -> DoesNotFit:
    """The error where not even the leanest plan fits: what it needs, for what, and what helps."""
    tier, ledger, budget_bytes = "host", leanest.ledger, budgets.host
    if leanest.device is not None and ledger.peak_bytes <= budgets.host:
        tier, ledger, budget_bytes = "device", leanest.device, budgets.device or 0
    parts = ", ".join(
        f"{format_bytes(size)} {name}" for name, size in sorted(ledger.parts.items(), key=lambda part: -part[1]) if size
    )
    changes: list[str] = []
    if tier == "host" and not leanest.plan.uses_disk and not (open_.homes and open_.disk):
        changes.append("memory=Memory(disk='/a/folder') to let state go to disk")
    if leanest.plan.micro_batches == 1 or leanest.plan.order is MicroBatchOrder.BY_UNIT:
        changes.append("smaller micro-batches (a larger micro_batches=)")
    changes.append(f"a {tier} budget of {format_bytes(ledger.peak_bytes)}")
    return DoesNotFit(
        f"no plan fits into the {tier} budget of {format_bytes(budget_bytes)}: the leanest needs "
        f"{format_bytes(ledger.peak_bytes)}, {format_bytes(ledger.peak_bytes - budget_bytes)} more, at "
        f"{ledger.where} of a plan with {describe(leanest.plan)} ({parts}). What helps: {'; or '.join(changes)}"
    )


def describe(plan: Plan) -> str:
    """A plan in a few words, for tables and messages."""
    num_recomputed = sum(word is Activations.RECOMPUTE for word in plan.activations)
    num_selective = sum(word is Activations.SELECTIVE for word in plan.activations)
    num_moved = sum(word.is_offloaded for word in plan.activations)
    parts = [
        *_layout(plan),
        _homes(plan),
        f"{num_recomputed} units recomputed"
        + (f", {num_selective} selectively" if num_selective else "")
        + (f", {num_moved} offloaded" if num_moved else ""),
    ]
    if plan.micro_batches > 1:
        parts.append(f"{plan.micro_batches} micro-batches" + (f" {plan.order}" if plan.pipeline is None else ""))
    parts.append("updates in the backward pass" if plan.update is UpdateTime.BACKWARD else "updates after it")
    if plan.uses_disk or plan.world_size > 1:
        parts.append(f"prefetch {plan.prefetch}")
    if plan.keeps_freed:
        parts.append("freed blocks kept")
    if plan.cache_bytes:
        parts.append(f"{format_bytes(plan.cache_bytes)} for what moves")
    return ", ".join(parts)


def _layout(plan: Plan) -> list[str]:
    """How ranks share the work; nothing on one."""
    if plan.pipeline is not None:
        count = f"{plan.world_size} pipelines" if plan.world_size > 1 else "a pipeline"
        return [f"{count} of {plan.pipeline.num_ranks} ranks with schedule {plan.pipeline.schedule}"]
    if plan.world_size == 1:
        return []
    kept = any(chunk.gathered_for is GatheredFor.PASS for chunk in plan.chunks)
    return [
        f"{plan.world_size} ranks with zero={plan.zero}" + (", copies kept from forward to backward" if kept else "")
    ]


def _homes(plan: Plan) -> str:
    if any(chunk.parameter_home is Home.DISK for chunk in plan.chunks):
        return "parameters and optimizer on disk"
    if any(chunk.optimizer_home is Home.DISK for chunk in plan.chunks):
        return "the optimizer on disk"
    if plan.unified:
        return "everything in memory"
    num_host = sum(chunk.parameter_home is not Home.DEVICE for chunk in plan.chunks)
    if num_host == len(plan.chunks):
        return "everything on the host"
    return f"{num_host} of {len(plan.chunks)} chunks on the host" if num_host else "everything on the device"
