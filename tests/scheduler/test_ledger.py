"""The fullest moment of a program, for a chain that can be added up by hand."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
from chain import DEPTH, WEIGHT_BYTES, profile_of

from outgrow.parallel.actions import Kind
from outgrow.scheduler.ledger import HostFigures, Ledger, _fresh_shares, host_ledger
from outgrow.scheduler.memory_levels import Levels
from outgrow.scheduler.memory_profile import MemoryProfile
from outgrow.scheduler.passes import compile_program
from outgrow.scheduler.plan import Activations, ChunkPlan, Home, MicroBatchOrder, Plan, UpdateTime
from outgrow.scheduler.program import ChunkUse, StepShape, UnitUse

ON_DISK = ChunkPlan(parameter_home=Home.DISK, optimizer_home=Home.DISK)


@pytest.fixture(scope="module")
def profile() -> MemoryProfile:
    """Activations rule: the fullest moment is at the turn."""
    return profile_of(512)


@pytest.fixture(scope="module")
def small() -> MemoryProfile:
    """Gradients rule: the fullest moment is at the end."""
    return profile_of(4)


SHAPE = StepShape(
    tuple(UnitUse(str(number), (number,), True, number) for number in range(DEPTH)),
    tuple(ChunkUse(WEIGHT_BYTES, True, WEIGHT_BYTES, 2 * WEIGHT_BYTES) for _ in range(DEPTH)),
)


def ledger(
    profile: MemoryProfile, state: Mapping[int, int] | None = None, summed: bool = False, **plan: object
) -> Ledger:
    chunk = plan.pop("chunk", ChunkPlan())
    micro_batches = plan.pop("micro_batches", 1)
    ranks = plan.pop("ranks", 1)
    shape = plan.pop("shape", SHAPE)
    assert isinstance(shape, StepShape)
    whole = Plan(ranks, 0, micro_batches, "float32", False, 1, (chunk,) * DEPTH, **plan)  # pyright: ignore[reportArgumentType]
    figures = HostFigures(
        1000, state or {}, dict.fromkeys(range(DEPTH), WEIGHT_BYTES), 20, dict.fromkeys(range(DEPTH), 7), summed, 5
    )
    return host_ledger(compile_program(shape, whole), shape, whole, profile, figures)


def test_the_parts_add_up_to_the_peak(profile: MemoryProfile) -> None:
    found = ledger(profile, {0: 300, 1: 11})
    assert sum(found.parts.values()) == found.peak_bytes
    assert found.parts["state"] == 311
    assert found.parts["process"] == 1000 + profile.library_bytes
    assert found.parts["exchange"] == 20
    assert found.parts["reserve"] == 5
    assert found.parts["buffers"] == 0


def test_recomputing_takes_less_and_micro_batches_one_by_one_take_no_more_activations(profile: MemoryProfile) -> None:
    kept = ledger(profile)
    recomputed = ledger(profile, activations=(Activations.RECOMPUTE,) * DEPTH)
    assert recomputed.peak_bytes < kept.peak_bytes
    assert ledger(profile, micro_batches=3).parts["activations"] <= kept.parts["activations"]
    by_unit = ledger(profile, micro_batches=3, order=MicroBatchOrder.BY_UNIT)
    assert by_unit.peak_bytes > 2 * kept.peak_bytes - by_unit.parts["process"]


def test_gradients_of_one_chunk_at_a_time_where_updates_are_in_the_backward_pass(small: MemoryProfile) -> None:
    after = ledger(small)
    backward = ledger(small, update=UpdateTime.BACKWARD)
    assert after.parts["gradients"] == DEPTH * WEIGHT_BYTES
    assert backward.parts["gradients"] <= WEIGHT_BYTES


def test_sums_that_stay_from_step_to_step_count_from_the_first_action_on(profile: MemoryProfile) -> None:
    assert ledger(profile, summed=True).parts["gradients"] == DEPTH * WEIGHT_BYTES


def test_what_lies_on_disk_counts_by_the_arena(profile: MemoryProfile) -> None:
    found = ledger(profile, chunk=ON_DISK, update=UpdateTime.BACKWARD)
    assert found.parts["buffers"] > 0
    assert found.parts["buffers"] < DEPTH * 3 * WEIGHT_BYTES
    assert replace(found, parts={}).where.startswith(("F", "B", "STEP"))


def test_every_action_has_its_bytes_and_the_most_of_them_is_the_peak(small: MemoryProfile) -> None:
    found = ledger(small, micro_batches=2, update=UpdateTime.BACKWARD)
    plan = Plan(1, 0, 2, "float32", False, 1, (ChunkPlan(),) * DEPTH, update=UpdateTime.BACKWARD)
    instructions = compile_program(SHAPE, plan).instructions
    counted = [n for n, i in enumerate(instructions) if i.action.kind in (Kind.F, Kind.B, Kind.STEP)]
    assert [position for position, _ in found.levels] == counted
    peak = max(size for _, size in found.levels)
    assert peak == found.peak_bytes
    assert found.where == next(str(instructions[position].action) for position, size in found.levels if size == peak)


def test_where_freed_blocks_are_kept_all_that_a_phase_makes_counts(profile: MemoryProfile) -> None:
    returned, kept = ledger(profile), ledger(profile, keeps_freed=True)
    assert returned.growth_bytes == {}
    assert set(kept.growth_bytes) == {*profile.order, *(("STEP", chunk) for chunk in range(DEPTH))}
    assert kept.peak_bytes > returned.peak_bytes
    of_action = dict(returned.levels)
    assert all(num_bytes >= of_action[position] for position, num_bytes in kept.levels)
    by_unit = ledger(profile, keeps_freed=True, micro_batches=2, order=MicroBatchOrder.BY_UNIT)
    assert profile.library_bytes > 0
    more = {phase: profile.library_bytes if phase in profile.order else 0 for phase in kept.growth_bytes}
    assert {phase: size + more[phase] for phase, size in kept.growth_bytes.items()} == by_unit.growth_bytes


def test_activations_that_come_back_lie_in_the_arena_and_not_beside_it_too(profile: MemoryProfile) -> None:
    saved = [unit.saved_bytes for unit in profile.units]
    shape = replace(
        SHAPE, units=tuple(replace(use, saved_bytes=size) for use, size in zip(SHAPE.units, saved, strict=True))
    )
    words = (Activations.OFFLOAD_DISK,) * DEPTH
    stays, moves = ledger(profile, keeps_freed=True), ledger(profile, keeps_freed=True, shape=shape, activations=words)
    assert all(saved[run] > WEIGHT_BYTES // 100 for run in range(DEPTH))
    assert moves.parts["buffers"] >= max(saved)
    for run in range(DEPTH - 1):
        assert moves.growth_bytes["B", run] == stays.growth_bytes["B", run], "a backward pass makes what it did"


def test_what_other_lanes_make_meanwhile_is_announced_with_a_phase(profile: MemoryProfile) -> None:
    alone = ledger(profile, keeps_freed=True, update=UpdateTime.BACKWARD).growth_bytes
    two = ledger(profile, keeps_freed=True, update=UpdateTime.BACKWARD, ranks=2).growth_bytes
    sums = {phase: size - alone[phase] for phase, size in two.items()}
    assert sums["B", DEPTH - 1] == WEIGHT_BYTES, "its own"
    assert all(sums["B", run] == 2 * WEIGHT_BYTES for run in range(DEPTH - 1)), "and that of the action before it"
    assert sums["F", 0] == 0, "there is no micro-batch before this one"
    again = ledger(profile, keeps_freed=True, update=UpdateTime.BACKWARD, ranks=2, micro_batches=2).growth_bytes
    assert again["F", 0] - alone["F", 0] == again["before", 0] - alone["before", 0] == 2 * WEIGHT_BYTES
    after = ledger(profile, keeps_freed=True, ranks=2, micro_batches=2, summed=True).growth_bytes
    assert after == alone, "sums that stay are there"


def test_gradients_that_an_exchange_has_not_taken_yet_count(profile: MemoryProfile) -> None:
    def passes(**plan: object) -> list[int]:
        found = ledger(profile, micro_batches=2, **plan)
        return [size for _, size in found.levels if size][: 4 * DEPTH]

    waiting = [two - one for one, two in zip(passes(), passes(ranks=2), strict=True)]
    forward, backward = waiting[:DEPTH], waiting[DEPTH : 2 * DEPTH]
    assert forward == [0] * DEPTH
    assert backward == [0] + [WEIGHT_BYTES] * (DEPTH - 1), "those of the action before it"
    assert waiting[2 * DEPTH : 3 * DEPTH] == [2 * WEIGHT_BYTES] * DEPTH, "a forward action waits for no exchange"
    assert passes(ranks=2, unified=False) == passes(unified=False), "from a device they go to buffers that are counted"


def test_a_heap_that_has_room_makes_no_fresh_pages_and_one_that_has_none_every_time() -> None:
    """One unit that holds nothing between its passes: 10 bytes rise and 20 made forward, 20 and 40 backward."""
    order = (("F", 0), ("B", 0))
    levels = Levels(order, (0, 0), (10, 20), (10, 20), (20, 40))
    begun = [(phase, 100) for phase in order * 4]
    growth = {order[0]: 20, order[1]: 40}
    wide = _fresh_shares(begun, levels, growth, 200)
    assert wide == {order[0]: 0, order[1]: 0}, "10 of 20, then 10 more of 40 in the first step, and never again"
    narrow = _fresh_shares(begun, levels, growth, 140)  # less than the backward pass may need
    assert narrow[order[1]] == 0.5, "all that it rises by, each time"
    assert narrow[order[0]] == 0, "forward finds what backward has left"
    assert _fresh_shares(begun, levels, growth, 100)[order[0]] == 0.5, "and nothing where there is no room at all"


def test_fresh_pages_are_told_where_freed_blocks_are_kept(profile: MemoryProfile) -> None:
    assert ledger(profile).fresh_shares == {}
    shares = ledger(profile, keeps_freed=True).fresh_shares
    assert set(shares) == {phase for phase in profile.order if phase[0] in ("F", "B")}
    assert all(0 <= share <= 1 for share in shares.values())
    assert max(shares.values()) > 0, "it was given what it needs, and not what it makes"
