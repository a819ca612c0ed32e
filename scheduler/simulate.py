"""A program played on a clock, before it runs: when everything begins and ends, and what the lanes wait for.

Owns the discrete events. Does not own what an action costs (`cost.py`). It plays the very program that the executor
would run, by the same rules: each lane does its instructions in order, an instruction begins when all that it waits for
is done, and a step begins when everything of the step before is done but for its carried writes, which are part of the
program.

An action has seconds that it takes alone, and shares of resources that it uses meanwhile (a disk, memory bandwidth,
cores). Where the shares of what runs add up to more than a resource has, all that use it slow down in proportion, but
for what gives way to others: that was measured beside them.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..memory.timeline import Span, Timeline
from .program import Instruction, Program

__all__ = ["Change", "Simulated", "Work", "play", "simulate", "simulated_seconds"]

_EPSILON_S = 1e-12

_Manners = tuple[tuple[tuple[str, float], ...], tuple[tuple[str, float], ...]]  # what a work shares, where it gives way


@dataclass(frozen=True, slots=True)
class Work:
    """What an instruction takes.

    Attributes:
        seconds: alone.
        shares: resource -> the part of it that is used meanwhile, 0 to 1.
        gives_way: resource -> how many times as long this takes where others use it that do not give way; their load
            then does not matter to this.

    Raises:
        ValueError: negative numbers; something that is faster where it gives way.
    """

    seconds: float
    shares: Mapping[str, float] = field(default_factory=dict)
    gives_way: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.seconds < 0 or any(share < 0 for share in self.shares.values()):
            raise ValueError(f"{self}: seconds and shares cannot be negative")
        if any(factor < 1 for factor in self.gives_way.values()):
            raise ValueError(f"{self}: what gives way takes longer")


@dataclass(frozen=True, slots=True)
class Change:
    """Bytes on a tier that come (or go, where negative) when an instruction begins and when it ends."""

    tier: str
    at_begin_bytes: int = 0
    at_end_bytes: int = 0


@dataclass(frozen=True)
class Simulated:
    """One step.

    Attributes:
        timeline: its spans; bytes that `changes` tell.
        stalls_s: lane -> (action waited for -> seconds), while the lane had something left to do.
        held_bytes: tier -> (second, bytes) at every change.
    """

    timeline: Timeline
    stalls_s: dict[str, dict[str, float]]
    held_bytes: dict[str, tuple[tuple[float, int], ...]]

    @property
    def seconds(self) -> float:
        return self.timeline.seconds


def simulate(
    program: Program,
    cost: Callable[[Instruction], Work],
    capacity: Callable[[str, int], float] = lambda resource, num_users: 1.0,
    changes: Mapping[int, Sequence[Change]] | None = None,
    begin_bytes: Mapping[str, int] | None = None,
    rank: int = 0,
) -> Simulated:
    """Play one step.

    Args:
        cost: what each instruction takes.
        capacity: f(resource, number of its users) -> how much of it there is, in units of one user alone.
        changes: position -> bytes that come and go with it.
        begin_bytes: tier -> bytes that are there all the time.
    """
    works = [cost(instruction) for instruction in program.instructions]
    return _Play(program.instructions, program.by_lane, works, capacity, changes or {}, begin_bytes or {}).run(rank)


def simulated_seconds(
    program: Program,
    cost: Callable[[Instruction], Work],
    capacity: Callable[[str, int], float] = lambda resource, num_users: 1.0,
) -> float:
    """`simulate(...).seconds`, without the record of how they came about: for those who look at many programs."""
    works = [cost(instruction) for instruction in program.instructions]
    return _Play(program.instructions, program.by_lane, works, capacity, {}, {}).seconds()


def play(
    instructions: Sequence[Instruction],
    by_lane: Mapping[Any, Sequence[int]],
    works: Sequence[Work],
    capacity: Callable[[str, int], float] = lambda resource, num_users: 1.0,
) -> Simulated:
    """Play instructions on any lanes, those of several ranks for instance, that may wait for each other in any order.

    Args:
        by_lane: lane -> positions, in order; its text is what spans are named by.
        works: what each instruction takes.

    Raises:
        AssertionError: they wait for each other for ever.
    """
    return _Play(instructions, by_lane, works, capacity, {}, {}).run(0)


class _Play:
    def __init__(
        self,
        instructions: Sequence[Instruction],
        by_lane: Mapping[Any, Sequence[int]],
        works: Sequence[Work],
        capacity: Callable[[str, int], float],
        changes: Mapping[int, Sequence[Change]],
        begin_bytes: Mapping[str, int],
    ) -> None:
        self.instructions, self.by_lane = instructions, by_lane
        self.capacity, self.changes = capacity, changes
        self.now = 0.0
        self.next: dict[Hashable, int] = dict.fromkeys(by_lane, 0)  # place on the lane
        self.left: dict[Hashable, float] = {}  # lane -> seconds of its running instruction that are left, at full speed
        self.idle_since: dict[Hashable, float] = dict.fromkeys(by_lane, 0.0)
        self.began: dict[int, float] = {}  # position -> when
        self.done: dict[int, float] = {}  # position -> when
        self.waited: list[tuple[Hashable, int, float]] = []  # lane, position, for how long
        self.held: dict[str, int] = dict(begin_bytes)
        self.history: dict[str, list[tuple[float, int]]] = {tier: [(0.0, size)] for tier, size in begin_bytes.items()}
        self.work_s = [work.seconds for work in works]
        self.num_awaited = [len(instruction.after) for instruction in instructions]
        self.followers: list[list[int]] = [[] for _ in instructions]
        for position, instruction in enumerate(instructions):
            for before in instruction.after:
                self.followers[before].append(position)
        # What runs together goes at the same rates every time.
        numbers: dict[_Manners, int] = {}
        manners = [(tuple(work.shares.items()), tuple(work.gives_way.items())) for work in works]
        self.sharing = [numbers.setdefault(each, len(numbers)) for each in manners]
        self.manners = list(numbers)
        self.known_rates: dict[tuple[int, ...], list[float]] = {}

    def seconds(self) -> float:
        """When the last instruction ends."""
        self._play()
        return max(self.done.values(), default=0.0)

    def run(self, rank: int) -> Simulated:
        self._play()
        lanes = {position: str(lane) for lane, order in self.by_lane.items() for position in order}
        spans = [
            Span(lanes[position], str(instruction.action), self.began[position], end_s, instruction.num_bytes)
            for position, end_s in self.done.items()
            for instruction in [self.instructions[position]]
        ]
        spans.sort(key=lambda span: (span.start_s, span.end_s))
        stalls: dict[str, dict[str, float]] = {str(lane): {} for lane in self.by_lane}
        for lane, position, waited_s in self.waited:
            last = max(self.instructions[position].after, key=lambda before: (self.done[before], before))
            name = str(self.instructions[last].action)
            stalls[str(lane)][name] = stalls[str(lane)].get(name, 0.0) + waited_s
        peaks = {tier: max(size for _, size in history) for tier, history in self.history.items()}
        held = {tier: tuple(history) for tier, history in self.history.items()}
        return Simulated(Timeline(tuple(spans), peaks, rank), stalls, held)

    def _play(self) -> None:
        self._begin_what_can()
        while self.left:
            rates = self._rates()
            passed_s = min(left / rate for left, rate in zip(self.left.values(), rates, strict=True))
            self._pass_time(rates, passed_s)
            self._begin_what_can()
        assert len(self.done) == len(self.instructions), "dependencies point backwards, so all of it ends"

    def _begin_what_can(self) -> None:
        """Begin instructions until none can; those that take no time end at once."""
        progress = True
        while progress:
            progress = False
            for lane, order in self.by_lane.items():
                place = self.next[lane]
                if lane not in self.left and place < len(order) and not self.num_awaited[order[place]]:
                    self._begin(lane, order[place])
                    progress = True

    def _begin(self, lane: Hashable, position: int) -> None:
        waited_s = self.now - self.idle_since[lane]
        if waited_s > _EPSILON_S:
            self.waited.append((lane, position, waited_s))
        if self.changes:
            self._change(position, at_begin=True)
        self.began[position] = self.now
        self.left[lane] = self.work_s[position]
        if self.left[lane] <= _EPSILON_S:
            self._end(lane)

    def _end(self, lane: Hashable) -> None:
        position = self.by_lane[lane][self.next[lane]]
        del self.left[lane]
        self.done[position] = self.idle_since[lane] = self.now
        self.next[lane] += 1
        for follower in self.followers[position]:
            self.num_awaited[follower] -= 1
        if self.changes:
            self._change(position, at_begin=False)

    def _rates(self) -> list[float]:
        """How fast each running instruction goes, 1 as alone."""
        running = tuple(self.sharing[self.by_lane[lane][self.next[lane]]] for lane in self.left)
        if running not in self.known_rates:
            self.known_rates[running] = self._rates_of([self.manners[number] for number in running])
        return self.known_rates[running]

    def _rates_of(self, running: Sequence[_Manners]) -> list[float]:
        loads: dict[str, tuple[float, int]] = {}
        insisting: set[str] = set()  # resources with a user that does not give way
        for shares, gives_way in running:
            insisting.update(name for name, _ in shares if name not in dict(gives_way))
            for name, share in shares:
                load, users = loads.get(name, (0.0, 0))
                loads[name] = load + share, users + 1
        slow = {name: max(1.0, load / self.capacity(name, users)) for name, (load, users) in loads.items()}
        rates: list[float] = []
        for shares, gives_way in running:
            yielding = dict(gives_way)
            slows = [
                yielding.get(name, slow[name]) if name in insisting or name not in yielding else 1.0
                for name, _ in shares
            ]
            rates.append(1 / max(slows, default=1.0))
        return rates

    def _pass_time(self, rates: Sequence[float], passed_s: float) -> None:
        self.now += passed_s
        for lane, rate in zip(list(self.left), rates, strict=True):
            self.left[lane] -= passed_s * rate
            if self.left[lane] <= _EPSILON_S:
                self._end(lane)

    def _change(self, position: int, at_begin: bool) -> None:
        for change in self.changes.get(position, ()):
            size = change.at_begin_bytes if at_begin else change.at_end_bytes
            if size:
                self.held[change.tier] = self.held.get(change.tier, 0) + size
                self.history.setdefault(change.tier, [(0.0, 0)]).append((self.now, self.held[change.tier]))
