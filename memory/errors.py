"""The errors that users meet, from the lowest layer up, so that every layer can raise them.

    OutgrowError(RuntimeError)          anything this project raises on purpose while a run goes on
     +- DoesNotFit(ValueError too)      a plan that needs more bytes than a tier has
     +- InvalidProgram                  a program that cannot run as it stands: a mistake of this project
 +- OutOfOrder                      the model called its units in another order than recorded
     +- NotFinite                       a loss that is NaN or infinite
     +- LaneTimeout                     a wait that passed its deadline; says what it waits for
     +- StateLost                       a step failed half-way: the weights belong to no step
     +- StoreError                      the disk tier
     |   +- DiskFull, DiskFault, ChunkCorrupted
     +- WorkerError                     a worker failed; carries rank, step and unit, and the worker's own traceback

Mistakes in the arguments raise `ValueError` before anything starts. All of them survive pickling.
"""

from dataclasses import dataclass

__all__ = [
    "ChunkCorrupted",
    "DiskFault",
    "DiskFull",
    "DoesNotFit",
    "InvalidProgram",
    "LaneTimeout",
    "NotFinite",
    "OutOfOrder",
    "OutgrowError",
    "Place",
    "StateLost",
    "StoreError",
    "WorkerError",
]


class OutgrowError(RuntimeError):
    """Anything that this project raises on purpose while a run goes on."""


class DoesNotFit(OutgrowError, ValueError):
    """A plan needs more bytes on a tier than the budget gives. Raised before step 1."""


class InvalidProgram(OutgrowError):
    """A program would deadlock, overflow or compute something else; names the instruction. Raised before it runs: a
    mistake of this project, please report it with the plan."""


class OutOfOrder(OutgrowError):
    """The model called its units in another order than the one recorded; names both."""


class NotFinite(OutgrowError):
    """The loss became NaN or infinite; names the step and the first unit whose output was not finite."""


class LaneTimeout(OutgrowError):
    """A wait passed its deadline; says which action waits for which."""


class StateLost(OutgrowError):
    """A step failed after part of the model had been updated: nothing goes on from such weights."""


@dataclass(frozen=True)
class Place:
    """Where on the disk tier something went wrong; without chunk, slot and offset: the file as a whole."""

    run: str
    rank: int
    path: str
    chunk: str = ""
    slot: str = ""
    offset_bytes: int | None = None

    def __str__(self) -> str:
        parts = [f"run {self.run}", f"rank {self.rank}"]
        parts += [f"chunk {self.chunk}"] if self.chunk else []
        parts += [f"slot {self.slot}"] if self.slot else []
        parts += [f"file {self.path}"]
        parts += [f"offset {self.offset_bytes}"] if self.offset_bytes is not None else []
        return ", ".join(parts)


class StoreError(OutgrowError):
    """The disk tier failed. `place` names run, rank, chunk, slot, file and offset; the message says what to do."""

    def __init__(self, message: str, place: Place | None = None) -> None:
        super().__init__(message, place)
        self.message = message
        self.place = place

    def __str__(self) -> str:
        return self.message if self.place is None else f"{self.place}: {self.message}"


class DiskFull(StoreError):
    """No space is left where the disk tier lives."""


class DiskFault(StoreError):
    """The device or file system failed a read or a write, or the file is gone or too short."""


class ChunkCorrupted(StoreError):
    """What was read is not what was written: checksum or generation differ."""


class WorkerError(OutgrowError):
    """A worker failed. `rank`, `step` and `unit` say where; the worker's own traceback is in the message."""

    def __init__(self, message: str, rank: int | None = None, step: int | None = None, unit: str | None = None) -> None:
        super().__init__(message)
        self.rank = rank
        self.step = step
        self.unit = unit

    def __reduce__(self) -> tuple:
        return type(self), (self.args[0], self.rank, self.step, self.unit)
