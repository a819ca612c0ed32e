"""What a pipeline schedule is: a placement and one list of actions per rank; and what its stages cost.

Owns `Schedule`, `StageCosts`, the placements and the units. It does not own how schedules are made (`pipelines_*.py`),
timed (`pipeline_timing.py`), checked (`pipeline_check.py`) or drawn (`pipeline_draw.py`).

Words: p ranks, v chunks on each, p*v stages; stage s runs on `placement[s]`; m micro-batches. A *loop* puts stage s on
rank s mod p; a *vee* (v = 2) goes down the ranks and comes back, so that the first and the last stage share rank 0.
Orders hold `F`, and either `B` (the whole backward) or `I` and later `W`; offloading ones hold `SAVE` and `LOAD` too.

Units without measured costs: F = I = W = 1 for the p-th part of a model, so a chunk takes 1/v of each; transfers
between ranks take no time; activations are counted in those of one micro-batch on the p-th part of the model.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..memory.errors import OutgrowError
from ..parallel.actions import Action, Kind

__all__ = ["Draft", "Op", "Schedule", "ScheduleError", "StageCosts", "from_draft", "loop", "per_rank", "vee"]

#: An action inside the generators: (kind, stage, micro-batch). Thousands are made to choose one schedule.
Op = tuple[Kind, int, int]
#: What a generator returns: the placement, and the operations of every rank in order.
Draft = tuple[tuple[int, ...], list[list[Op]]]


class ScheduleError(OutgrowError, ValueError):
    """A schedule that cannot run, or does not fit; names the action."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """One step of a pipeline.

    Attributes:
        name: of the generator.
        placement: the rank of each stage.
        orders: what each rank does, in order.
        num_micro_batches: of the step.
    """

    name: str
    placement: tuple[int, ...]
    orders: tuple[tuple[Action, ...], ...]
    num_micro_batches: int

    @property
    def num_ranks(self) -> int:
        return len(self.orders)

    @property
    def num_stages(self) -> int:
        return len(self.placement)

    @property
    def num_chunks(self) -> int:
        """Stages on the rank that has most of them."""
        return max(self.placement.count(rank) for rank in set(self.placement))

    def ops(self) -> list[list[Op]]:
        """The orders as plain tuples, for the inner loops."""
        return [[(a.kind, a.index or 0, a.micro_batch or 0) for a in order] for order in self.orders]


@dataclass(frozen=True, slots=True)
class StageCosts:
    """Measured (or assumed) costs of each stage for one micro-batch; every tuple has one entry per stage.

    Attributes:
        forward_s, input_s, weight_s: seconds of F, I and W.
        activations: what F leaves on the device until the end of W or B, in any unit (bytes, or the tables' unit).
        copy_s: seconds to copy the activations away, or back, one way; None where nobody has measured them.
        comm_s: seconds between the end of an action and its use on another rank.
        backward_s: of B; None: as long as I and W.

    Raises:
        ValueError: unequal lengths, or numbers below zero.
    """

    forward_s: tuple[float, ...]
    input_s: tuple[float, ...]
    weight_s: tuple[float, ...]
    activations: tuple[float, ...]
    copy_s: tuple[float, ...] | None = None
    comm_s: float = 0.0
    backward_s: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        columns = [self.forward_s, self.input_s, self.weight_s, self.activations]
        columns += [column for column in (self.copy_s, self.backward_s) if column is not None]
        if len({len(column) for column in columns}) != 1 or not self.forward_s:
            raise ValueError(f"costs need one entry per stage in each column, got {[len(c) for c in columns]} entries")
        if min(self.comm_s, *(min(column) for column in columns)) < 0:
            raise ValueError(f"costs below zero: {self}")

    @classmethod
    def of_stages(
        cls,
        forward_s: Sequence[float],
        input_s: Sequence[float],
        weight_s: Sequence[float],
        activations: Sequence[float] | None = None,
        copy_s: Sequence[float] | None = None,
        comm_s: float = 0.0,
        backward_s: Sequence[float] | None = None,
    ) -> "StageCosts":
        """Costs from lists. Activations count 1 for each stage unless given."""
        return cls(
            tuple(map(float, forward_s)),
            tuple(map(float, input_s)),
            tuple(map(float, weight_s)),
            tuple(map(float, activations)) if activations is not None else (1.0,) * len(forward_s),
            tuple(map(float, copy_s)) if copy_s is not None else None,
            float(comm_s),
            tuple(map(float, backward_s)) if backward_s is not None else None,
        )

    @classmethod
    def equal(
        cls,
        num_ranks: int,
        forward_s: float = 1.0,
        input_s: float = 1.0,
        weight_s: float = 1.0,
        comm_s: float = 0.0,
        copy_s: float | None = None,
    ) -> "StageCosts":
        """The same seconds for every p-th part of the model: the unit of the tables when all are 1."""
        p = num_ranks
        copies = None if copy_s is None else [copy_s] * p
        return cls.of_stages([forward_s] * p, [input_s] * p, [weight_s] * p, copy_s=copies, comm_s=comm_s)

    @property
    def num_stages(self) -> int:
        return len(self.forward_s)

    @property
    def total_s(self) -> tuple[float, ...]:
        """F + I + W of each stage."""
        return tuple(f + i + w for f, i, w in zip(self.forward_s, self.input_s, self.weight_s, strict=True))

    @property
    def whole_s(self) -> tuple[float, ...]:
        """Of B, of each stage."""
        if self.backward_s is not None:
            return self.backward_s
        return tuple(i + w for i, w in zip(self.input_s, self.weight_s, strict=True))

    @property
    def copying_s(self) -> tuple[float, ...]:
        """`copy_s`; where unknown, a quarter of F + I + W, so that both ways together can be hidden behind it."""
        return self.copy_s if self.copy_s is not None else tuple(total / 4 for total in self.total_s)

    def split(self, num_stages: int) -> "StageCosts":
        """The costs of the same model in `num_stages` stages, each old stage cut into equal ones.

        Raises:
            ValueError: a number of stages that is no multiple of the present one.
        """
        parts, rest = divmod(num_stages, self.num_stages)
        if rest or not parts:
            raise ValueError(
                f"costs of {self.num_stages} stages do not describe {num_stages} stages: "
                f"give the costs of {num_stages} stages, or of a number that divides it"
            )
        if parts == 1:
            return self

        def cut(column: tuple[float, ...]) -> tuple[float, ...]:
            return tuple(value / parts for value in column for _ in range(parts))

        return replace(
            self,
            forward_s=cut(self.forward_s),
            input_s=cut(self.input_s),
            weight_s=cut(self.weight_s),
            activations=cut(self.activations),
            copy_s=cut(self.copy_s) if self.copy_s is not None else None,
            backward_s=cut(self.backward_s) if self.backward_s is not None else None,
        )


def loop(num_ranks: int, num_chunks: int = 1) -> tuple[int, ...]:
    """Stage s on rank s mod p."""
    return tuple(stage % num_ranks for stage in range(num_ranks * num_chunks))


def vee(num_ranks: int) -> tuple[int, ...]:
    """Two chunks: down the ranks and back, the first and the last stage on rank 0."""
    return (*range(num_ranks), *reversed(range(num_ranks)))


def from_draft(name: str, draft: Draft, num_micro_batches: int) -> Schedule:
    """The schedule of a generator's plain tuples."""
    placement, orders = draft
    actions = tuple(tuple(Action(*op) for op in order) for order in orders)
    return Schedule(name, placement, actions, num_micro_batches)


def per_rank(values: Iterable[float], placement: Sequence[int], num_ranks: int) -> list[float]:
    """Sums over the stages of each rank."""
    sums = [0.0] * num_ranks
    for rank, value in zip(placement, values, strict=True):
        sums[rank] += value
    return sums
