"""From a pipeline schedule to the program of one rank: stages become units, transfers and reductions are put in.

Owns the passes that pipelines add to those of `passes.py`, pure, actions in, actions out:

    expand            F, B, I, W of the rank's stages -> of their unit runs; copies to disk, where the plan has them
    add_transfers     SEND and RECV where a neighbouring stage lies on another rank
    add_tied          sums of gradients that several stages have a part in, before the norm and their updates

Sends wait in buffers of their own, so a rank never waits for its receiver; receives stand right before their use. Every
rank's list is thus an order in which all of them together can run (`rank_check.py` proves it), and each lane keeps it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..parallel.actions import Action, Kind
from .link import link
from .moves import add_moves, add_uploads
from .passes import add_downs, add_gathers, add_reduces, add_saves, add_updates, carry, prefetch
from .pipeline_data import Schedule
from .plan import Activations, Plan
from .program import Program, StepShape
from .stage_holdings import TIED

__all__ = ["TIED", "Stages", "add_tied", "add_transfers", "compile_stages", "expand"]

_F, _B, _I, _W = Kind.F, Kind.B, Kind.I, Kind.W
_BACKWARD = (_B, _I)


@dataclass(frozen=True, slots=True)
class Stages:
    """The stages of a model.

    Attributes:
        starts: first unit run of each.
        num_runs: unit runs of the model.
        placement: rank of each.
        with_gradient: for each, whether gradients flow back out of it into the stage before.
    """

    starts: tuple[int, ...]
    num_runs: int
    placement: tuple[int, ...]
    with_gradient: tuple[bool, ...]

    def runs(self, stage: int) -> range:
        """Its unit runs."""
        return range(self.starts[stage], [*self.starts[1:], self.num_runs][stage])

    def stage_of(self, run: int) -> int:
        return max(stage for stage, start in enumerate(self.starts) if start <= run)

    def on(self, rank: int) -> list[int]:
        """Stages of a rank."""
        return [stage for stage, owner in enumerate(self.placement) if owner == rank]

    def is_local(self, stage: int) -> bool:
        """Whether the stage's input comes from a stage on the same rank."""
        return stage > 0 and self.placement[stage - 1] == self.placement[stage]


def compile_stages(
    shape: StepShape, plan: Plan, schedule: Schedule, stages: Stages, rank: int, tied: Sequence[int] = ()
) -> Program:
    """The program of one rank for one step.

    Args:
        shape: unit runs of other ranks use no chunks.
        tied: chunks whose gradients other stages have a part in.
    """
    actions = expand(schedule, stages, shape, plan, rank)
    if plan.world_size > 1:
        actions = prefetch(add_gathers(actions, shape, plan), plan.prefetch)
    if plan.sums_gradients:
        actions = add_downs(add_reduces(actions, shape), plan)
    actions = add_updates(actions, shape, plan.update)
    actions = add_tied(actions, tied)
    actions = add_saves(actions, shape, plan)
    actions = add_transfers(actions, stages, rank)
    moved = add_uploads(actions, shape, plan)
    moved, num_carried = carry(add_moves(moved.actions, shape, plan, moved.lifetimes))
    return link(moved, shape, plan, num_carried)


def expand(schedule: Schedule, stages: Stages, shape: StepShape, plan: Plan, rank: int) -> list[Action]:
    """The unit runs of a rank's stages, in the order of its schedule.

    Where the plan copies activations to disk, a SAVE of the schedule becomes one for each unit run, right behind its
    forward, and a LOAD one for each at its place, in the order in which the backward pass comes to them. Units that
    keep nothing, or that have a policy of their own, are left out.
    """
    copied: set[tuple[int | None, int | None]] = set()
    if plan.pipeline is not None and plan.pipeline.copies_to_disk:
        copied = {(a.index, a.micro_batch) for a in schedule.orders[rank] if a.kind is Kind.SAVE}

    def moves(run: int) -> bool:
        unit = shape.units[run]
        return unit.has_backward and unit.saved_bytes > 0 and plan.activations_of(unit.unit) is Activations.KEEP

    result: list[Action] = []
    for action in schedule.orders[rank]:
        assert action.index is not None
        runs, number = stages.runs(action.index), action.micro_batch
        is_copied = (action.index, number) in copied
        if action.kind is _F:
            for run in runs:
                result.append(Action(_F, run, number))
                result += [Action(Kind.SAVE, run, number)] if is_copied and moves(run) else []
        elif action.kind is Kind.LOAD and is_copied:
            result += [Action(Kind.LOAD, run, number) for run in reversed(runs) if moves(run)]
        elif action.kind.is_compute and action.kind is not Kind.R:
            backward = [run for run in reversed(runs) if shape.units[run].has_backward]
            result += [Action(action.kind, run, number) for run in backward]
    return result


def add_transfers(actions: Sequence[Action], stages: Stages, rank: int) -> list[Action]:
    """RECV before the first, SEND after the last unit of a stage's pass, where its neighbour is on another rank."""
    first: dict[tuple[bool, int, int], int] = {}
    last: dict[tuple[bool, int, int], int] = {}
    for position, action in enumerate(actions):
        if action.kind is _F or action.kind in _BACKWARD:
            assert action.index is not None
            assert action.micro_batch is not None
            key = (action.kind is _F, stages.stage_of(action.index), action.micro_batch)
            first.setdefault(key, position)
            last[key] = position
    before: dict[int, Action] = {}
    after: dict[int, Action] = {}
    end = len(stages.starts) - 1
    for (forward, stage, number), position in first.items():
        has_source = stage > 0 if forward else stage < end and stages.with_gradient[stage + 1]
        source = stage - 1 if forward else stage + 1
        if has_source and stages.placement[source] != rank:
            before[position] = Action(Kind.RECV_F if forward else Kind.RECV_B, stage, number)
    for (forward, stage, number), position in last.items():
        has_target = stage < end if forward else stages.with_gradient[stage]
        target = stage + 1 if forward else stage - 1
        if has_target and stages.placement[target] != rank:
            after[position] = Action(Kind.SEND_F if forward else Kind.SEND_B, stage, number)
    result: list[Action] = []
    for position, action in enumerate(actions):
        result += [before[position]] if position in before else []
        result.append(action)
        result += [after[position]] if position in after else []
    return result


def add_tied(actions: Sequence[Action], tied: Sequence[int]) -> list[Action]:
    """Sum the gradients of chunks that several stages share: after the last backward, before the norm.

    Not earlier, even where other chunks are updated inside the backward pass: a rank that waited there for the others'
    gradients would keep them waiting for what it sends. The updates of these chunks, where they are not behind the norm
    anyway, follow the sums.
    """
    place = next(position for position, action in enumerate(actions) if action.kind is Kind.NORM)
    early = [action for action in actions[:place] if action.kind is Kind.STEP and action.index in tied]
    before = [action for action in actions[:place] if action not in early]
    return [*before, *(Action(Kind.REDUCE, chunk, None, TIED) for chunk in tied), *early, *actions[place:]]
