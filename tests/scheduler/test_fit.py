"""The order in which plans are tried, what is done with the rest of a budget, and the refusal."""

from dataclasses import replace

import pytest
from by_hand import EVERYTHING, NUM_UNITS, PLAN, assess

from outgrow.memory.errors import DoesNotFit
from outgrow.scheduler.assessment import Assessment, Open
from outgrow.scheduler.fit import choose
from outgrow.scheduler.ledger import Ledger
from outgrow.scheduler.plan import Activations, Home, MicroBatchOrder, Plan, UpdateTime
from outgrow.scheduler.program import Buffer, Program


def chosen(budget: int, plan: Plan = PLAN, open_: Open = EVERYTHING) -> Plan:
    return choose(plan, open_, NUM_UNITS, budget, assess).plan


def test_what_fits_stays_in_memory_as_it_is():
    assert chosen(740) == PLAN


def test_micro_batches_take_turns_before_anything_goes_to_disk():
    plan = chosen(700)
    assert plan.order is MicroBatchOrder.BY_UNIT
    assert not plan.uses_disk


def test_the_optimizer_goes_to_disk_before_the_parameters():
    plan = chosen(400)
    assert {(c.parameter_home, c.optimizer_home) for c in plan.chunks} == {(Home.HOST, Home.DISK)}
    assert plan.update is UpdateTime.BACKWARD
    assert not plan.activations


def test_units_are_recomputed_as_few_as_it_takes_and_the_first_ones():
    plan = chosen(70)
    assert {(c.parameter_home, c.optimizer_home) for c in plan.chunks} == {(Home.DISK, Home.DISK)}
    assert plan.activations == (Activations.RECOMPUTE,) * 2 + (Activations.KEEP,) * 2
    assert assess(plan).ledger.peak_bytes <= 70


def test_the_least_prefetch_comes_last():
    assert chosen(20).prefetch == 1
    assert chosen(10).prefetch == 0


def test_what_is_left_of_the_budget_keeps_parameters_in_memory():
    roomy = replace(PLAN, chunks=tuple(replace(c, parameter_home=Home.DISK) for c in PLAN.chunks))
    fixed = Open(homes=False, activations=False, order=False, update=False)
    mebibytes = 1 << 20

    def scaled(plan: Plan) -> Assessment:
        buffers = max(100 * mebibytes, plan.cache_bytes)
        program = Program((), (Buffer("b", "host", 0, buffers),))
        return Assessment(plan, program, Ledger(buffers, "F0.0", {"buffers": buffers}))

    found = choose(roomy, fixed, NUM_UNITS, 300 * mebibytes, scaled)
    assert 250 * mebibytes < found.ledger.peak_bytes <= 300 * mebibytes


def test_reads_come_as_far_ahead_as_the_budget_allows():
    """What is read ahead can be bounded: the arena takes a tenth more than the bound, and `least` at least."""
    on_disk = replace(PLAN, chunks=tuple(replace(c, parameter_home=Home.DISK) for c in PLAN.chunks))
    fixed = Open(homes=False, activations=False, order=False, update=False)
    mebibytes = 1 << 20

    def taken(plan: Plan, least: int) -> int:
        wanted = 100 * (1 + plan.prefetch)
        return wanted if not plan.cache_bytes else max(least, min(wanted, plan.cache_bytes * 11 // (10 * mebibytes)))

    def found(budget: int, least: int) -> Plan:
        def bounded(plan: Plan) -> Assessment:
            buffers = (taken(plan, least) if plan.prefetch else 100) * mebibytes
            program = Program((), (Buffer("b", "host", 0, buffers),))
            return Assessment(plan, program, Ledger(buffers, "F0.0", {"buffers": buffers}))

        plan = choose(on_disk, fixed, NUM_UNITS, budget * mebibytes, bounded).plan
        assert bounded(plan).ledger.peak_bytes <= budget * mebibytes
        return plan

    assert found(250, 100).prefetch == found(150, 100).prefetch == 2
    assert 100 < found(150, 100).cache_bytes // mebibytes <= 136
    assert (found(250, 300).prefetch, found(150, 300).prefetch) == (1, 0), "where no bound helps, all as it was"


def test_clipping_keeps_updates_after_the_backward_pass():
    clipping = replace(PLAN, clips_gradients=True)
    assert chosen(400, clipping).update is UpdateTime.AFTER


def test_what_is_fixed_stays():
    fixed = replace(PLAN, activations=(Activations.KEEP,) * NUM_UNITS)
    plan = chosen(130, fixed, replace(EVERYTHING, activations=False))
    assert plan.activations == fixed.activations
    with pytest.raises(DoesNotFit):
        chosen(70, fixed, replace(EVERYTHING, activations=False))


def test_a_refusal_names_the_leanest_plan_its_moment_and_what_is_missing():
    with pytest.raises(DoesNotFit) as caught:
        chosen(3)
    text = str(caught.value)
    for words in ("host budget of 3 B", "needs 10 B", "7 B more", "B3.1", "4 units recomputed", "10 B buffers"):
        assert words in text
    assert "Memory(disk=" not in text


def test_without_a_disk_the_refusal_says_so():
    with pytest.raises(DoesNotFit, match=r"Memory\(disk="):
        chosen(300, open_=replace(EVERYTHING, homes=False))


# ---- a device with memory of its own

APART = replace(PLAN, unified=False)


def assess_apart(plan: Plan) -> Assessment:
    """By hand, a chunk: 100 for slots and 50 for parameters where they are at home, 10 on the device otherwise; a unit:
    20 on the device where it is kept, 15 on the host where it is moved."""
    on_device = sum(150 if chunk.optimizer_home is Home.DEVICE else 10 for chunk in plan.chunks)
    on_host = sum(
        100 * (chunk.optimizer_home is Home.HOST) + 50 * (chunk.parameter_home is Home.HOST) for chunk in plan.chunks
    )
    words = [plan.activations_of(unit) for unit in range(NUM_UNITS)]
    kept = 20 * words.count(Activations.KEEP)
    moved = 15 * words.count(Activations.OFFLOAD_HOST)
    device = {"state": on_device, "activations": kept}
    host = {"state": on_host, "buffers": moved}
    return Assessment(
        plan, Program(()), Ledger(sum(host.values()), "STEP c0", host), Ledger(sum(device.values()), "B2.0", device)
    )


def chosen_apart(host: int, device: int, open_: Open = EVERYTHING) -> Plan:
    return choose(APART, open_, NUM_UNITS, host, assess_apart, device).plan


def homes(plan: Plan) -> list[tuple[str, str]]:
    return [(str(chunk.parameter_home), str(chunk.optimizer_home)) for chunk in plan.chunks]


def test_with_room_on_the_device_nothing_leaves_it():
    plan = chosen_apart(10, 680)
    assert homes(plan) == [("device", "device")] * 4
    assert not plan.activations


def test_as_many_chunks_as_fit_stay_on_the_device_and_the_others_on_the_host():
    plan = chosen_apart(1000, 120 + 280)
    assert homes(plan) == [("device", "device")] * 2 + [("host", "host")] * 2
    assert not plan.activations


def test_the_disk_comes_when_the_host_is_full_too():
    assert homes(chosen_apart(200, 120)) == [("host", "disk")] * 4
    assert homes(chosen_apart(20, 120)) == [("disk", "disk")] * 4
    with pytest.raises(DoesNotFit, match="no plan fits into the host budget"):
        chosen_apart(200, 120, replace(EVERYTHING, disk=False))


def test_activations_go_to_the_host_before_they_are_recomputed_and_as_few_as_it_takes():
    plan = chosen_apart(1000, 80)
    assert plan.activations == (Activations.OFFLOAD_HOST,) * 2 + (Activations.KEEP,) * 2
    plan = chosen_apart(20, 80)
    assert plan.activations == (Activations.RECOMPUTE,) * 2 + (Activations.KEEP,) * 2
    assert homes(plan) == [("disk", "disk")] * 4


def test_a_refusal_names_the_device():
    with pytest.raises(DoesNotFit, match=r"the device budget of 30 B: the leanest needs 40 B, 10 B more, at B2\.0"):
        chosen_apart(1000, 30)
