"""Live bytes of a micro-batch at every phase, under a policy for each unit run; and the peak of several at once.

Owns the arithmetic from a `MemoryProfile` to bytes. Does not own the choice of policies, nor when moved bytes have
really left (a caller adds staging buffers that outlive the action).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate

from .memory_profile import MemoryProfile, StorageLife
from .storage_replay import PhaseMemory
from .trace import Phase

__all__ = ["Keeping", "Levels", "levels_under", "peak_of"]


class Keeping(StrEnum):
    """What happens to what a unit run saves, between its forward and its backward."""

    KEEP = "keep"
    RECOMPUTE = "recompute"  # its inputs stay, it runs again
    SELECTIVE = "selective"  # so do its matrix products and attention, the rest of it runs again
    OFFLOAD = "offload"  # it is moved away, and comes back


@dataclass(frozen=True)
class Levels:
    """One micro-batch under one policy; a value for each phase of `MemoryProfile.order`.

    Attributes:
        order: the phases.
        begin_bytes: live at the begin of the phase.
        top_bytes: the most that is live in it, gradients of parameters excluded.
        summing_top_bytes: with each gradient from its making until it is added to a sum that lies elsewhere.
        growth_bytes: all that is made in it, added up; of what follows the last unit until the loss is there, with that
            unit.
    """

    order: tuple[Phase, ...]
    begin_bytes: tuple[int, ...]
    top_bytes: tuple[int, ...]
    summing_top_bytes: tuple[int, ...]
    growth_bytes: tuple[int, ...]

    @property
    def kept_top_bytes(self) -> tuple[int, ...]:
        """The most that a heap holds in the phase which has only what is live at its begin, and gives nothing back."""
        return tuple(begin + growth for begin, growth in zip(self.begin_bytes, self.growth_bytes, strict=True))


def levels_under(profile: MemoryProfile, policies: Sequence[Keeping], in_buffers: bool = False) -> Levels:
    """The levels with `policies[run]` for each unit run.

    While an offloaded unit runs forward, what it saves counts in full beside what it works with (both are there until
    the copy is done); at the begin of its backward it is all there again, in one buffer.

    Args:
        in_buffers: whether that buffer is counted elsewhere.

    Raises:
        ValueError: another number of policies than of unit runs.
    """
    if len(policies) != len(profile.units):
        raise ValueError(f"{len(policies)} policies for {len(profile.units)} unit runs")
    place = {phase: position for position, phase in enumerate(profile.order)}
    spans = [_spans(life, place, policies) for life in profile.storages]
    begin_bytes = _begin_bytes(profile, place, policies, spans)
    brought_back: dict[int, int] = {}  # unit run -> what it saved and is not there at the begin of its backward
    for life, whens in zip(profile.storages, spans, strict=True):
        for run in set(life.saved_by):
            position = place.get(("B", run))
            is_live = any(first <= position <= last for first, last in whens) if position is not None else True
            if not is_live and not (in_buffers and policies[run] is Keeping.OFFLOAD):
                brought_back[run] = brought_back.get(run, 0) + life.num_bytes
    tops, summing, growths = [], [], []
    for base, phase in zip(begin_bytes, profile.order, strict=True):
        kind, run = phase
        memory = _memory(profile, phase)
        rise, summing_rise, growth = memory.peak_bytes, memory.summing_peak_bytes, memory.churn_bytes
        if kind == "F" and policies[run] is not Keeping.KEEP:
            is_selective = policies[run] is Keeping.SELECTIVE
            rise = memory.selective_peak_bytes if is_selective else memory.unsaved_peak_bytes
            if policies[run] is Keeping.OFFLOAD:
                rise += profile.units[run].saved_bytes
            summing_rise = rise
        elif kind == "B":
            back = brought_back.get(run, 0)
            unit = profile.units[run]
            again = unit.recompute_peak_bytes if policies[run] is Keeping.RECOMPUTE else 0
            again = unit.selective_again_bytes if policies[run] is Keeping.SELECTIVE else again
            rise, summing_rise = max(back + rise, again), max(back + summing_rise, again)
            is_again = policies[run] in (Keeping.RECOMPUTE, Keeping.SELECTIVE)
            growth += unit.recompute_churn_bytes if is_again else back
        elif phase == ("loss", 0) and growths:
            growths[-1] += growth
            growth = 0
        tops.append(base + rise)
        summing.append(base + summing_rise)
        growths.append(max(growth, summing_rise) if kind in ("F", "B") else growth)
    return Levels(profile.order, tuple(begin_bytes), tuple(tops), tuple(summing), tuple(growths))


def peak_of(levels: Levels, actions: Iterable[tuple[str, int, int]]) -> tuple[int, tuple[str, int, int] | None]:
    """The most live bytes over `actions` ("F" or "B", unit run, micro-batch), with gradients being summed, and where.

    Each micro-batch's actions must come in the order of its phases; those of different ones may mix. What lies between
    the units (the loss) counts with the action that follows it in the same micro-batch.
    """
    place = {phase: position for position, phase in enumerate(levels.order)}
    at: dict[int, int] = {}  # micro-batch -> phases done
    total, peak, where = 0, 0, None
    for kind, run, micro_batch in actions:
        phase = place[kind, run]
        done = at.get(micro_batch, 0)
        assert phase >= done, f"{kind}{run}.{micro_batch} comes after a later phase"
        others = total - _begin(levels, done)
        top = others + max(levels.summing_top_bytes[done : phase + 1])
        if top > peak:
            peak, where = top, (kind, run, micro_batch)
        at[micro_batch] = phase + 1
        total = others + _begin(levels, phase + 1)
    return peak, where


def _begin(levels: Levels, position: int) -> int:
    return levels.begin_bytes[position] if position < len(levels.order) and position else 0


def _memory(profile: MemoryProfile, phase: Phase) -> PhaseMemory:
    kind, run = phase
    if kind in ("F", "B"):
        return profile.units[run].forward if kind == "F" else profile.units[run].backward
    return profile.before if kind == "before" else (profile.loss, profile.loss_backward)[run]


def _begin_bytes(
    profile: MemoryProfile,
    place: dict[Phase, int],
    policies: Sequence[Keeping],
    spans: Sequence[Sequence[tuple[int, int]]],
) -> list[int]:
    """What is live at the begin of each phase."""
    changes = [0] * (len(profile.order) + 1)
    for life, whens in zip(profile.storages, spans, strict=True):
        for first, last in whens:
            changes[first] += life.num_bytes
            changes[last + 1] -= life.num_bytes
    for run, unit in enumerate(profile.units):
        first, last = place["F", run] + 1, place.get(("B", run), -1)
        if policies[run] is Keeping.SELECTIVE and first <= last:
            changes[first] += unit.kept_beside_bytes
            changes[last + 1] -= unit.kept_beside_bytes
    return list(accumulate(changes[:-1]))


def _spans(life: StorageLife, place: dict[Phase, int], policies: Sequence[Keeping]) -> list[tuple[int, int]]:
    """First and last positions of phases at whose begins it is there, apart from each other."""
    made, end = place[life.made_in], len(place) - 1
    if life.dropped_in is None:
        return [(made + 1, end)] if made < end else []
    whens = [(made + 1, place[life.dropped_in])]
    if life.saved_between and life.released_in is not None:
        whens.append((made + 1, place[life.released_in]))
    keepers = [run for run in life.saved_by if policies[run] is Keeping.KEEP]
    keepers += [run for run in life.passed_to if policies[run] in (Keeping.RECOMPUTE, Keeping.SELECTIVE)]
    if life.kept_by is not None and policies[life.kept_by] is Keeping.SELECTIVE:
        keepers.append(life.kept_by)
    whens += [(max(made, place["F", run]) + 1, place.get(("B", run), -1)) for run in keepers]
    merged: list[tuple[int, int]] = []
    for first, last in sorted(whens):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(merged[-1][1], last)
        elif first <= last:
            merged.append((first, last))
    return merged
