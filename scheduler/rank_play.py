"""The programs of all ranks played together, before they run: what a step of a pipeline takes.

Owns what the ranks make each other wait for: a receive for its send, the gradient norm for the slowest; and what they
take from each other, where they compute with the same cores: two hardware threads of one core, caches, memory.
How much that is was measured for every kind of unit, by running it while all ranks compute, and while no other one does
(`RunSeconds`). Does not own the clock (`simulate.py`) nor the measuring.

A bubble of one rank is thus no loss where the others become faster by it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..memory.timeline import Timeline
from ..parallel.actions import Action, Kind
from .pipeline_data import Schedule
from .program import Instruction, Lane, Program
from .rank_check import SENDER, sender_of
from .simulate import Work, play

__all__ = ["KINDS", "RunSeconds", "Shared", "play_ranks", "stage_programs"]

KINDS = (Kind.F, Kind.I, Kind.W, Kind.B)
_SENDS = (Kind.SEND_F, Kind.SEND_B)


@dataclass(frozen=True, slots=True)
class RunSeconds:
    """One piece of work.

    Attributes:
        together_s: while every other rank of the machine computes.
        alone_s: while none does.
    """

    together_s: float
    alone_s: float

    @property
    def slowdown(self) -> float:
        """By the others, at least 1."""
        return max(1.0, self.together_s / self.alone_s) if self.alone_s > 0 else 1.0


@dataclass(frozen=True, slots=True)
class Shared:
    """What the ranks compute with.

    Attributes:
        hosts: of each rank: those with the same number slow each other down.
    """

    hosts: tuple[int, ...]

    def work(self, rank: int, seconds: RunSeconds) -> Work:
        """Where all ranks of a host are busy, it takes as long as was measured; in between, in proportion. Nothing is
        slower alone: where that was measured, the machine was."""
        host = self.hosts[rank]
        count = self.hosts.count(host)
        alone_s = min(seconds.alone_s or seconds.together_s, seconds.together_s)
        return Work(alone_s, {f"cores {host}": seconds.slowdown / count} if count > 1 else {})


def play_ranks(programs: Sequence[Program], cost: Callable[[int, Instruction], Work]) -> list[Timeline]:
    """The timeline of every rank.

    Args:
        cost: f(rank, instruction).

    Raises:
        AssertionError: programs that cannot run together (`rank_check.py`).
    """
    instructions: list[Instruction] = []
    by_lane: dict[tuple[int, Lane], list[int]] = {}
    works: list[Work] = []
    sent: dict[Action, int] = {}
    meeting: list[int] = []
    for rank, program in enumerate(programs):
        first = len(instructions)
        for instruction in program.instructions:
            position, action = len(instructions), instruction.action
            if action.kind in _SENDS:
                sent[action] = position
            elif action.kind is Kind.NORM:
                meeting.append(position)
            instructions.append(replace(instruction, after=tuple(first + each for each in instruction.after)))
            by_lane.setdefault((rank, instruction.lane), []).append(position)
            works.append(cost(rank, instruction))
    for position, instruction in enumerate(instructions):
        if instruction.action.kind in SENDER:
            after = (*instruction.after, sent[sender_of(instruction.action)])
            instructions[position] = replace(instruction, after=after)
    needed = tuple({before for position in meeting for before in instructions[position].after})
    for position in meeting:
        instructions[position] = replace(instructions[position], after=needed)
    played = play(instructions, by_lane, works)
    return [_of_rank(played.timeline, rank) for rank in range(len(programs))]


def _of_rank(timeline: Timeline, rank: int) -> Timeline:
    names = {str((rank, lane)): str(lane) for lane in Lane}
    spans = [replace(span, lane=names[span.lane]) for span in timeline.spans if span.lane in names]
    return Timeline(tuple(spans), {}, rank)


def stage_programs(schedule: Schedule) -> list[Program]:
    """A schedule as programs whose units are whole stages: computation and transfers alone."""
    last = schedule.num_stages - 1
    return [_stage_program(schedule, rank, last) for rank in range(schedule.num_ranks)]


def _stage_program(schedule: Schedule, rank: int, last: int) -> Program:
    placement = schedule.placement
    found: list[Instruction] = []

    def add(action: Action, lane: Lane, after: tuple[int, ...]) -> int:
        found.append(Instruction(action, lane, after))
        return len(found) - 1

    def is_elsewhere(stage: int) -> bool:
        return 0 <= stage <= last and placement[stage] != rank

    for action in schedule.orders[rank]:
        stage, number = action.index, action.micro_batch
        assert stage is not None
        if action.kind not in KINDS:
            continue
        is_forward, is_weight = action.kind is Kind.F, action.kind is Kind.W
        before, behind = (stage - 1, stage + 1) if is_forward else (stage + 1, stage - 1)
        receive, send = (Kind.RECV_F, Kind.SEND_F) if is_forward else (Kind.RECV_B, Kind.SEND_B)
        waits: tuple[int, ...] = ()
        if not is_weight and is_elsewhere(before):
            waits = (add(Action(receive, stage, number), Lane.NET, ()),)
        done = add(action, Lane.COMPUTE, waits)
        if not is_weight and is_elsewhere(behind):
            add(Action(send, stage, number), Lane.COMPUTE, (done,))
    return Program(tuple(found))
