"""A model's units as a chain of pieces, for the exact choice of what is kept, recomputed or offloaded.

Owns the step from measured bytes and seconds to pieces, and from a choice for unit runs to one for units. Does not own
the choice (`recompute.py`) nor the figures (`memory_profile.py`, `cost.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from .cost import TimeProfile, UnitSeconds
from .hardware import DiskFigures
from .memory_profile import MemoryProfile, UnitMemory
from .plan import Activations
from .recompute import Piece, choose_activations
from .storage_replay import Fresh
from .trace import Phase

__all__ = ["choose_for_units", "pieces_of", "with_faults"]


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


def with_faults(
    times: TimeProfile,
    memory: MemoryProfile,
    seconds_of: Callable[[Fresh], float],
    shares: Mapping[Phase, float] | None = None,
    has_faults: bool = False,
) -> TimeProfile:
    """What units take where blocks that they make lie in fresh pages, from what they take where none do.

    Args:
        seconds_of: fresh pages -> what they take.
        shares: phase -> part of what it makes that is fresh (`Ledger.fresh_shares`); None: all of it.
        has_faults: whether all of it was fresh when units were timed. At least half of the seconds is then left.
    """

    def with_fresh(seconds: float, fresh: Fresh, phase: Phase, part: float = 1.0) -> float:
        share = 1.0 if shares is None else shares.get(phase, 0.0)
        return max(seconds + part * (share - has_faults) * seconds_of(fresh), seconds / 2)

    def of(run: int, unit: UnitMemory, seconds: UnitSeconds) -> UnitSeconds:
        forward, backward = ("F", run), ("B", run)
        made_again = max(0, unit.recompute_churn_bytes - unit.kept_beside_bytes) / max(1, unit.recompute_churn_bytes)
        backward_s = with_fresh(seconds.backward_s, unit.backward.fresh, backward)
        return replace(
            seconds,
            forward_s=with_fresh(seconds.forward_s, unit.forward.fresh, forward),
            backward_s=backward_s,
            weight_s=min(seconds.weight_s, backward_s),
            recompute_s=with_fresh(seconds.recompute_s, unit.recompute_fresh, backward),
            selective_s=None
            if seconds.selective_s is None
            else with_fresh(seconds.selective_s, unit.recompute_fresh, backward, made_again),
        )

    units = tuple(of(run, *pair) for run, pair in enumerate(zip(memory.units, times.units, strict=True)))
    last = len(units) - 1
    return replace(
        times,
        units=units,
        loss_s=with_fresh(times.loss_s, memory.loss.fresh, ("F", last)),
        loss_backward_s=with_fresh(times.loss_backward_s, memory.loss_backward.fresh, ("B", last)),
    )
