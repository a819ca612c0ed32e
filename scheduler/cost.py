"""What every action of a program takes: seconds alone, and the resources that it shares meanwhile.

Owns the step from measured figures (a profile of units, a machine) to `Work`. Does not own the figures, nor what
happens when actions meet (`simulate.py`).

Resources: `disk` (both of its lanes; how much slower they go together was measured), `memory` (what copies, sums and
updates use in full, units in part), `cores` (what the units of all ranks on the machine compute with).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..parallel.actions import Kind
from .hardware import Hardware
from .holdings import is_gathered
from .plan import Activations, Home, MicroBatchOrder, Plan, UpdateTime
from .program import Instruction, Lane, StepShape
from .simulate import Work

__all__ = ["Costs", "TimeProfile", "UnitSeconds"]

_TRANSFERS = (Kind.READ, Kind.WRITE, Kind.SAVE, Kind.LOAD)


@dataclass(frozen=True, slots=True)
class UnitSeconds:
    """One run of a unit, alone on the machine.

    Attributes:
        forward_s: with everything saved for the backward.
        backward_s: whole.
        weight_s: the part of `backward_s` that makes gradients of weights.
        recompute_s: what its backward takes longer where it runs the forward again, as far as that has to.
        selective_s: likewise of what selective recomputation runs again, and of keeping the rest; None: not measured,
            and taken for as much as all of it.
        offload_s: what the forward takes longer where somebody is handed all that it saves.

    Raises:
        ValueError: a negative number.
    """

    forward_s: float
    backward_s: float
    weight_s: float
    recompute_s: float
    selective_s: float | None = None
    offload_s: float = 0.0

    def __post_init__(self) -> None:
        whole = self.forward_s, self.backward_s, self.weight_s, self.recompute_s
        if min(*whole, self.selective_s or 0.0, self.offload_s) < 0:
            raise ValueError(f"{self}: seconds cannot be negative")


@dataclass(frozen=True)
class TimeProfile:
    """One micro-batch.

    Attributes:
        units: one for each unit run.
        loss_s, loss_backward_s: of what comes behind the last unit.
        in_turns: times as long that a pass takes where micro-batches take turns, each in a thread of its own.

    Raises:
        ValueError: turns that take less.
    """

    units: tuple[UnitSeconds, ...]
    loss_s: float = 0.0
    loss_backward_s: float = 0.0
    in_turns: float = 1.0

    def __post_init__(self) -> None:
        if self.in_turns < 1:
            raise ValueError(f"turns take at least as long as no turns, not {self.in_turns:g} of that")


@dataclass(frozen=True)
class Costs:
    """Costs of one plan's actions: call it with an instruction.

    Attributes:
        num_elems: chunk -> elements that this rank updates.
        shares_parameters: whether gathering parameters at home on the host is a look into shared memory.
        ranks_here: ranks of this machine, which all do the same at the same time.
    """

    shape: StepShape
    plan: Plan
    profile: TimeProfile
    hardware: Hardware
    num_elems: Sequence[int]
    shares_parameters: bool = False
    ranks_here: int = 1

    def __call__(self, instruction: Instruction) -> Work:
        if instruction.action.kind is Kind.DROP:
            return Work(0.0)
        is_transfer = instruction.action.kind in _TRANSFERS and instruction.lane in (Lane.READ, Lane.WRITE)
        alone = self._transfer(instruction) if is_transfer else self._alone(instruction)
        return replace(alone, seconds=alone.seconds + self.hardware.action_s)

    @property
    def capacity(self) -> Callable[[str, int], float]:
        """Of resources, for `simulate`."""
        disk = self.hardware.disk

        def of(resource: str, num_users: int) -> float:
            return disk.both_capacity if resource == "disk" and disk is not None and num_users > 1 else 1.0

        return of

    def _alone(self, instruction: Instruction) -> Work:
        kind, c = instruction.action.kind, instruction.action.index
        match kind:
            case Kind.F | Kind.B | Kind.I | Kind.W | Kind.R:
                return Work(self._compute(instruction) + self._summed_s(instruction), {"cores": 1.0})
            case Kind.UP | Kind.DOWN | Kind.SAVE | Kind.LOAD:
                return Work(instruction.num_bytes / self.hardware.copy_bytes_per_s, {"memory": 1.0})
            case Kind.GATHER | Kind.REDUCE if c is not None:
                return self._exchange(kind, c, instruction.num_bytes)
            case Kind.STEP if c is not None:
                return Work(self._update_s(self.num_elems[c]), {"memory": 1.0, "cores": 1.0})
            case Kind.NORM:
                return Work(self._norm(), {"memory": 1.0, "cores": 1.0})
            case _:
                return Work(0.0)

    def _again_s(self, run: int) -> float:
        """What a unit's backward takes beside itself."""
        unit = self.profile.units[run]
        word = self.plan.activations_of(self.shape.units[run].unit)
        if word is Activations.SELECTIVE and unit.selective_s is not None:
            return unit.selective_s
        return unit.recompute_s if word.is_recomputed else 0.0

    def _compute(self, instruction: Instruction) -> float:
        run = instruction.action.index
        assert run is not None
        takes_turns = self.plan.order is MicroBatchOrder.BY_UNIT and self.plan.micro_batches > 1
        alone_s = self._pass_s(instruction.action.kind, run)
        if not takes_turns:
            return alone_s
        return alone_s * self.profile.in_turns + self.hardware.turn_s

    def _pass_s(self, kind: Kind, run: int) -> float:
        unit = self.profile.units[run]
        match kind:
            case Kind.F:
                # The loss, and its backward up to the last unit's, go on until that begins.
                is_last = run == len(self.shape.units) - 1
                moves = self.plan.activations_of(self.shape.units[run].unit).is_offloaded
                between_s = is_last * (self.profile.loss_s + self.profile.loss_backward_s)
                return unit.forward_s + moves * unit.offload_s + between_s
            case Kind.B:
                return unit.backward_s + self._again_s(run)
            case Kind.I:
                return unit.backward_s - unit.weight_s + self._again_s(run)
            case Kind.W:
                return unit.weight_s
            case _:
                return unit.recompute_s

    def _summed_s(self, instruction: Instruction) -> float:
        """What a backward pass takes to add to the gradients of earlier micro-batches, where nothing else does."""
        kind, run, micro_batch = instruction.action.kind, instruction.action.index, instruction.action.micro_batch
        if kind not in (Kind.B, Kind.W) or not micro_batch or self.plan.world_size > 1:
            return 0.0
        assert run is not None
        chunks = [c for c in self.shape.units[run].chunks if not self.plan.updates_on_host(c)]
        num_bytes = sum(self.shape.chunks[c].num_bytes for c in chunks if self.shape.chunks[c].trainable)
        return num_bytes / self.hardware.sum_bytes_per_s

    def _transfer(self, instruction: Instruction) -> Work:
        """What gives way to computing takes longer beside it, and slows it by what it still uses of the cores."""
        disk = self.hardware.disk
        if disk is None:
            raise ValueError(f"{instruction.action}: no disk was measured, so nothing can be said of its seconds")
        if not instruction.num_bytes:
            return Work(0.0)  # it is there already
        is_save = instruction.action.kind is Kind.SAVE
        kind = disk.read if instruction.lane is Lane.READ else disk.save if is_save else disk.write
        shares = {"disk": float(self.ranks_here), "cores": kind.cores_share * self.ranks_here}
        return Work(kind.seconds(instruction.num_bytes), shares, {"cores": kind.beside})

    def _exchange(self, kind: Kind, chunk: int, num_bytes: int) -> Work:
        """Between ranks it gives way to computing: it was measured beside that."""
        net = self.hardware.net
        if self.plan.world_size == 1:
            return Work(num_bytes / self.hardware.sum_bytes_per_s, {"memory": 1.0})
        home = self.plan.chunks[chunk].parameter_home
        if kind is Kind.GATHER and self.shares_parameters and home is Home.HOST and is_gathered(chunk, self.plan):
            return Work(0.0)
        if net is None:
            raise ValueError(f"{kind} c{chunk}: no exchange between ranks was measured")
        latency_s, bytes_per_s = net.reduce_latency_s, net.reduce_bytes_per_s
        if kind is Kind.GATHER:
            latency_s, bytes_per_s = net.gather_latency_s, net.gather_bytes_per_s
        shares = {"memory": 1.0, "cores": net.cores_share}
        return Work(latency_s + num_bytes / bytes_per_s, shares, {"cores": 1.0})

    def _update_s(self, num_elems: int) -> float:
        """Of a chunk; in the backward pass one rank looks at its gradients' norm on the way."""
        looks = self.plan.world_size == 1 and self.plan.update is UpdateTime.BACKWARD
        norm_s = looks * 4 * num_elems / self.hardware.copy_bytes_per_s
        return self.hardware.update_latency_s + num_elems / self.hardware.update_elems_per_s + norm_s

    def _norm(self) -> float:
        """One look at all gradients, where they were not looked at before; and one more pass where they are clipped."""
        elems = sum(self.num_elems)
        looks = self.plan.world_size == 1 and self.plan.update is UpdateTime.AFTER
        passes = looks + self.plan.clips_gradients
        latency = self.hardware.net.reduce_latency_s if self.hardware.net and self.plan.world_size > 1 else 0.0
        return latency + passes * 4 * elems / self.hardware.copy_bytes_per_s
