"""The life of every storage that a pass makes: when it comes, what saves it, when it goes.

Owns the log of one pass. Does not own what is read out of it (`memory_profile.py`) nor the pass (`trace.py`).

What autograd saves is replaced by a note of its shape, as recomputing or offloading would do it. So the log knows two
lives of a storage: how long something *refers* to it, and how long it is *saved*; its bytes are held while either
lasts. A note becomes a tensor again when the backward pass asks for it.
"""

import weakref
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import torch

__all__ = ["Event", "Record", "StorageWatch"]


class Event(Enum):
    """What can happen in a pass."""

    PHASE = auto()  # an action begins; the payload is its key
    LEFT = auto()  # a unit's forward is over; the payload is its run
    MADE = auto()
    UNREFERRED = auto()
    REFERRED = auto()  # unpacked in backward
    SAVED = auto()
    RELEASED = auto()
    GRADIENT = auto()  # it is complete, as a parameter's gradient
    WORKSPACE = auto()  # a kernel's own memory, gone at its end; the payload is the number of bytes


@dataclass(eq=False)
class Record:
    """One storage.

    Attributes:
        num_bytes: the most that it ever had.
        phase: the action in which it was made.
        saved_by: unit runs that saved it, in order; None stands for code outside of every unit.
        passed_to: unit runs that were given it.
        returned_by: unit runs that returned it.
        kept_by: the unit run that keeps it where it is recomputed selectively.
        is_rewritten: whether it is kept in vain: it was written to after that unit's end.
        is_gradient: of a parameter.
        num_notes: how often it is saved now.
        remade: what stands for it in backward, until it is not saved any more.
    """

    num_bytes: int
    phase: Any
    saved_by: list[int | None] = field(default_factory=list)
    passed_to: list[int] = field(default_factory=list)
    returned_by: list[int] = field(default_factory=list)
    kept_by: int | None = None
    is_rewritten: bool = False
    is_gradient: bool = False
    num_notes: int = 0
    remade: torch.Tensor | None = None


class StorageWatch:
    """Keeps the log; the pass tells it what happens.

    Args:
        replaces: whether saved tensors may be replaced by notes (not where their values count).
    """

    def __init__(self, replaces: bool) -> None:
        self.events: list[tuple[Event, Record | None, Any]] = []
        self.records: list[Record] = []
        self.library_bytes = 0
        self._largest_kept_bytes = 0
        self._replaces = replaces
        self._phase: Any = None
        self._unit: int | None = None
        self._open = True
        self._returning: Record | None = None  # the saved storage that the next new one stands for
        self._known: dict[int, tuple[Record | None, Any]] = {}  # address of a storage -> its record, its weak reference

    # ---- what the pass tells

    def ignore(self, tensor: torch.Tensor) -> None:
        """This storage is a parameter's, a buffer's or the batch's: not counted."""
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = (None, storage)

    def phase(self, key: Any) -> None:
        self._phase = key
        self.events.append((Event.PHASE, None, key))

    def enter(self, run: int) -> None:
        self._unit = run

    def leave(self, run: int) -> None:
        self._unit = None
        self.events.append((Event.LEFT, None, run))

    def workspace(self, num_bytes: int) -> None:
        self.events.append((Event.WORKSPACE, None, num_bytes))

    def library(self, num_bytes: int) -> None:
        """A kernel's library takes this, and keeps it for its next calls: only a larger one is new."""
        if num_bytes > self._largest_kept_bytes:
            self._largest_kept_bytes = num_bytes
            self.library_bytes += num_bytes

    def made(self, tensor: torch.Tensor, least_bytes: int = 0) -> Record | None:
        """An operator returned this tensor: the record of its storage, None where that is not counted."""
        if tensor.layout is not torch.strided:
            return None
        storage = tensor.untyped_storage()
        known = self._known.get(storage._cdata)
        if known is None and self._returning is not None:
            record, self._returning = self._returning, None
            self.events.append((Event.REFERRED, record, None))
            self._follow(storage, record)
            return record
        if known is None:
            record = Record(max(storage.nbytes(), least_bytes), self._phase)
            self.records.append(record)
            self.events.append((Event.MADE, record, None))
            self._follow(storage, record)
            return record
        record = known[0]
        if record is not None:
            record.num_bytes = max(record.num_bytes, storage.nbytes())
        return record

    def keep(self, record: Record | None) -> None:
        """The running unit would keep it, if it were recomputed selectively."""
        if record is not None and self._unit is not None and record.phase == ("F", self._unit):
            record.kept_by = self._unit

    def changed(self, record: Record | None) -> None:
        """It was written to: what it was is not there any more. The unit that made it will not keep it then; where
        others wrote to it, it does keep it, and yet has to make it again."""
        if record is None or record.kept_by is None:
            return
        if record.kept_by == self._unit:
            record.kept_by = None
        else:
            record.is_rewritten = True

    def gradient(self, tensor: torch.Tensor) -> None:
        record = self.find(tensor)
        if record is not None:
            record.is_gradient = True
            self.events.append((Event.GRADIENT, record, None))

    def find(self, tensor: torch.Tensor) -> Record | None:
        if tensor.layout is not torch.strided:
            return None
        return self._known.get(tensor.untyped_storage()._cdata, (None, None))[0]

    def close(self) -> None:
        """Nothing is logged any more."""
        self._open = False
        self._known.clear()

    def saving(self) -> Any:
        """A context in which what autograd saves is logged."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    # ---- storages and notes

    def _follow(self, storage: Any, record: Record) -> None:
        address = storage._cdata

        def gone(_reference: Any) -> None:
            if self._open:
                del self._known[address]
                self.events.append((Event.UNREFERRED, record, None))

        self._known[address] = (record, weakref.ref(storage, gone))

    def _pack(self, tensor: torch.Tensor) -> Any:
        record = self.find(tensor)
        if record is None or not self._open:
            return tensor
        if self._unit not in record.saved_by:
            record.saved_by.append(self._unit)
        record.num_notes += 1
        self.events.append((Event.SAVED, record, None))
        return _Note(self, record, tensor, keeps=not self._replaces)

    def _unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        return packed.kept if packed.kept is not None else self._remade(packed)

    def _remade(self, note: "_Note") -> torch.Tensor:
        record = note.record
        if record.remade is None or record.remade.dtype is not note.dtype:
            self._returning = record
            whole = torch.empty(-(-record.num_bytes // note.dtype.itemsize), dtype=note.dtype, device=note.device)
            self.made(whole)  # where the recorder does not see it
            self._returning = None
            record.remade = whole
        return record.remade.as_strided(note.shape, note.stride, note.offset)


class _Note:
    """What stands for a saved tensor; released when autograd lets go of it."""

    def __init__(self, watch: StorageWatch, record: Record, tensor: torch.Tensor, keeps: bool) -> None:
        self.kept = tensor if keeps else None
        self.watch, self.record = watch, record
        self.shape, self.stride, self.offset = tensor.shape, tensor.stride(), tensor.storage_offset()
        self.dtype, self.device = tensor.dtype, tensor.device

    def __del__(self) -> None:
        if self.watch._open:
            self.watch.events.append((Event.RELEASED, self.record, None))
            self.record.num_notes -= 1
            if not self.record.num_notes:
                self.record.remade = None
