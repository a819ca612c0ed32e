"""Whether a pipeline schedule can run: every rule that can be checked before a process exists.

Owns `validate` and `Limits`. The rules, in the order in which they are checked:

    1 placement      every action's stage belongs to its rank, every stage to a rank
    2 completeness   every stage and micro-batch has one F, and either one B or one I and one W; at most one R; a SAVE
                     has one LOAD, between F and the backward
    3 order          F, then R, then B, or I and W; micro-batches in order for each stage and kind, so that labels fit
                     and gradients are summed in the same order under every schedule
    4 deadlock       the graph of list order, data and (where sends wait) send buffers has no cycle
    5 channels       optionally: what one rank sends another in one direction is used in the order in which it is sent
    6 memory         the activations held on a rank stay within its limit

Every error names the action and shows the orders around it.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NoReturn

from ..parallel.actions import Action, Kind
from .pipeline_data import Schedule, ScheduleError, StageCosts
from .pipeline_timing import simulate

__all__ = ["Limits", "validate"]

F, B, I, W, R, SAVE, LOAD = Kind.F, Kind.B, Kind.I, Kind.W, Kind.R, Kind.SAVE, Kind.LOAD  # noqa: E741
_ALLOWED = frozenset({F, B, I, W, R, SAVE, LOAD})
_SHOWN = 6  # actions on either side of the one that an error names
_ROUNDING = 1e-6
#: (rank, position in its order)
_Node = tuple[int, int]
#: (sending rank, receiving rank, direction)
_Channel = tuple[int, int, Kind]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a schedule has to live with.

    Attributes:
        activations: most activations of any rank, in the unit of `costs`; None for no limit.
        costs: for times and activations of stages; equal ones when None.
        send_buffers: sends that may wait for their receiver, per pair of ranks and direction; a further one blocks its
            rank. 0 is a blocking rendezvous, None is no limit (the executor's lanes).
        one_channel: one first-in-first-out channel per pair of ranks and direction, without tags and without buffering
            on the receiving side; otherwise every stage boundary has its own.

    Raises:
        ValueError: a number of buffers below 0.
    """

    activations: float | None = None
    costs: StageCosts | None = None
    send_buffers: int | None = None
    one_channel: bool = False

    def __post_init__(self) -> None:
        if self.send_buffers is not None and self.send_buffers < 0:
            raise ValueError(f"send buffers count from 0, got {self.send_buffers}")


def validate(schedule: Schedule, limits: Limits | None = None) -> None:
    """Checks every rule.

    Raises:
        ScheduleError: the first rule that is broken; names the action, says what was expected, shows the orders.
    """
    limits = limits or Limits()
    _check_placement(schedule)
    where = _check_completeness(schedule)
    _check_order(schedule, where)
    _check_deadlock(schedule, where, limits.send_buffers)
    if limits.one_channel:
        _check_channels(schedule, where)
    if limits.activations is not None:
        _check_memory(schedule, limits.activations, limits.costs)


def _check_placement(schedule: Schedule) -> None:
    p = schedule.num_ranks
    for stage, rank in enumerate(schedule.placement):
        if not 0 <= rank < p:
            raise ScheduleError(f"stage {stage} is placed on rank {rank}, but there are {p} ranks")
    for rank, order in enumerate(schedule.orders):
        for position, action in enumerate(order):
            stage, j = action.index, action.micro_batch
            if action.kind not in _ALLOWED:
                _fail(schedule, rank, position, f"{action} does not belong in a pipeline schedule")
            if stage is None or not 0 <= stage < schedule.num_stages:
                _fail(
                    schedule,
                    rank,
                    position,
                    f"{action} names a stage that does not exist: there are {schedule.num_stages}",
                )
            if j is None or not 0 <= j < schedule.num_micro_batches:
                _fail(
                    schedule,
                    rank,
                    position,
                    f"{action} names a micro-batch beyond the {schedule.num_micro_batches} there are",
                )
            if schedule.placement[stage] != rank:
                _fail(
                    schedule,
                    rank,
                    position,
                    f"{action} is on rank {rank}, but its stage is placed on rank {schedule.placement[stage]}",
                )


def _check_completeness(schedule: Schedule) -> dict[Action, _Node]:
    where: dict[Action, _Node] = {}
    for rank, order in enumerate(schedule.orders):
        for position, action in enumerate(order):
            if action in where:
                _fail(schedule, rank, position, f"{action} is there twice")
            where[action] = (rank, position)
    for stage, rank in enumerate(schedule.placement):
        for j in range(schedule.num_micro_batches):
            has = {kind for kind in _ALLOWED if Action(kind, stage, j) in where}
            around = where.get(Action(F, stage, j), (rank, len(schedule.orders[rank]) - 1))[1]
            if F not in has:
                _fail(schedule, rank, around, f"{Action(F, stage, j)} is missing")
            backward = has & {B, I, W}
            if backward not in ({B}, {I, W}):
                names = " and ".join(sorted(str(Action(kind, stage, j)) for kind in backward)) or "nothing"
                _fail(
                    schedule, rank, around,
                    f"stage {stage} needs {Action(B, stage, j)}, or {Action(I, stage, j)} and {Action(W, stage, j)}; "
                    f"it has {names}",
                )  # fmt: skip
            if len(has & {SAVE, LOAD}) == 1:
                _fail(schedule, rank, around, f"{Action(SAVE, stage, j)} and {Action(LOAD, stage, j)} go together")
    return where


def _check_order(schedule: Schedule, where: dict[Action, _Node]) -> None:
    last: dict[tuple[Kind, int], int] = {}
    for rank, order in enumerate(schedule.orders):
        for position, action in enumerate(order):
            assert action.index is not None
            assert action.micro_batch is not None
            stage, j = action.index, action.micro_batch
            for before in _BEFORE[action.kind]:
                other = where.get(Action(before, stage, j))
                if other is not None and other[1] > position:
                    _fail(schedule, rank, position, f"{action} comes before {Action(before, stage, j)}")
            if action.kind in (SAVE, LOAD):
                continue
            for kind in _IN_ORDER[action.kind]:
                if (before := last.get((kind, stage), -1)) > j:
                    what = f"{action} comes after micro-batch {before} of its stage: keep them in order"
                    _fail(schedule, rank, position, what)
                last[kind, stage] = j


#: In whose order an action takes part: B is an I and a W.
_IN_ORDER: dict[Kind, tuple[Kind, ...]] = {F: (F,), R: (R,), I: (I,), W: (W,), B: (I, W)}
_BEFORE: dict[Kind, tuple[Kind, ...]] = {
    F: (), R: (F,), SAVE: (F,), LOAD: (SAVE,), I: (F, R, LOAD), B: (F, R, LOAD), W: (I,),
}  # fmt: skip


def _transfers(schedule: Schedule) -> Iterator[tuple[Action, Action, Kind]]:
    """(producer, consumer, direction) of everything that goes from one stage to the next; B stands for I or B."""
    for stage in range(schedule.num_stages - 1):
        for j in range(schedule.num_micro_batches):
            yield Action(F, stage, j), Action(F, stage + 1, j), F
            yield Action(B, stage + 1, j), Action(B, stage, j), B


def _node(where: dict[Action, _Node], action: Action) -> _Node:
    if action.kind is B and action not in where:
        action = Action(I, action.index, action.micro_batch)
    return where[action]


def _messages(schedule: Schedule, where: dict[Action, _Node]) -> dict[_Channel, list[tuple[_Node, _Node]]]:
    """What goes over each channel: (producer, consumer), in the order of sending."""
    channels: dict[_Channel, list[tuple[_Node, _Node]]] = defaultdict(list)
    for producer, consumer, direction in _transfers(schedule):
        sender, receiver = _node(where, producer), _node(where, consumer)
        if sender[0] != receiver[0]:
            channels[sender[0], receiver[0], direction].append((sender, receiver))
    for messages in channels.values():
        messages.sort()
    return channels


def _check_deadlock(schedule: Schedule, where: dict[Action, _Node], send_buffers: int | None) -> None:
    needs: dict[_Node, list[_Node]] = defaultdict(list)
    for rank, order in enumerate(schedule.orders):
        for position in range(1, len(order)):
            needs[rank, position].append((rank, position - 1))
    for producer, consumer, _ in _transfers(schedule):
        needs[_node(where, consumer)].append(_node(where, producer))
    if send_buffers is not None:
        for messages in _messages(schedule, where).values():
            for number, (sender, _) in enumerate(messages):
                # An action is done when its send is; that waits until the receiver has done all that stands before
                # the use of the message sent `send_buffers` before this one.
                rank, position = messages[number - send_buffers][1] if number >= send_buffers else (0, 0)
                if position:
                    needs[sender].append((rank, position - 1))
    users: dict[_Node, list[_Node]] = defaultdict(list)
    missing = {node: len(before) for node, before in needs.items()}
    for node, before in needs.items():
        for other in before:
            users[other].append(node)
    ready = [node for node in where.values() if not missing.get(node)]
    num_done = 0
    while ready:
        node = ready.pop()
        num_done += 1
        for user in users[node]:
            missing[user] -= 1
            if not missing[user]:
                ready.append(user)
    if num_done == len(where):
        return
    node = next(node for node in sorted(where.values()) if missing.get(node))
    path: list[_Node] = []
    while node not in path:
        path.append(node)
        node = next(other for other in needs[node] if missing.get(other))
    cycle = [*path[path.index(node) :], node]
    names = " needs ".join(f"{schedule.orders[rank][position]} (rank {rank})" for rank, position in cycle)
    hint = "" if send_buffers is None else f" with {send_buffers} send buffers"
    _fail(schedule, *cycle[0], f"deadlock{hint}: {names}")


def _check_channels(schedule: Schedule, where: dict[Action, _Node]) -> None:
    for (source, target, direction), messages in _messages(schedule, where).items():
        used = [receiver for _, receiver in messages]
        for before, after in pairwise(used):
            if before > after:
                early, late = schedule.orders[target][after[1]], schedule.orders[target][before[1]]
                way = "forward" if direction is F else "backward"
                _fail(
                    schedule, *after,
                    f"{early} uses what rank {source} sends {way} to rank {target} before {late} does, "
                    f"but it is sent after it: one channel would deliver them in the other order",
                )  # fmt: skip


def _check_memory(schedule: Schedule, limit: float, costs: StageCosts | None) -> None:
    costs = (costs or StageCosts.equal(schedule.num_ranks)).split(schedule.num_stages)
    times = simulate(schedule, costs).times_s
    for rank, (order, spans) in enumerate(zip(schedule.orders, times, strict=True)):
        events: list[tuple[float, int, int, float]] = []
        for position, (action, (start, end)) in enumerate(zip(order, spans, strict=True)):
            assert action.index is not None
            held = costs.activations[action.index]
            if action.kind in (F, LOAD):
                events.append((round(start, 9), 1, position, held))
            elif action.kind in (W, B, SAVE):
                events.append((round(end, 9), 0, position, -held))
        level = 0.0
        for _, _, position, change in sorted(events):
            level += change
            if level > limit * (1 + _ROUNDING):
                _fail(
                    schedule,
                    rank,
                    position,
                    f"{order[position]} would raise the activations to {level:g}, above the limit of {limit:g}",
                )


def _fail(schedule: Schedule, rank: int, position: int, what: str) -> NoReturn:
    """Raises with the orders around the position; the action itself stands in brackets."""
    lines = []
    for other, order in enumerate(schedule.orders):
        first = max(0, position - _SHOWN)
        cells = [
            f"[{action}]" if (other, number) == (rank, position) else str(action)
            for number, action in enumerate(order[first : position + _SHOWN + 1], start=first)
        ]
        dots = ("... " if first else ""), (" ..." if len(order) > position + _SHOWN + 1 else "")
        lines.append(f"  rank {other}: {dots[0]}{' '.join(cells)}{dots[1]}")
    raise ScheduleError(f"{schedule.name}: {what}\n" + "\n".join(lines))
