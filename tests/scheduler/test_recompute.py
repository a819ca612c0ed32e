"""Policies for activations: equal to trying all of them, by a clock of its own."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outgrow.scheduler.plan import Activations
from outgrow.scheduler.recompute import Choice, Piece, choose_activations, evaluate

KEEP, RECOMPUTE, DISK = Activations.KEEP, Activations.RECOMPUTE, Activations.OFFLOAD_DISK
SELECTIVE = Activations.SELECTIVE


def random_chain(rng: random.Random, length: int) -> list[Piece]:
    kinds = [random_piece(rng) for _ in range(rng.randint(1, length))]
    return [rng.choice(kinds) for _ in range(length)]


def random_piece(rng: random.Random) -> Piece:
    saved = rng.randint(1, 20)
    peaks = [saved + rng.randint(0, 10) for _ in range(3)]
    return Piece(
        saved, rng.randint(0, saved), *peaks, rng.randint(1, 5), rng.randint(1, 9), rng.randint(0, 6),
        rng.randint(0, 9), rng.randint(0, 9), rng.choice((None, rng.randint(0, saved))), saved + rng.randint(0, 10),
        rng.randint(0, 6),
    )  # fmt: skip


def clocked(pieces: list[Piece], words: tuple[Activations, ...]) -> tuple[float, int]:
    """Extra seconds and the peak, by playing forward and backward on two lanes."""
    now, lane = 0.0, 0.0
    ends: list[float] = []  # of saves
    for piece, word in zip(pieces, words, strict=True):
        if len(ends) > 1:
            now = max(now, ends[-2])
        now += piece.forward_s
        if word is DISK:
            lane = max(lane, now) + piece.save_s
            ends.append(lane)
    extra = now - sum(piece.forward_s for piece in pieces)
    for index in reversed(range(len(pieces))):
        piece, word = pieces[index], words[index]
        if word is DISK:
            behind = index + 1
            hidden = 0.0
            if behind < len(pieces):
                hidden = pieces[behind].backward_s + again(pieces[behind], words[behind])
            extra += max(0.0, piece.load_s - hidden)
        extra += again(piece, word)
    held, peak = 0, 0
    for piece, word in zip(pieces, words, strict=True):
        own = {KEEP: piece.keep_peak_bytes, RECOMPUTE: piece.recompute_peak_bytes, DISK: piece.offload_peak_bytes}
        own[SELECTIVE] = piece.selective_peak_bytes
        peak = max(peak, held + own[word])
        after = {KEEP: piece.saved_bytes, RECOMPUTE: piece.input_bytes, DISK: 0, SELECTIVE: piece.selective_bytes}
        held += after[word] or 0
    return extra, peak


def again(piece: Piece, word: Activations) -> float:
    return (word is RECOMPUTE) * piece.recompute_s + (word is SELECTIVE) * piece.selective_s


def tried(pieces: list[Piece], budget: int, allowed: tuple[Activations, ...]) -> tuple[float, int] | None:
    known = [[w for w in allowed if w is not SELECTIVE or piece.selective_bytes is not None] for piece in pieces]
    found = (clocked(pieces, words) for words in itertools.product(*known))
    return min((each for each in found if each[1] <= budget), default=None)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_equal_to_trying_all(seed: int) -> None:
    rng = random.Random(seed)
    two = ((KEEP, RECOMPUTE), (KEEP, DISK))
    allowed = rng.choice((*two, (KEEP, RECOMPUTE, DISK), (KEEP, RECOMPUTE, SELECTIVE), (KEEP, SELECTIVE, DISK)))
    pieces = random_chain(rng, rng.randint(1, 6))
    budget = rng.randint(1, 20 * len(pieces))
    check(pieces, budget, allowed)


@pytest.mark.parametrize("seed", range(4))
def test_equal_to_trying_all_on_ten_units(seed: int) -> None:
    rng = random.Random(seed)
    pieces = random_chain(rng, 10)
    check(pieces, rng.randint(40, 120), (KEEP, RECOMPUTE))


def check(pieces: list[Piece], budget: int, allowed: tuple[Activations, ...]) -> None:
    found = choose_activations(pieces, budget, allowed)
    best = tried(pieces, budget, allowed)
    if best is None:
        assert found is None
        return
    assert found is not None
    assert (found.extra_s, found.peak_bytes) == best
    assert clocked(pieces, found.words) == best
    assert evaluate(pieces, found.words) == found


BLOCK = Piece(10, 2, 14, 16, 14, 1.0, 2.0, 1.0, 4.0, 4.0)


def test_what_fits_is_kept_and_more_memory_is_never_slower() -> None:
    chain = [BLOCK] * 8
    assert choose_activations(chain, 1000) == Choice((KEEP,) * 8, 84, 0.0)
    costs = [found.extra_s for budget in range(16, 90) if (found := choose_activations(chain, budget)) is not None]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[-1] == 0


def test_cheap_bytes_are_recomputed_first_unlike_every_second_unit() -> None:
    cheap = Piece(10, 2, 14, 16, 14, 1.0, 2.0, 0.25)
    chain = [BLOCK, cheap] * 4
    found = choose_activations(chain, 60)
    assert found is not None
    assert found.extra_s == pytest.approx(0.75)
    assert all(word is KEEP for word in found.words[::2])


def test_selective_recomputation_is_chosen_where_it_is_enough() -> None:
    block = Piece(16, 1, 20, 21, 20, 1.0, 2.0, 1.0, selective_bytes=11, selective_peak_bytes=20, selective_s=0.25)
    assert choose_activations([block] * 4, 60, (KEEP, RECOMPUTE)) == Choice((RECOMPUTE, KEEP, KEEP, KEEP), 53, 1.0)
    found = choose_activations([block] * 4, 60, (KEEP, RECOMPUTE, SELECTIVE))
    assert found is not None
    assert (found.extra_s, found.words.count(SELECTIVE)) == (0.5, 2)


def test_nothing_fits() -> None:
    assert choose_activations([BLOCK], 13) is None
    assert choose_activations([], 0) == Choice((), 0, 0.0)


def test_with_few_states_the_result_fits_and_is_hardly_slower() -> None:
    rng = random.Random(5)
    chain = [random_piece(rng) for _ in range(20)]
    exact, quick = choose_activations(chain, 200), choose_activations(chain, 200, most_states=100)
    assert exact is not None
    assert quick is not None
    assert quick.peak_bytes <= 200
    assert exact.extra_s <= quick.extra_s <= 2 * exact.extra_s


def test_forty_blocks_of_one_kind_are_quick() -> None:
    found = choose_activations([BLOCK] * 40, 220, (KEEP, RECOMPUTE, DISK))
    assert found is not None
    assert found.peak_bytes <= 220
