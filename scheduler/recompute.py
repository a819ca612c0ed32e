"""What is done with every unit's saved activations: keep, recompute or offload, the fastest that fits; exact.

Owns the choice for one micro-batch on its way through a chain of units, from bytes and seconds of each. Does not own
where these come from, nor whether a whole plan fits (`ledger.py`): a caller tries what is chosen here on that.

Units run forward 0, 1, ..., n-1 and backward n-1, ..., 0. While unit i runs, either way, what the units before it hold
is there: `saved_bytes` of one that keeps, `input_bytes` of one that recomputes, nothing of one that offloads; to it
comes the unit's own peak under its policy. Recomputing takes seconds before the backward. Offloading takes a lane:
a unit begins when all saves but the last are done, and a load overlaps with one unit's backward (ALGORITHMS 3.4).

The chain is walked once. Of two prefixes the one that holds no more, leaves no more behind on the lanes and took no
more seconds is as good whatever comes after, so the other is forgotten (dynamic programming over sets of states none of
which dominates another): the result is exact, without rounding bytes to slots, where states are not too many.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .plan import Activations

__all__ = ["Choice", "Piece", "choose_activations", "evaluate"]


@dataclass(frozen=True, slots=True)
class Piece:
    """One unit of the chain.

    Attributes:
        saved_bytes: held from forward to backward where it keeps.
        input_bytes: likewise where it recomputes.
        keep_peak_bytes: the most while it runs, either way, above what the units before it hold; likewise
            `recompute_peak_bytes` and `offload_peak_bytes`.
        forward_s, backward_s: of the unit.
        recompute_s: what recomputing adds.
        save_s, load_s: of its activations to the far tier and back.
        selective_bytes, selective_peak_bytes, selective_s: as `input_bytes` and so on, where it recomputes selectively;
            None: that is not known, and not chosen.
    """

    saved_bytes: int
    input_bytes: int
    keep_peak_bytes: int
    recompute_peak_bytes: int
    offload_peak_bytes: int
    forward_s: float
    backward_s: float
    recompute_s: float
    save_s: float = 0.0
    load_s: float = 0.0
    selective_bytes: int | None = None
    selective_peak_bytes: int = 0
    selective_s: float = 0.0

    def allows(self, word: Activations) -> bool:
        """Whether enough is known to choose it."""
        return word is not Activations.SELECTIVE or self.selective_bytes is not None

    def held_bytes(self, word: Activations) -> int:
        """From forward to backward."""
        if word is Activations.KEEP:
            return self.saved_bytes
        if word is Activations.SELECTIVE:
            assert self.selective_bytes is not None, "what is not known is not chosen"
            return self.selective_bytes
        return self.input_bytes if word is Activations.RECOMPUTE else 0

    def peak_bytes(self, word: Activations) -> int:
        """While it runs."""
        if word is Activations.KEEP:
            return self.keep_peak_bytes
        if word is Activations.SELECTIVE:
            return self.selective_peak_bytes
        return self.recompute_peak_bytes if word is Activations.RECOMPUTE else self.offload_peak_bytes

    def again_s(self, word: Activations) -> float:
        """What runs again before its backward."""
        return {Activations.RECOMPUTE: self.recompute_s, Activations.SELECTIVE: self.selective_s}.get(word, 0.0)


@dataclass(frozen=True, slots=True)
class Choice:
    """Policies, and what they cost.

    Attributes:
        words: one for each unit.
        peak_bytes: the fullest moment.
        extra_s: seconds of recomputing and of waiting for the lanes.
    """

    words: tuple[Activations, ...]
    peak_bytes: int
    extra_s: float


@dataclass(frozen=True, slots=True)
class _State:
    """A prefix of the chain that was decided. In every field, less is better.

    Attributes:
        older_s: of saves that the next unit waits for; `saving_s`: of all saves that are not done.
        loading_s: of the load that overlaps with the next unit's backward.
    """

    held_bytes: int
    older_s: float
    saving_s: float
    loading_s: float
    extra_s: float
    peak_bytes: int
    words: tuple[Activations, ...]

    def dominates(self, other: "_State") -> bool:
        return (
            self.held_bytes <= other.held_bytes
            and self.extra_s <= other.extra_s
            and self.older_s <= other.older_s
            and self.saving_s <= other.saving_s
            and self.loading_s <= other.loading_s
            and self.peak_bytes <= other.peak_bytes
        )


def choose_activations(
    pieces: Sequence[Piece],
    budget_bytes: int,
    allowed: Collection[Activations] = (Activations.KEEP, Activations.RECOMPUTE),
    most_states: int = 4096,
) -> Choice | None:
    """The policies that take the fewest extra seconds within `budget_bytes`; of those, the least peak. None: none fit.

    Args:
        allowed: policies.
        most_states: of a prefix; where there are more (long chains of units that are all different), those of them that
            are spread evenly from the leanest to the fastest go on, and the result may be a little slower than need be.
    """
    words = [word for word in Activations if word in allowed]
    states = [_State(0, 0.0, 0.0, 0.0, 0.0, 0, ())]
    for piece in pieces:
        following = [_after(state, piece, word) for state in states for word in words if piece.allows(word)]
        states = _undominated([state for state in following if state.peak_bytes <= budget_bytes])
        if len(states) > most_states:
            states = [states[number * (len(states) - 1) // (most_states - 1)] for number in range(most_states)]
    ended = [(state.extra_s + state.loading_s, state.peak_bytes, index) for index, state in enumerate(states)]
    if not ended:
        return None
    extra_s, peak_bytes, index = min(ended)
    return Choice(states[index].words, peak_bytes, extra_s)


def evaluate(pieces: Sequence[Piece], words: Sequence[Activations]) -> Choice:
    """What given policies cost."""
    state = _State(0, 0.0, 0.0, 0.0, 0.0, 0, ())
    for piece, word in zip(pieces, words, strict=True):
        state = _after(state, piece, word)
    return Choice(state.words, state.peak_bytes, state.extra_s + state.loading_s)


def _after(state: _State, piece: Piece, word: Activations) -> _State:
    """One unit more."""
    saving_s = max(0.0, state.saving_s - state.older_s - piece.forward_s)  # it waits for the older ones, and runs
    older_s = loading_s = 0.0
    extra_s = state.extra_s + state.older_s + piece.again_s(word)
    backward_s = piece.backward_s + piece.again_s(word)
    if word.is_offloaded:
        older_s, saving_s, loading_s = saving_s, saving_s + piece.save_s, piece.load_s
    extra_s += max(0.0, state.loading_s - backward_s)  # the load of the unit before goes on meanwhile
    return _State(
        state.held_bytes + piece.held_bytes(word),
        older_s,
        saving_s,
        loading_s,
        extra_s,
        max(state.peak_bytes, state.held_bytes + piece.peak_bytes(word)),
        (*state.words, word),
    )


def _undominated(states: list[_State]) -> list[_State]:
    states.sort(key=lambda s: (s.held_bytes, s.extra_s, s.saving_s, s.older_s, s.loading_s, s.peak_bytes))
    kept: list[_State] = []
    for state in states:
        if not any(other.dominates(state) for other in kept):
            kept.append(state)
    return kept
