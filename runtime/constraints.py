"""What the caller fixed about memory, and the plan that follows from it.

Owns the words of `offload=`, `activations=`, `order=` and `update=`, their checks, and how they turn a plan of a ZeRO
stage into one that uses the disk. Does not own choosing what the caller left open (`scheduler/fit.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeVar

from ..memory.budget import Memory
from ..scheduler.fit import Open, offloaded
from ..scheduler.plan import Activations, Home, MicroBatchOrder, Plan, UpdateTime

__all__ = ["Constraints", "Offload"]


_Word = TypeVar("_Word", bound=StrEnum)


class Offload(StrEnum):
    """What lies on disk between its uses."""

    NONE = "none"
    OPTIMIZER = "optimizer"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class Constraints:
    """What is fixed; None: open.

    Raises:
        ValueError: a word that there is not, or words that cannot hold together.
    """

    offload: str | None = None
    activations: str | Sequence[str] | None = None
    order: str | None = None
    update: str | None = None

    def check(self, memory: Memory, num_units: int, clips_gradients: bool, micro_batches: int) -> None:
        """Raise ValueError where the words cannot hold with this memory, model and training."""
        if memory.device is not None or memory.unified is False:
            raise ValueError(
                f"Memory(device={memory.device!r}, unified={memory.unified!r}): a device with memory of its own is not "
                "supported yet; on this machine device and host are the same bytes, so give host= alone"
            )
        offload = _word(Offload, "offload", self.offload)
        _word(MicroBatchOrder, "order", self.order)
        update = _word(UpdateTime, "update", self.update)
        words = self.words_of_units(num_units) or ()
        wants_disk = offload in (Offload.OPTIMIZER, Offload.ALL) or Activations.OFFLOAD_DISK in words
        if wants_disk and memory.disk is None:
            what = f"offload={self.offload!r}" if offload else "activations='offload:disk'"
            raise ValueError(f"{what} needs a disk: give memory=Memory(disk='/a/folder/on/a/disk')")
        if update is UpdateTime.BACKWARD and clips_gradients:
            raise ValueError(
                "update='backward' cannot be with clip_grad_norm: no chunk can be updated before the norm of all "
                "gradients is known; leave one of them out"
            )
        if self.order == MicroBatchOrder.BY_UNIT and micro_batches == 1:
            raise ValueError("order='by-unit' has no effect with micro_batches=1: leave it out, or give more of them")

    def words_of_units(self, num_units: int) -> tuple[Activations, ...] | None:
        """The decision for every unit, or None where it is open."""
        if self.activations is None:
            return None
        if isinstance(self.activations, str):
            return (_known(Activations, "activations", self.activations),) * num_units
        words = tuple(_known(Activations, "activations", word) for word in self.activations)
        if len(words) != num_units:
            raise ValueError(f"activations gives {len(words)} words, and the model has {num_units} units")
        return words

    def open(self, memory: Memory) -> Open:
        """What may be decided."""
        return Open(
            homes=self.offload is None and memory.disk is not None,
            activations=self.activations is None,
            order=self.order is None,
            update=self.update is None,
        )

    def applied(self, plan: Plan, num_units: int) -> Plan:
        """`plan` with everything that is fixed; what is open stays as it is."""
        changes: dict[str, object] = {}
        if self.offload is not None:
            everything = self.offload == Offload.ALL
            slots = Home.HOST if self.offload == Offload.NONE else Home.DISK
            changes["chunks"] = tuple(
                offloaded(chunk, Home.DISK if everything else Home.HOST, slots) for chunk in plan.chunks
            )
            if self.offload != Offload.NONE and not plan.clips_gradients:
                changes["update"] = UpdateTime.BACKWARD
        words = self.words_of_units(num_units)
        if words is not None:
            changes["activations"] = words
        if self.order is not None:
            changes["order"] = MicroBatchOrder(self.order)
        if self.update is not None:
            changes["update"] = UpdateTime(self.update)
        return replace(plan, **changes)  # pyright: ignore[reportArgumentType]


def _word(kind: type[_Word], name: str, word: str | None) -> _Word | None:
    return None if word is None else _known(kind, name, word)


def _known(kind: type[_Word], name: str, word: str) -> _Word:
    try:
        return kind(word)
    except ValueError:
        raise ValueError(f"{name}={word!r}: there is {', '.join(repr(str(each)) for each in kind)}") from None
