"""What a step of a pipeline will take: units timed on the ranks that will run them, and the ranks' programs played.

Owns when units are timed: on all ranks at once, as they will compute, and on one while the others sleep, since ranks of
one host take cores, caches and memory from each other, and not while they wait. Does not own timing a unit
(`unit_costs.py`), nor what is made of the seconds (`scheduler/stage_choice.py`, `scheduler/rank_play.py`).
"""

import platform
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from ..memory.timeline import Timeline
from ..parallel.actions import Kind
from ..parallel.mesh import Mesh
from ..scheduler.program import Instruction, Program
from ..scheduler.rank_play import KINDS, RunSeconds, Shared, play_ranks
from ..scheduler.simulate import Work
from ..scheduler.stage_choice import UnitSeconds
from .unit_costs import Round, UnitTimer

__all__ = ["ELEMS_BYTES", "ElemSeconds", "elem_seconds", "hosts_of", "play_step", "unit_seconds"]

_TURNS, _TOGETHER = 3, 2  # of all ranks at once and of one alone; rounds of those at once that count
_ELEMS = 1 << 22  # more than caches hold, with their slots
ELEMS_BYTES = 10 * 4 * _ELEMS
"""That `elem_seconds` takes at most, with what an optimizer makes on its way."""
_PLAYED = frozenset({*KINDS, Kind.SEND_F, Kind.SEND_B, Kind.RECV_F, Kind.RECV_B, Kind.NORM, Kind.STEP, Kind.DROP})


def unit_seconds(timer: UnitTimer, mesh: Mesh, kinds: Set[Kind] = frozenset(KINDS)) -> list[UnitSeconds]:
    """Of each unit run, the same on all ranks. Collective.

    All ranks and one alone take turns: how much faster one is while the others wait is a ratio of the two, and the
    machine's speed changes.

    Args:
        kinds: of actions, that are wanted.
    """
    once = partial(timer.round, Kind.I in kinds or Kind.W in kinds, Kind.B in kinds)
    once()  # pays for what libraries set up, and makes the gradients that the others add to
    together: list[Round] = []
    alone: list[Round] = []
    for _ in range(_TURNS):
        dist.barrier()
        together += [once() for _ in range(_TOGETHER)]
        once()  # another rank may still be at one that counts
        dist.barrier()
        if mesh.rank == 0:
            alone.append(once())
    dist.barrier()
    alone = alone or together  # of other ranks nobody asks
    own = [run.by_kind for run in timer.seconds(together)], [run.by_kind for run in timer.seconds(alone)]
    rows: list[Any] = [None] * mesh.num_ranks
    dist.all_gather_object(rows, own)
    table = torch.tensor([mine for mine, _ in rows], dtype=torch.float64).quantile(0.5, dim=0).tolist()
    return [UnitSeconds.of(run, UnitSeconds.of(one)) for run, one in zip(table, rows[0][1], strict=True)]


def hosts_of(mesh: Mesh) -> tuple[int, ...]:
    """A number for the host of each rank of a pipeline: the same for those of one host. Collective."""
    names: list[Any] = [None] * mesh.num_ranks
    dist.all_gather_object(names, platform.node())
    return tuple(names.index(name) for name in names[:: mesh.num_data])


@dataclass(frozen=True, slots=True)
class ElemSeconds:
    """What happens to each element of a parameter behind the last backward pass.

    Attributes:
        update_s, norm_s: of one element, while all ranks do the same.
    """

    update_s: float
    norm_s: float


def elem_seconds(alone: Callable[[torch.nn.Parameter], torch.optim.Optimizer]) -> ElemSeconds:
    """Measured on all ranks at once. Collective.

    Args:
        alone: makes the run's optimizer for a parameter.
    """
    parameter = torch.nn.Parameter(torch.ones(_ELEMS))
    parameter.grad = torch.ones(_ELEMS)
    optimizer, gradient = alone(parameter), parameter.grad
    dist.barrier()
    own = _median_s(optimizer.step) / _ELEMS, _median_s(lambda: torch.linalg.vector_norm(gradient)) / _ELEMS
    rows: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(rows, own)
    return ElemSeconds(*(median(column) for column in zip(*rows, strict=True)))


def _median_s(work: Callable[[], object]) -> float:
    work()
    seconds: list[float] = []
    for _ in range(5):
        began_s = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began_s)
    return median(seconds)


def play_step(
    programs: Sequence[Program],
    runs: Sequence[UnitSeconds],
    hosts: tuple[int, ...],
    elems: ElemSeconds,
    num_elems: Sequence[Sequence[int]],
) -> list[Timeline] | None:
    """The timelines of all ranks; None where a program does what was not timed (disk, exchange of data ranks).

    Args:
        runs: of `unit_seconds`.
        num_elems: rank -> chunk -> elements that are updated.
    """
    if any(instruction.action.kind not in _PLAYED for program in programs for instruction in program.instructions):
        return None
    shared = Shared(hosts)

    def cost(rank: int, instruction: Instruction) -> Work:
        kind, index = instruction.action.kind, instruction.action.index
        if kind is Kind.NORM:
            return Work(sum(num_elems[rank]) * elems.norm_s)
        if kind is Kind.STEP:
            assert index is not None
            return Work(num_elems[rank][index] * elems.update_s)
        if kind not in KINDS:
            return Work(0.0)
        assert index is not None
        place, run = KINDS.index(kind), runs[index]
        return shared.work(rank, RunSeconds(run.by_kind[place], (run.alone or run).by_kind[place]))

    return play_ranks(programs, cost)
