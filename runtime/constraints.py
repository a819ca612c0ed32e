"""What the caller fixed about memory, and the plan that follows from it.

Owns the words of `offload=`, `activations=`, `order=` and `update=`, their checks, and how they turn a plan of a ZeRO
stage into one that uses the host of a device with memory of its own, or the disk. Does not own choosing what the caller
left open (`scheduler/search.py`, `scheduler/fit.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeVar

import torch

from ..memory.budget import Memory
from ..scheduler.assessment import Open, offloaded
from ..scheduler.plan import Activations, Home, MicroBatchOrder, Plan, UpdateTime

__all__ = ["Constraints", "Offload"]


_Word = TypeVar("_Word", bound=StrEnum)


class Offload(StrEnum):
    """What lies elsewhere than it is computed with, between its uses."""

    NONE = "none"
    HOST = "host"
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
        _check_device(memory)
        offload = _word(Offload, "offload", self.offload)
        if offload is Offload.HOST and not memory.is_separate:
            raise ValueError(
                "offload='host' has no effect where device and host are the same bytes: give Memory(device=...), or "
                "leave it out"
            )
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
            homes=self.offload is None and (memory.disk is not None or memory.is_separate),
            activations=self.activations is None,
            order=self.order is None,
            update=self.update is None,
            disk=memory.disk is not None,
        )

    def applied(self, plan: Plan, num_units: int) -> Plan:
        """`plan` with everything that is fixed; what is open stays as it is."""
        changes: dict[str, object] = {}
        if self.offload is not None:
            nearest = Home.HOST if plan.unified else Home.DEVICE
            homes = {
                Offload.NONE: (nearest, nearest),
                Offload.HOST: (Home.HOST, Home.HOST),
                Offload.OPTIMIZER: (Home.HOST, Home.DISK),
                Offload.ALL: (Home.DISK, Home.DISK),
            }[Offload(self.offload)]
            changes["chunks"] = tuple(offloaded(chunk, *homes) for chunk in plan.chunks)
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


def _check_device(memory: Memory) -> None:
    if memory.device is not None and memory.unified is None and not torch.cuda.is_available():
        raise ValueError(
            f"Memory(device={memory.device!r}) has no effect: this machine has no accelerator, device and host are the "
            "same bytes. Give host= alone, or unified=False for a part of this process's memory that plays a device"
        )
    if memory.unified is False and memory.device is None:
        raise ValueError("Memory(unified=False) needs the device's budget: give device='2GiB' beside host=")


def _word(kind: type[_Word], name: str, word: str | None) -> _Word | None:
    return None if word is None else _known(kind, name, word)


def _known(kind: type[_Word], name: str, word: str) -> _Word:
    try:
        return kind(word)
    except ValueError:
        raise ValueError(f"{name}={word!r}: there is {', '.join(repr(str(each)) for each in kind)}") from None
