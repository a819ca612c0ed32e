"""The search: the fastest that fits, every candidate's fate, and what is fixed stays."""

from dataclasses import replace

import pytest
from by_hand import EVERYTHING, NUM_UNITS, PLAN, assess

from outgrow.memory.errors import DoesNotFit
from outgrow.parallel.actions import Action, Kind
from outgrow.scheduler.assessment import Assessment, Open, describe
from outgrow.scheduler.ledger import Ledger
from outgrow.scheduler.plan import (
    Activations,
    ChunkPlan,
    GatheredFor,
    Home,
    MicroBatchOrder,
    Plan,
    UpdateTime,
    plan_for_zero,
    with_zero,
)
from outgrow.scheduler.program import Buffer, Instruction, Lane, Program
from outgrow.scheduler.search import Found, search

NOTHING = Open(homes=False, activations=False, order=False, update=False)


def predict(found: Assessment) -> float:
    """Seconds by hand: what is on disk takes 10 a chunk and slot, less the more is read ahead; recomputing 1 a unit."""
    plan = found.plan
    on_disk = sum((c.parameter_home is Home.DISK) + (c.optimizer_home is Home.DISK) for c in plan.chunks)
    recomputed = sum(word is Activations.RECOMPUTE for word in plan.activations)
    return 100 + 10 * on_disk / (1 + plan.prefetch) + recomputed + (plan.order is MicroBatchOrder.BY_UNIT)


def found(budget: int, plan: Plan = PLAN, open_: Open = EVERYTHING, **words: object) -> Found:
    return search(plan, open_, NUM_UNITS, budget, assess, predict, **words)  # pyright: ignore[reportArgumentType]


def test_everything_in_memory_is_fastest_where_it_fits() -> None:
    best = found(740).best.plan
    assert not best.uses_disk
    assert not best.activations
    assert best.order is MicroBatchOrder.SEQUENTIAL


def test_recomputing_a_unit_is_cheaper_than_the_disk() -> None:
    best = found(670).best
    assert not best.plan.uses_disk
    assert best.plan.order is MicroBatchOrder.BY_UNIT
    assert best.plan.activations == (Activations.RECOMPUTE,) + (Activations.KEEP,) * 3
    assert best.ledger.peak_bytes <= 670


def test_what_must_go_to_disk_is_read_far_ahead() -> None:
    best = found(290).best.plan
    assert {(c.parameter_home, c.optimizer_home) for c in best.chunks} == {(Home.HOST, Home.DISK)}
    assert best.prefetch == 4


def test_no_candidate_that_fits_is_faster_and_every_fate_is_told() -> None:
    for budget in (100, 300, 500, 700):
        result = found(budget)
        seconds = [each.seconds for each in result.candidates if each.seconds is not None]
        assert seconds == sorted(seconds)
        assert result.seconds == predict(result.best)
        assert result.candidates[0].plan == result.best.plan
        assert result.candidates[0].fate == "chosen"
        for each in result.candidates[1:]:
            assert each.fate.startswith(("slower by", "refused:", "not tried"))
            assert each.fate.startswith("refused") == (each.peak_bytes > budget)
        plans = [each.plan for each in result.candidates]
        assert len(set(plans)) == len(plans)


def test_more_memory_is_not_slower_and_the_result_is_always_the_same() -> None:
    """But for what refining only the fastest few residencies can miss."""
    seconds = [found(budget).seconds for budget in range(40, 800, 20)]
    assert all(after <= 1.01 * min(seconds[: place + 1]) for place, after in enumerate(seconds[1:]))
    assert seconds[-1] == min(seconds)
    assert found(300) == found(300)


def test_the_exact_choice_of_activations_is_tried_with_the_room_that_there_is() -> None:
    asked: list[int] = []

    def activations(plan: Plan, room: int) -> tuple[Activations, ...]:
        asked.append(room)
        return (Activations.KEEP, Activations.RECOMPUTE, Activations.KEEP, Activations.KEEP)

    result = found(720, replace(PLAN), replace(EVERYTHING, order=False), activations=activations)
    tried = [each.plan.activations for each in result.candidates]
    assert (Activations.KEEP, Activations.RECOMPUTE, Activations.KEEP, Activations.KEEP) in tried
    assert asked[0] == 720 - 660


def test_of_plans_that_no_prediction_tells_apart_the_one_that_moves_least_is_taken() -> None:
    def moving(plan: Plan) -> Assessment:
        moved = 10 * sum(chunk.optimizer_home is Home.DISK for chunk in plan.chunks)
        read = Instruction(Action(Kind.READ, 0, slot="optim"), Lane.READ, (), moved)
        return replace(assess(plan), program=Program((read,)))

    def seconds(factor: float) -> Found:
        def predict(found: Assessment) -> float:
            return 1.0 if found.plan.uses_disk else factor

        return search(PLAN, replace(EVERYTHING, activations=False, order=False), NUM_UNITS, 2000, moving, predict)

    near = seconds(1.015)
    assert not near.best.plan.uses_disk
    assert near.seconds == 1.015
    assert near.candidates[1].fate == "faster by 1.5%, moves 40 B more"
    assert seconds(1.03).best.plan.uses_disk


def test_what_is_left_of_the_budget_brings_chunks_nearer() -> None:
    result = found(500)
    assert [c.optimizer_home for c in result.best.plan.chunks].count(Home.HOST) == 2
    assert result.best.ledger.peak_bytes == 480
    assert found(579).best.ledger.peak_bytes <= 579


def test_what_is_left_of_the_budget_keeps_parameters_in_memory() -> None:
    mebibyte = 1 << 20
    on_disk = replace(PLAN, chunks=tuple(replace(c, parameter_home=Home.DISK) for c in PLAN.chunks))

    def scaled(plan: Plan) -> Assessment:
        buffers = max(100 * mebibyte, plan.cache_bytes)
        program = Program((), (Buffer("b", "host", 0, buffers),))
        return Assessment(plan, program, Ledger(buffers, "F0.0", {"buffers": buffers}))

    result = search(
        on_disk, NOTHING, NUM_UNITS, 300 * mebibyte, scaled, lambda found: 9 - found.plan.cache_bytes / (100 * mebibyte)
    )
    assert 250 * mebibyte < result.best.ledger.peak_bytes <= 300 * mebibyte


def test_what_does_not_fit_far_ahead_is_read_as_far_as_it_fits() -> None:
    mebibyte = 1 << 20
    on_disk = replace(PLAN, chunks=tuple(replace(c, parameter_home=Home.DISK) for c in PLAN.chunks), prefetch=0)

    def bounded(plan: Plan) -> Assessment:
        wanted = 100 * mebibyte * (1 + plan.prefetch)
        buffers = min(wanted, max(plan.cache_bytes, 100 * mebibyte)) if plan.cache_bytes else wanted
        program = Program((), (Buffer("b", "host", 0, buffers),))
        return Assessment(plan, program, Ledger(buffers, "F0.0", {"buffers": buffers}))

    result = search(on_disk, NOTHING, NUM_UNITS, 150 * mebibyte, bounded, lambda found: 9.0 - found.plan.prefetch)
    assert result.best.plan.prefetch == 4
    assert 100 * mebibyte < result.best.plan.cache_bytes <= 150 * mebibyte


def test_what_is_fixed_stays() -> None:
    fixed = replace(PLAN, activations=(Activations.KEEP,) * NUM_UNITS)
    for each in found(150, fixed, replace(EVERYTHING, activations=False)).candidates:
        assert each.plan.activations == fixed.activations
    assert [each.plan for each in found(740, PLAN, NOTHING).candidates] == [PLAN]
    clipping = replace(PLAN, clips_gradients=True)
    assert all(each.plan.update is UpdateTime.AFTER for each in found(300, clipping).candidates)


def test_a_refusal_names_the_leanest_plan_its_moment_and_what_is_missing() -> None:
    with pytest.raises(DoesNotFit) as caught:
        found(3)
    for words in ("host budget of 3 B", "needs 10 B", "7 B more", "B3.1", "4 units recomputed", "10 B buffers"):
        assert words in str(caught.value)
    with pytest.raises(DoesNotFit, match=r"Memory\(disk="):
        found(300, open_=replace(EVERYTHING, homes=False))


def test_a_device_with_memory_of_its_own_has_a_budget_of_its_own() -> None:
    apart = replace(PLAN, unified=False)

    def with_device(plan: Plan) -> Assessment:
        there = sum(150 for chunk in plan.chunks if chunk.parameter_home is Home.DEVICE)
        host = sum(150 for chunk in plan.chunks if chunk.parameter_home is Home.HOST)
        program = Program(())
        return Assessment(plan, program, Ledger(host, "F0.0", {}), Ledger(there + 10, "B1.0", {}))

    def seconds(found: Assessment) -> float:
        return 1.0 + sum(chunk.parameter_home is not Home.DEVICE for chunk in found.plan.chunks)

    def best(device: int, open_: Open = EVERYTHING) -> Found:
        return search(apart, open_, NUM_UNITS, 700, with_device, seconds, device_bytes=device)

    assert all(chunk.parameter_home is Home.DEVICE for chunk in best(610).best.plan.chunks)
    tight = best(600)
    assert sum(chunk.parameter_home is not Home.DEVICE for chunk in tight.best.plan.chunks) == 1, "three fit there"
    assert any(each.fate == "refused: 10 B too much on the device at B1.0" for each in tight.candidates)
    with pytest.raises(DoesNotFit, match=r"device budget of 5 B: the leanest needs 10 B, 5 B more, at B1\.0"):
        best(5, replace(EVERYTHING, disk=False))
    homes = {
        c.optimizer_home for each in best(600, replace(EVERYTHING, disk=False)).candidates for c in each.plan.chunks
    }
    assert Home.DISK not in homes


def test_a_plan_in_words() -> None:
    assert describe(PLAN) == "everything in memory, 0 units recomputed, 2 micro-batches sequential, updates after it"
    disk = ChunkPlan(parameter_home=Home.DISK, optimizer_home=Home.DISK)
    lean = replace(PLAN, chunks=(disk,) * 4, update=UpdateTime.BACKWARD, cache_bytes=1 << 20, micro_batches=1)
    words = "parameters and optimizer on disk, 0 units recomputed, updates in the backward pass, prefetch 1, "
    assert describe(lean) == words + "1.00 MiB for what moves"


ON_RANKS = with_zero(replace(PLAN, world_size=4), 3)
ZERO_ALONE = Open(homes=False, activations=False, order=False, update=False, zero=True)


def shared(seconds: dict[int, float], budget: int = 2000, open_: Open = ZERO_ALONE) -> Found:
    """A search on four ranks where ZeRO stages take these seconds, and 100 bytes less from each to the next."""

    def of(plan: Plan) -> Assessment:
        found = assess(plan)
        size = found.ledger.peak_bytes + 100 * (3 - plan.zero)
        return replace(found, ledger=Ledger(size, "B3.1", found.ledger.parts))

    return search(ON_RANKS, open_, NUM_UNITS, budget, of, lambda found: seconds[found.plan.zero])


def test_the_fastest_way_to_share_the_state_is_taken_and_all_have_a_fate() -> None:
    result = shared({0: 3.0, 1: 2.0, 2: 1.0, 3: 1.5})
    assert result.best.plan.zero == 2
    assert result.best.plan.chunks == plan_for_zero([None] * NUM_UNITS, 2, 4).chunks  # pyright: ignore[reportArgumentType]
    fates = {each.plan.zero: each.fate for each in reversed(result.candidates)}
    assert fates == {2: "chosen", 3: "slower by 50%", 1: "slower by 100%", 0: "slower by 200%"}
    copies = {each.plan.chunks[0].gathered_for for each in result.candidates if each.plan.zero == 3}
    assert copies == {GatheredFor.USE, GatheredFor.PASS}


def test_of_ways_to_share_that_are_alike_the_one_that_keeps_least_is_taken() -> None:
    result = shared({0: 1.0, 1: 0.995, 2: 0.99, 3: 1.0})
    assert result.best.plan.zero == 3
    assert "faster by 1.0%, no more than a prediction can tell" in {each.fate for each in result.candidates}


def test_a_way_to_share_that_does_not_fit_is_refused_and_one_that_is_given_stays() -> None:
    least = assess(ON_RANKS).ledger.peak_bytes
    result = shared({0: 1.0, 1: 1.0, 2: 1.0, 3: 9.0}, least + 150)
    assert result.best.plan.zero == 2
    refused = {each.plan.zero for each in result.candidates if each.fate.startswith("refused")}
    assert refused == {0, 1}
    fixed = shared({0: 1.0, 1: 1.0, 2: 1.0, 3: 9.0}, open_=NOTHING)
    assert {each.plan.zero for each in fixed.candidates} == {3}
