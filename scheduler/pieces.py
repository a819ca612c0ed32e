"""A model's units as a chain of pieces, for the exact choice of what is kept, recomputed or offloaded.

Owns the step from measured bytes and seconds to pieces, and from a choice for unit runs to one for units. Does not own
the choice (`recompute.py`) nor the figures (`memory_profile.py`, `cost.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from .cost import TimeProfile, UnitSeconds
from .hardware import DiskFigures
from .memory_profile import MemoryProfile, UnitMemory
from .plan import Activations
from .recompute import Piece, choose_activations
from .trace import Phase

__all__ = ["choose_for_units", "pieces_of", "without_faults"]


def pieces_of(memory: MemoryProfile, times: TimeProfile, disk: DiskFigures | None = None) -> list[Piece]:
    """One for each unit run.

    Raises:
        ValueError: profiles of different models.
    """
    result: list[Piece] = []
    for run, (unit, seconds) in enumerate(zip(memory.units, times.units, strict=True)):
        forward, backward = unit.forward, unit.backward
        again = unit.input_bytes + unit.recompute_peak_bytes + backward.summing_peak_bytes
        selective = memory.selective_bytes(run)
        selective_again = selective + unit.selective_again_bytes + backward.summing_peak_bytes
        result.append(
            Piece(
                saved_bytes=unit.saved_bytes,
                input_bytes=unit.input_bytes,
                keep_peak_bytes=max(forward.peak_bytes, unit.saved_bytes + backward.summing_peak_bytes),
                recompute_peak_bytes=max(forward.unsaved_peak_bytes, again),
                offload_peak_bytes=unit.saved_bytes + max(forward.unsaved_peak_bytes, backward.summing_peak_bytes),
                forward_s=seconds.forward_s,
                backward_s=seconds.backward_s,
                recompute_s=seconds.recompute_s,
                save_s=0.0 if disk is None else disk.save.seconds(unit.saved_bytes),
                load_s=0.0 if disk is None else disk.read.seconds(unit.saved_bytes),
                selective_bytes=selective,
                selective_peak_bytes=max(forward.selective_peak_bytes, selective_again),
                selective_s=seconds.recompute_s if seconds.selective_s is None else seconds.selective_s,
            )
        )
    return result


def choose_for_units(
    memory: MemoryProfile, times: TimeProfile, num_units: int, room_bytes: int, disk: DiskFigures | None = None
) -> Sequence[Activations] | None:
    """A policy for every unit, the fastest that keeps activations within `room_bytes`; None: none does.

    A unit that runs several times has one policy: what the leanest of its runs has.
    """
    allowed = [Activations.KEEP, Activations.RECOMPUTE, Activations.SELECTIVE]
    if disk is not None:
        allowed.append(Activations.OFFLOAD_DISK)
    choice = choose_activations(pieces_of(memory, times, disk), room_bytes, allowed)
    if choice is None:
        return None
    words = [Activations.KEEP] * num_units
    for unit, word in zip(memory.units, choice.words, strict=True):
        if word is not Activations.KEEP:
            words[unit.unit] = word
    return words


def without_faults(
    times: TimeProfile,
    memory: MemoryProfile,
    fault_s_per_byte: float,
    fresh_shares: Mapping[Phase, float] | None = None,
) -> TimeProfile:
    """What units take where the blocks that they free are kept, from what they take where each is a fresh one of the
    kernel's: less its page faults, for all that a unit makes. At least half of it is left.

    Args:
        fresh_shares: phase -> part of what it makes that is fresh all the same (`Ledger.fresh_shares`).
    """
    fresh = fresh_shares or {}

    def less(seconds: float, churn_bytes: int, phase: Phase) -> float:
        saved_s = fault_s_per_byte * churn_bytes * (1 - fresh.get(phase, 0.0))
        return max(seconds - saved_s, seconds / 2)

    def of(run: int, unit: UnitMemory, seconds: UnitSeconds) -> UnitSeconds:
        forward, backward = ("F", run), ("B", run)
        backward_s = less(seconds.backward_s, unit.backward.churn_bytes, backward)
        return replace(
            seconds,
            forward_s=less(seconds.forward_s, unit.forward.churn_bytes, forward),
            backward_s=backward_s,
            weight_s=min(seconds.weight_s, backward_s),
            recompute_s=less(seconds.recompute_s, unit.recompute_churn_bytes, backward),
            selective_s=None
            if seconds.selective_s is None
            else less(seconds.selective_s, unit.recompute_churn_bytes - unit.kept_beside_bytes, backward),
        )

    units = tuple(of(run, *pair) for run, pair in enumerate(zip(memory.units, times.units, strict=True)))
    last = len(units) - 1
    return TimeProfile(
        units,
        less(times.loss_s, memory.loss.churn_bytes, ("F", last)),
        less(times.loss_backward_s, memory.loss_backward.churn_bytes, ("B", last)),
        times.in_turns,
    )
