"""Levels and peaks of a pass, replayed from its log of storages.

Owns the ways of counting. Does not own the log (`storage_watch.py`) nor what a profile makes of it
(`memory_profile.py`).
"""

from dataclasses import dataclass

from .storage_watch import Event, Record, StorageWatch
from .trace import Phase

__all__ = ["NOTHING_FRESH", "Fresh", "PhaseMemory", "Replay", "round_up"]

_ALIGN_BYTES = 64  # the CPU allocator's

_PAGED_BYTES, _HUGE_BYTES = 128 << 10, 2 << 20  # blocks from here on come from the kernel, and have room for huge pages

_NONE: Phase = ("", 0)


def round_up(num_bytes: int) -> int:
    """`num_bytes` rounded up to what the allocator gives."""
    return -(-num_bytes // _ALIGN_BYTES) * _ALIGN_BYTES


@dataclass(frozen=True, slots=True)
class Fresh:
    """What the kernel gives, in fresh pages, where a process gives freed blocks back at once.

    Attributes:
        paged_bytes: in blocks without room for a huge page.
        huge_bytes: in the others.
    """

    paged_bytes: int = 0
    huge_bytes: int = 0

    def plus(self, num_bytes: int) -> "Fresh":
        """With one more block."""
        if num_bytes < _PAGED_BYTES:
            return self
        if num_bytes < _HUGE_BYTES:
            return Fresh(self.paged_bytes + num_bytes, self.huge_bytes)
        return Fresh(self.paged_bytes, self.huge_bytes + num_bytes)


NOTHING_FRESH = Fresh()


@dataclass(frozen=True, slots=True)
class PhaseMemory:
    """Bytes of one phase, everything that autograd saves being kept. Peaks are above the level at its begin.

    Attributes:
        peak_bytes: without gradients of parameters.
        summing_peak_bytes: with each gradient from its making until it is added to a sum that lies elsewhere.
        collecting_peak_bytes: with every gradient made in this phase until the phase's end.
        unsaved_peak_bytes: of what the phase itself makes, if autograd saved nothing of it.
        selective_peak_bytes: likewise, but outputs of matrix products and attention stay to its end.
        left_bytes: level at its end less that at its begin, without gradients; may be negative.
        gradient_bytes: of the parameters' gradients that it made.
        churn_bytes: everything that it makes added up, gradients too: what a heap grows by at the most where nothing
            that was freed meanwhile is given back.
        fresh: likewise, as far as blocks come from the kernel.
    """

    peak_bytes: int = 0
    summing_peak_bytes: int = 0
    collecting_peak_bytes: int = 0
    unsaved_peak_bytes: int = 0
    left_bytes: int = 0
    gradient_bytes: int = 0
    churn_bytes: int = 0
    selective_peak_bytes: int = 0
    fresh: Fresh = NOTHING_FRESH


class _Level:
    """Live bytes in one way of counting, and the peak since a phase's begin."""

    def __init__(self) -> None:
        self.now = self.begin = self.peak = self.highest = 0

    def add(self, num_bytes: int) -> None:
        self.now += num_bytes
        self.reach(0)

    def reach(self, extra_bytes: int) -> None:
        self.peak = max(self.peak, self.now + extra_bytes)
        self.highest = max(self.highest, self.peak)

    def start(self, now: int | None = None) -> None:
        self.now = self.now if now is None else now
        self.begin = self.peak = self.now

    @property
    def rise(self) -> int:
        return self.peak - self.begin


class Replay:
    """What a log says.

    Attributes:
        phases: phase -> its bytes, in the order of the pass.
        lasting: the storages that outlived the phase in which they were made, gradients of parameters excluded.
        dropped_in, released_in: id of a lasting record -> the phase in which its last reference, or saving, ended.
        recompute_peak_bytes: unit run -> peak of its own storages up to its end, with everything saved.
        recompute_churn_bytes, recompute_fresh: unit run -> all that it makes, added up.
        selective_again_bytes: likewise of those that it does not keep where it is recomputed selectively.
        peak_bytes, summing_peak_bytes, collecting_peak_bytes: of the whole pass.
    """

    def __init__(self, watch: StorageWatch) -> None:
        self.phases: dict[Phase, PhaseMemory] = {}
        self.lasting: list[Record] = []
        self.dropped_in: dict[int, Phase] = {}
        self.released_in: dict[int, Phase] = {}
        self.recompute_peak_bytes: dict[int, int] = {}
        self.recompute_churn_bytes: dict[int, int] = {}
        self.recompute_fresh: dict[int, Fresh] = {}
        self.selective_again_bytes: dict[int, int] = {}
        self._keep, self._own, self._unsaved = _Level(), _Level(), _Level()
        self._selective, self._again = _Level(), _Level()
        self._summing, self._collecting, self._staying = _Level(), _Level(), _Level()
        self._from_zero = (self._own, self._unsaved, self._selective, self._again)
        self._all = (self._keep, self._summing, self._collecting, self._staying, *self._from_zero)
        self._referred: dict[int, int] = {}
        self._saved: dict[int, int] = {}
        self._born: dict[int, Record] = {}  # in this phase, and alive
        self._complete_bytes = 0  # of gradients, in this phase
        self._made_bytes, self._fresh = 0, Fresh()  # in this phase
        self._phase: Phase = _NONE
        for event, record, payload in watch.events:
            if event is Event.PHASE:
                self._end_phase()
                self._phase = payload
            elif event is Event.LEFT:
                self.recompute_peak_bytes[payload] = self._own.rise
                self.recompute_churn_bytes[payload] = self._made_bytes
                self.recompute_fresh[payload] = self._fresh
                self.selective_again_bytes[payload] = self._again.rise
            elif event is Event.WORKSPACE:
                self._made_bytes += payload
                self._fresh = self._fresh.plus(payload)
                for level in self._all:
                    level.reach(payload)
            else:
                assert record is not None
                self._happen(event, record, round_up(record.num_bytes))
        self._end_phase()
        self.peak_bytes, self.summing_peak_bytes = self._keep.highest, self._summing.highest
        self.collecting_peak_bytes = self._staying.highest

    def _happen(self, event: Event, record: Record, num_bytes: int) -> None:
        key = id(record)
        if event is Event.MADE:
            self._made_bytes += num_bytes
            self._fresh = self._fresh.plus(num_bytes)
        if record.is_gradient:
            self._happen_to_gradient(event, num_bytes)
            return
        was_live = key in self._referred or key in self._saved
        is_own = record.phase == self._phase
        if event is Event.MADE:
            self._born[key] = record
        if event in (Event.MADE, Event.REFERRED):
            self._referred[key] = self._referred.get(key, 0) + 1
            if is_own and self._referred[key] == 1:
                self._unsaved.add(num_bytes)
                if record.kept_by is None or event is Event.MADE:
                    self._selective.add(num_bytes)
        elif event is Event.UNREFERRED:
            self._referred[key] -= 1
            if not self._referred[key]:
                del self._referred[key]
                self.dropped_in.setdefault(key, self._phase)  # a tensor remade in backward comes and goes later
            if is_own and key not in self._referred:
                self._unsaved.add(-num_bytes)
                if record.kept_by is None:
                    self._selective.add(-num_bytes)
        elif event is Event.SAVED:
            self._saved[key] = self._saved.get(key, 0) + 1
        elif event is Event.RELEASED:
            self._saved[key] -= 1
            if not self._saved[key]:
                del self._saved[key]
                self.released_in[key] = self._phase
        is_live = key in self._referred or key in self._saved
        if is_live == was_live:
            return
        change = num_bytes if is_live else -num_bytes
        if not is_live:
            self._born.pop(key, None)
        for level in (self._keep, self._summing, self._collecting, self._staying):
            level.add(change)
        if is_own:
            self._own.add(change)
            if record.kept_by is None or record.is_rewritten:
                self._again.add(change)

    def _happen_to_gradient(self, event: Event, num_bytes: int) -> None:
        if event is Event.MADE:
            for level in (self._summing, self._collecting, self._staying):
                level.add(num_bytes)
        elif event is Event.GRADIENT:
            self._complete_bytes += num_bytes
        elif event is Event.UNREFERRED:
            self._summing.add(-num_bytes)

    def _end_phase(self) -> None:
        if self._phase != _NONE:
            assert self._phase not in self.phases, f"{self._phase} begins twice"
            self.phases[self._phase] = PhaseMemory(
                self._keep.rise,
                self._summing.rise,
                self._collecting.rise,
                self._unsaved.rise,
                self._keep.now - self._keep.begin,
                self._complete_bytes,
                self._made_bytes,
                self._selective.rise,
                self._fresh,
            )
        self.lasting.extend(self._born.values())
        self._born = {}
        self._collecting.add(-self._complete_bytes)
        self._complete_bytes = self._made_bytes = 0
        self._fresh = Fresh()
        for level in self._all:
            level.start(0 if level in self._from_zero else None)
