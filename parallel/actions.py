"""The action vocabulary: one instruction of a program, with a text form that round-trips.

Owns the kinds, the `Action` record and its text. It does not own lanes, dependencies or buffer sizes (those are a
program's, `scheduler/program.py`), nor what an action does (`runtime/engine.py` and the managers below it).

    F12.3          forward of unit 12 on micro-batch 3          B, I, W, R alike
    GATHER c7.0    gather chunk 7 (for micro-batch 0)           REDUCE, DROP, STEP alike; without `.0`: for the step
    READ c7:optim  move slot group `optim` of chunk 7           WRITE, DROP alike
    UP c7:param    copy chunk 7's parameters from the host to the device; `DROP c7:device` forgets that copy
    DOWN c7.0:grad move the gradients of chunk 7 that micro-batch 0 made from the device to the host
    SAVE a7.0      move the saved activations of unit 7, micro-batch 0, away      LOAD brings them back
    SEND_F s1.3    send stage 1's output for micro-batch 3      RECV_F, SEND_B, RECV_B alike
    NORM           the global gradient norm

The same words appear in tests, errors, traces and profiler names.
"""

import re
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Action", "Kind", "Target"]


class Target(StrEnum):
    """What the index of an action counts; the letter stands before the index in the text form."""

    UNIT = ""
    CHUNK = "c"
    ACTIVATION = "a"
    STAGE = "s"
    NOTHING = "-"


class Kind(StrEnum):
    """Every kind of action that there is."""

    F = "F"  # forward
    B = "B"  # whole backward
    I = "I"  # input gradient  # noqa: E741
    W = "W"  # weight gradient
    R = "R"  # recompute
    STEP = "STEP"  # optimizer update of a chunk's shard
    GATHER = "GATHER"  # all ranks' shards -> the full chunk
    REDUCE = "REDUCE"  # all ranks' gradients -> the sum, whole or in shards
    SEND_F = "SEND_F"
    RECV_F = "RECV_F"
    SEND_B = "SEND_B"
    RECV_B = "RECV_B"
    NORM = "NORM"
    UP = "UP"  # host -> device
    DOWN = "DOWN"  # device -> host
    READ = "READ"  # disk -> host
    WRITE = "WRITE"  # host -> disk
    SAVE = "SAVE"  # saved activations -> a farther tier
    LOAD = "LOAD"  # and back
    DROP = "DROP"  # forget the gathered copy, or what a slot's buffer holds

    __hash__ = str.__hash__  # an Enum's own is written in Python, and actions are looked up all the time

    @property
    def target(self) -> Target:
        return _TARGETS[self]

    @property
    def is_compute(self) -> bool:
        """True for the actions that run a unit's code."""
        return self in _COMPUTE


_COMPUTE = frozenset({Kind.F, Kind.B, Kind.I, Kind.W, Kind.R})
_TARGETS: dict[Kind, Target] = {
    **dict.fromkeys(_COMPUTE, Target.UNIT),
    **dict.fromkeys((Kind.SAVE, Kind.LOAD), Target.ACTIVATION),
    **dict.fromkeys((Kind.SEND_F, Kind.RECV_F, Kind.SEND_B, Kind.RECV_B), Target.STAGE),
    Kind.NORM: Target.NOTHING,
    **dict.fromkeys(
        (Kind.STEP, Kind.GATHER, Kind.REDUCE, Kind.UP, Kind.DOWN, Kind.READ, Kind.WRITE, Kind.DROP), Target.CHUNK
    ),
}
_TEXT = re.compile(r"^([A-Z_]+)(?: ?([cas]?)(\d+)(?:\.(\d+))?(?::(\w+))?)?$")
_SLOT = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Action:
    """One instruction.

    Attributes:
        kind: what is done.
        index: of the unit, chunk or stage (None for `NORM` alone).
        micro_batch: the micro-batch it is done for, or None where it is done for the whole step.
        slot: which slot of a chunk a move takes (`param`, `optim`, ...), or None.

    Raises:
        ValueError: fields that do not go together, e.g. a forward without a micro-batch.
    """

    kind: Kind
    index: int | None = None
    micro_batch: int | None = None
    slot: str | None = None

    def __post_init__(self) -> None:
        target = _TARGETS[self.kind]
        if (self.index is None) != (target is Target.NOTHING):
            raise ValueError(f"{self.kind} takes {'no index' if target is Target.NOTHING else 'an index'}")
        if target is Target.NOTHING and self.micro_batch is not None:
            raise ValueError(f"{self.kind} is done for the whole step, got micro-batch {self.micro_batch}")
        if min(self.index or 0, self.micro_batch or 0) < 0:
            raise ValueError(f"{self.kind}: index {self.index} and micro-batch {self.micro_batch} count from 0")
        if target in (Target.UNIT, Target.ACTIVATION, Target.STAGE) and self.micro_batch is None:
            raise ValueError(f"{self.kind} of {self.index} needs a micro-batch")
        if self.slot is not None and target is not Target.CHUNK:
            raise ValueError(f"{self.kind} takes no slot, got {self.slot!r}")
        if self.slot is not None and not _SLOT.fullmatch(self.slot):
            raise ValueError(f"{self.kind}: a slot is one word such as 'param', got {self.slot!r}")

    def __str__(self) -> str:
        target = self.kind.target
        if target is Target.NOTHING:
            return str(self.kind)
        space = "" if target is Target.UNIT else " "
        micro_batch = "" if self.micro_batch is None else f".{self.micro_batch}"
        slot = "" if self.slot is None else f":{self.slot}"
        return f"{self.kind}{space}{target}{self.index}{micro_batch}{slot}"

    @classmethod
    def parse(cls, text: str) -> "Action":
        """The action that `text` names; the inverse of `str`.

        Raises:
            ValueError: text that names no action, quoted with the form that was expected.
        """
        match = _TEXT.match(text.strip())
        kind = Kind.__members__.get(match[1]) if match else None
        if match is None or kind is None:
            raise ValueError(f"no action: {text!r}; expected e.g. 'F12.3', 'GATHER c7', 'READ c7:optim', 'NORM'")
        _, letter, index, micro_batch, slot = match.groups()
        if index is not None and letter != kind.target.value:
            raise ValueError(f"no action: {text!r}; {kind} counts {kind.target.name.lower()}s: '{kind.target}{index}'")
        return cls(kind, None if index is None else int(index), None if micro_batch is None else int(micro_batch), slot)
