"""Whether the programs of several ranks can run together.

Owns the dry run of all ranks at once. Every lane does its instructions in order; a collective is done when all ranks of
its group have come to it, a receive when its send is done; sends do not wait. What cannot go on is a deadlock, and the
refusal names what every rank waits for.

`SEND_F s1.3` is stage 1's output for micro-batch 3, `RECV_F s2.3` the input of stage 2, which comes from stage 1;
`SEND_B s2.3` the gradient of stage 2's input, `RECV_B s1.3` the gradient of stage 1's output, which comes from stage 2.
"""

from collections.abc import Sequence
from itertools import zip_longest

from ..memory.errors import InvalidProgram
from ..parallel.actions import Action, Kind
from .program import Program

__all__ = ["SENDER", "check_ranks", "sender_of"]

_COLLECTIVES = frozenset({Kind.GATHER, Kind.REDUCE, Kind.NORM})
SENDER = {Kind.RECV_F: (Kind.SEND_F, -1), Kind.RECV_B: (Kind.SEND_B, 1)}
_SENDS = frozenset({Kind.SEND_F, Kind.SEND_B})


def check_ranks(programs: Sequence[Program], groups: Sequence[Sequence[int]] | None = None) -> None:
    """Run them dry.

    Args:
        programs: one for each rank.
        groups: ranks whose collectives go together; None: all of them are one group.

    Raises:
        InvalidProgram: collectives that differ, sends and receives without each other, or a deadlock.
    """
    groups = groups or [range(len(programs))]
    for group in groups:
        _check_collectives(programs, group)
    _check_channels(programs)
    _run_dry(programs, groups)


def _check_collectives(programs: Sequence[Program], group: Sequence[int]) -> None:
    orders = {rank: [a for a in programs[rank].actions() if a.kind in _COLLECTIVES] for rank in group}
    first, *others = group
    for rank in others:
        for number, (mine, theirs) in enumerate(zip_longest(orders[first], orders[rank])):
            if mine != theirs:
                raise InvalidProgram(
                    f"collective {number} is {mine} on rank {first} and {theirs} on rank {rank}: they would wait for "
                    "each other for ever"
                )


def sender_of(receive: Action) -> Action:
    """What a receive waits for."""
    kind, stage = SENDER[receive.kind]
    assert receive.index is not None
    return Action(kind, receive.index + stage, receive.micro_batch)


def _check_channels(programs: Sequence[Program]) -> None:
    sent: list[Action] = []
    awaited: list[Action] = []
    for program in programs:
        sent += [action for action in program.actions() if action.kind in _SENDS]
        for action in program.actions():
            if action.kind in SENDER:
                first_stage = action.kind is Kind.RECV_F and action.index == 0
                if first_stage:
                    raise InvalidProgram(f"{action}: there is no stage before stage 0")
                awaited.append(sender_of(action))
    for action in {*sent, *awaited}:
        if sent.count(action) != awaited.count(action) or sent.count(action) > 1:
            raise InvalidProgram(f"{action} is sent {sent.count(action)} times and received {awaited.count(action)}")


def _run_dry(programs: Sequence[Program], groups: Sequence[Sequence[int]]) -> None:
    group_of = {rank: tuple(group) for group in groups for rank in group}
    queues = {(rank, lane): list(order) for rank, p in enumerate(programs) for lane, order in p.by_lane.items()}
    done: list[set[int]] = [set() for _ in programs]
    sent: set[Action] = set()
    arrived: dict[tuple[tuple[int, ...], int], set[int]] = {}  # (group, how many before) -> ranks that are there
    counted = [0] * len(programs)  # collectives that a rank has done

    def ready(rank: int, position: int) -> bool:
        instruction = programs[rank].instructions[position]
        if not set(instruction.after) <= done[rank]:
            return False
        if instruction.action.kind in SENDER:
            return sender_of(instruction.action) in sent
        if instruction.action.kind in _COLLECTIVES and rank in group_of:
            here = arrived.setdefault((group_of[rank], counted[rank]), set())
            here.add(rank)
            return len(here) == len(group_of[rank])
        return True

    progress = True
    while progress:
        progress = False
        for (rank, _), queue in queues.items():
            while queue and ready(rank, queue[0]):
                position = queue.pop(0)
                action = programs[rank].instructions[position].action
                done[rank].add(position)
                if action.kind in _SENDS:
                    sent.add(action)
                counted[rank] += action.kind in _COLLECTIVES
                progress = True
    waiting = [
        f"rank {rank} at {programs[rank].instructions[queue[0]].action}" for (rank, _), queue in queues.items() if queue
    ]
    if waiting:
        raise InvalidProgram(f"the ranks wait for each other: {', '.join(waiting)}")
