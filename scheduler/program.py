"""A program: the actions of one rank for one step, with lanes and dependencies.

Owns the record and its text form, and the step's shape that programs are compiled from. Does not choose anything
(`scheduler/plan.py`) and does not run anything (`runtime/executor.py`).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property

from ..parallel.actions import Action, Kind

__all__ = ["Buffer", "ChunkUse", "Instruction", "Lane", "Program", "StepShape", "UnitUse"]


class Lane(StrEnum):
    """Something that does one thing at a time."""

    COMPUTE = "compute"
    NET = "net"
    H2D = "h2d"
    D2H = "d2h"
    READ = "read"
    WRITE = "write"

    __hash__ = str.__hash__  # an Enum's own is written in Python, and instructions are looked up by it all the time


@dataclass(frozen=True, slots=True)
class UnitUse:
    """One run of a unit in a step, as the trace found it.

    Attributes:
        name: of the unit's module.
        chunks: indices of the chunks whose parameters it uses.
        has_backward: whether gradients flow back into it.
        unit: its place among the units of the model, by which a plan decides about it.
        saved_bytes: what its saved activations need as one buffer, where they may be moved away.
    """

    name: str
    chunks: tuple[int, ...]
    has_backward: bool = True
    unit: int = 0
    saved_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ChunkUse:
    """What a program needs to know of a chunk.

    Attributes:
        num_bytes: of its gathered parameters.
        trainable: whether it gets gradients and updates.
        param_bytes: of this rank's part of the parameters, as it lies on disk.
        optim_bytes: of this rank's optimizer slots and master, as they lie on disk; 0 where it has none.
    """

    num_bytes: int
    trainable: bool = True
    param_bytes: int = 0
    optim_bytes: int = 0


@dataclass(frozen=True)
class StepShape:
    """The chain of unit runs of one micro-batch, and the chunks they use.

    Attributes:
        units: in the order in which they run.
        chunks: by index.
        held: chunks used outside of any unit: needed from a micro-batch's first action to its last.
        starts: first unit run of each pipeline stage; empty: there are none.
        border_bytes: of what the stage gets from the one before, for each stage.
    """

    units: tuple[UnitUse, ...]
    chunks: tuple[ChunkUse, ...]
    held: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()
    border_bytes: tuple[int, ...] = ()

    def stage_of(self, run: int) -> int:
        """The pipeline stage of a unit run; 0 where there are none."""
        return max((stage for stage, start in enumerate(self.starts) if start <= run), default=0)

    def last_run(self, stage: int | None) -> int:
        """The last unit run of a pipeline stage."""
        assert stage is not None
        return [*self.starts[1:], len(self.units)][stage] - 1

    def crossing_bytes(self, transfer: Action) -> int:
        """What a SEND or RECV moves."""
        assert transfer.index is not None
        into = transfer.index + (transfer.kind in (Kind.SEND_F, Kind.RECV_B))
        return self.border_bytes[into] if into < len(self.border_bytes) else 0

    def uses(self, unit: int) -> tuple[int, ...]:
        """Chunks that unit run `unit` needs, those held for the whole micro-batch not counted."""
        return self._uses[unit]

    @cached_property
    def _uses(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(chunk for chunk in unit.chunks if chunk not in self.held) for unit in self.units)

    def last_backward_of(self, chunk: int) -> int | None:
        """The unit run in whose backward the gradients of `chunk` become complete; None: at the end of the backward."""
        return self._last_backwards.get(chunk)

    @cached_property
    def _last_backwards(self) -> dict[int, int]:
        found: dict[int, int] = {}
        for run, uses in enumerate(self._uses):
            for chunk in uses if self.units[run].has_backward else ():
                found.setdefault(chunk, run)
        return found


@dataclass(frozen=True, slots=True)
class Instruction:
    """An action in its place.

    Attributes:
        lane: where it runs, in the order of the program.
        after: positions in the program of the instructions that must be done before it starts; all smaller.
        num_bytes: that it moves, where it moves any. A READ of 0 bytes finds the slot in its buffer, kept from the
            step before.
    """

    action: Action
    lane: Lane
    after: tuple[int, ...] = ()
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Buffer:
    """A place in a tier's arena, fixed before the first step. Several buffers may share bytes at different times.

    Attributes:
        name: `c7:optim`, `a7.0`: as in the actions that fill it.
        tier: `host` or `device`.
        start_bytes, num_bytes: where it lies in the arena.
    """

    name: str
    tier: str
    start_bytes: int
    num_bytes: int


@dataclass(frozen=True)
class Program:
    """The instructions of one rank for one step. Dependencies point backwards only.

    Attributes:
        instructions: in program order.
        buffers: what the actions move bytes into and out of.
        num_carried: so many instructions at the beginning end the step before: its last writes run into this one.
    """

    instructions: tuple[Instruction, ...]
    buffers: tuple[Buffer, ...] = ()
    num_carried: int = 0

    def __post_init__(self) -> None:
        for position, instruction in enumerate(self.instructions):
            after = instruction.after
            assert not after or (min(after) >= 0 and max(after) < position), (
                f"{instruction.action} at {position} waits for {instruction.after}: dependencies must point backwards"
            )

    @cached_property
    def by_lane(self) -> dict[Lane, tuple[int, ...]]:
        """Lane -> positions of its instructions, in order."""
        lanes: dict[Lane, list[int]] = {}
        for position, instruction in enumerate(self.instructions):
            lanes.setdefault(instruction.lane, []).append(position)
        return {lane: tuple(positions) for lane, positions in lanes.items()}

    @cached_property
    def compute_positions(self) -> dict[Action, int]:
        """Position of each action that runs a unit's code."""
        return {each.action: at for at, each in enumerate(self.instructions) if each.action.kind.is_compute}

    def actions(self, kind: Kind | None = None) -> list[Action]:
        """The actions in program order, of one kind or all."""
        return [i.action for i in self.instructions if kind is None or i.action.kind is kind]

    def arena_bytes(self, tier: str) -> int:
        """What a tier's arena needs for all buffers."""
        return max((b.start_bytes + b.num_bytes for b in self.buffers if b.tier == tier), default=0)

    @property
    def kept(self) -> frozenset[str]:
        """Buffers that still hold what the step before left in them: their READ moves nothing."""
        reads = (i.action for i in self.instructions if i.action.kind is Kind.READ and not i.num_bytes)
        return frozenset(f"c{action.index}:{action.slot}" for action in reads)

    def places(self, tier: str) -> dict[str, tuple[int, int]]:
        """Buffer of a tier -> its first byte and its bytes in that tier's arena."""
        return {b.name: (b.start_bytes, b.num_bytes) for b in self.buffers if b.tier == tier}

    def without_carried(self) -> "Program":
        """The program of a first step, which has no step before it: what is kept from step to step is read."""
        n = self.num_carried
        if not n and not self.kept:
            return self
        sizes = {buffer.name: buffer.num_bytes for buffer in self.buffers}
        rest: list[Instruction] = []
        for i in self.instructions[n:]:
            name = f"c{i.action.index}:{i.action.slot}"
            is_kept = i.action.kind is Kind.READ and not i.num_bytes
            after = tuple(before - n for before in i.after if before >= n)
            rest.append(replace(i, after=after, num_bytes=sizes[name] if is_kept else i.num_bytes))
        return Program(tuple(rest), self.buffers)

    def only_carried(self) -> "Program":
        """What is left to do after the last step. What was kept for the next one is let go."""
        carried = self.instructions[: self.num_carried]
        drops = tuple(
            Instruction(Action(Kind.DROP, i.action.index, None, i.action.slot), Lane.COMPUTE, (position,))
            for position, i in enumerate(carried)
            if f"c{i.action.index}:{i.action.slot}" in self.kept
        )
        return Program((*carried, *drops), self.buffers)

    def text(self) -> str:
        """One instruction a line: position, lane, action, bytes, what it waits for; then the buffers, a line each.
        `parse` reads it back."""
        lines = [
            f"{position:5d} {i.lane:8s} {i.action!s:16s} {i.num_bytes:12d} <- {','.join(map(str, i.after)) or '-'}"
            for position, i in enumerate(self.instructions)
        ]
        lines += [f"buffer {b.name} {b.tier} {b.start_bytes} {b.num_bytes}" for b in self.buffers]
        return "\n".join([*lines, f"carried {self.num_carried}"] if self.num_carried else lines)

    @classmethod
    def parse(cls, text: str) -> "Program":
        """The program that `text` shows; the inverse of `text()`.

        Raises:
            ValueError: a line that is no instruction, quoted.
        """
        instructions: list[Instruction] = []
        buffers: list[Buffer] = []
        num_carried = 0
        for line in text.splitlines():
            match line.split():
                case []:
                    continue
                case ["buffer", name, tier, start, size] if start.isdigit() and size.isdigit():
                    buffers.append(Buffer(name, tier, int(start), int(size)))
                case ["carried", number] if number.isdigit():
                    num_carried = int(number)
                case _:
                    instructions.append(_parse_line(line))
        return cls(tuple(instructions), tuple(buffers), num_carried)


def _parse_line(line: str) -> Instruction:
    try:
        left, after = line.split("<-")
        words = left.split()
        lane, action, num_bytes = words[1], " ".join(words[2:-1]), words[-1]
        waits = () if after.strip() == "-" else tuple(int(number) for number in after.split(","))
        return Instruction(Action.parse(action), Lane(lane), waits, int(num_bytes))
    except (ValueError, IndexError) as error:
        raise ValueError(f"no instruction: {line!r} ({error})") from error


def actions_from(texts: Iterable[str]) -> list[Action]:
    """Actions from their text forms: `actions_from(["F0.0", "B0.0"])`."""
    return [Action.parse(text) for text in texts]
