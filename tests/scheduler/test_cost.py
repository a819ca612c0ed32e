"""Seconds of actions from figures, by hand."""

from dataclasses import replace

import pytest
from steps import PAGE, chain, plan_of

from outgrow.parallel.actions import Action
from outgrow.scheduler.cost import Costs, TimeProfile, UnitSeconds
from outgrow.scheduler.hardware import DiskFigures, Hardware, NetFigures, Transfers
from outgrow.scheduler.passes import compile_program
from outgrow.scheduler.plan import Activations, MicroBatchOrder, Plan, UpdateTime
from outgrow.scheduler.program import Instruction, Lane, Program
from outgrow.scheduler.simulate import simulate

TWO = chain((0,), (1,))
DISK = DiskFigures(
    Transfers(4 * PAGE, 0.125, 1.5, 0.25), Transfers(2 * PAGE, 0.125, 2.0, 0.125), Transfers(PAGE, 0.25, 1.5, 0.5), 1.25
)
NET = NetFigures(8 * PAGE, 0.25, 4 * PAGE, 0.5)
MACHINE = Hardware("here", 2, 16 * PAGE, 32 * PAGE, 1024, 0.0, 0.125, 0.0, 0.0, DISK, NET)
PROFILE = TimeProfile((UnitSeconds(1.0, 2.0, 0.5, 0.75), UnitSeconds(4.0, 8.0, 3.0, 3.5)), 0.5, 0.25)


def seconds(
    action: str, plan: Plan | None = None, lane: Lane = Lane.COMPUTE, num_bytes: int = 0, **words: object
) -> float:
    costs = Costs(TWO, plan or plan_of(TWO), PROFILE, MACHINE, (2048, 1024), **words)  # pyright: ignore[reportArgumentType]
    return costs(Instruction(Action.parse(action), lane, (), num_bytes)).seconds


def test_units_with_the_loss_in_the_last_forward() -> None:
    assert seconds("F0.0") == 1.0
    assert seconds("F1.0") == 4.75
    assert seconds("B1.0") == 8.0
    assert seconds("I1.0") == 5.0
    assert seconds("W1.0") == 3.0


def test_later_micro_batches_add_to_the_gradients_of_earlier_ones() -> None:
    summed_s = PAGE / (32 * PAGE)
    assert seconds("B1.3") == 8.0 + summed_s
    assert seconds("W1.3") == 3.0 + summed_s
    assert seconds("I1.3") == 5.0
    assert seconds("B1.3", plan_of(TWO, ranks=2)) == 8.0, "REDUCE does it"


def test_turns_take_longer_and_are_handed_over() -> None:
    times = replace(PROFILE, in_turns=1.5)
    by_unit = replace(plan_of(TWO), order=MicroBatchOrder.BY_UNIT, micro_batches=2)
    costs = Costs(TWO, by_unit, times, MACHINE, (2048, 1024))
    forward = Instruction(Action.parse("F0.0"), Lane.COMPUTE)
    assert costs(forward).seconds == 1.5 + 0.125
    assert replace(costs, plan=replace(by_unit, micro_batches=1))(forward).seconds == 1.0, "there is one"
    assert replace(costs, plan=replace(by_unit, order=MicroBatchOrder.SEQUENTIAL))(forward).seconds == 1.0
    with pytest.raises(ValueError, match=r"not 0\.5 of that"):
        replace(times, in_turns=0.5)


def test_recomputing_comes_with_the_backward() -> None:
    plan = replace(plan_of(TWO), activations=(Activations.RECOMPUTE, Activations.KEEP))
    assert seconds("B0.0", plan) == 2.75
    assert seconds("B1.0", plan) == 8.0


def test_recomputing_selectively_takes_what_was_measured_of_it() -> None:
    plan = replace(plan_of(TWO), activations=(Activations.SELECTIVE, Activations.SELECTIVE))
    assert seconds("B0.0", plan) == 2.75, "not measured: as much as all of it"
    units = tuple(replace(unit, selective_s=0.25) for unit in PROFILE.units)
    costs = Costs(TWO, plan, replace(PROFILE, units=units), MACHINE, (2048, 1024))
    assert costs(Instruction(Action.parse("B0.0"), Lane.COMPUTE)).seconds == 2.25
    assert costs(Instruction(Action.parse("I1.0"), Lane.COMPUTE)).seconds == 5.25
    with pytest.raises(ValueError, match="cannot be negative"):
        replace(units[0], selective_s=-1.0)


def test_the_disk() -> None:
    assert seconds("READ c0:param", lane=Lane.READ, num_bytes=PAGE) == 0.125 + 0.25
    assert seconds("READ c0:param", lane=Lane.READ) == 0, "it is there already"
    assert seconds("WRITE c0:param", lane=Lane.WRITE, num_bytes=PAGE) == 0.125 + 0.5
    assert seconds("SAVE a0.0", lane=Lane.WRITE, num_bytes=PAGE) == 0.25 + 1.0, "with its copy"
    assert seconds("LOAD a0.0", lane=Lane.READ, num_bytes=PAGE) == 0.125 + 0.25


def test_an_update_has_a_call_its_elements_and_in_the_backward_pass_a_norm() -> None:
    after, backward = (replace(plan_of(TWO), update=time) for time in (UpdateTime.AFTER, UpdateTime.BACKWARD))
    calls = replace(MACHINE, update_latency_s=0.5)

    def of(plan: Plan) -> float:
        costs = Costs(TWO, plan, PROFILE, calls, (2048, 1024))
        return costs(Instruction(Action.parse("STEP c0"), Lane.COMPUTE)).seconds

    assert of(after) == 0.5 + 2048 / 1024
    assert of(backward) == 0.5 + 2048 / 1024 + 4 * 2048 / (16 * PAGE)
    assert of(replace(plan_of(TWO, ranks=2), update=UpdateTime.BACKWARD)) == 0.5 + 2.0, "sums know theirs"


def test_exchange_updates_and_the_norm() -> None:
    two = plan_of(TWO, ranks=2)
    assert seconds("GATHER c0.0", two, Lane.NET, PAGE) == 0.25 + 0.125
    assert seconds("GATHER c0.0", two, Lane.NET, PAGE, shares_parameters=True) == 0.25 + 0.125, "they come from a disk"
    on_host = plan_of(TWO, "optimizer", ranks=2)
    assert seconds("GATHER c0.0", on_host, Lane.NET, PAGE, shares_parameters=True) == 0
    assert seconds("REDUCE c0.0", two, Lane.NET, PAGE) == 0.5 + 0.25
    assert seconds("REDUCE c0.0", num_bytes=PAGE) == PAGE / (32 * PAGE)
    assert seconds("STEP c0") == 2.0
    assert seconds("NORM") == 4 * 3072 / (16 * PAGE)
    assert seconds("NORM", plan_of(TWO, update="backward")) == 0
    assert seconds("NORM", plan_of(TWO, clips=True)) == 2 * 4 * 3072 / (16 * PAGE)
    assert seconds("DROP c0:param") == 0


def test_an_exchange_gives_way_to_computing_and_slows_it() -> None:
    reduce = Instruction(Action.parse("REDUCE c0.0"), Lane.NET, (), PAGE)
    machine = replace(MACHINE, net=replace(NET, cores_share=0.5))
    costs = Costs(TWO, plan_of(TWO, ranks=2), PROFILE, machine, (2048, 1024))
    assert costs(reduce).shares == {"memory": 1.0, "cores": 0.5}
    program = Program((Instruction(Action.parse("B0.0"), Lane.COMPUTE), reduce))
    alone_s = simulate(Program((reduce,)), costs).seconds
    assert alone_s == 0.75, "as it was measured, beside computing"
    assert simulate(program, costs).seconds == pytest.approx(2.0 + 0.75 / 1.5 * 0.5)


def test_what_was_not_measured_is_named() -> None:
    costs = Costs(TWO, plan_of(TWO), PROFILE, replace(MACHINE, disk=None), (1, 1))
    with pytest.raises(ValueError, match="READ c0:param: no disk was measured"):
        costs(Instruction(Action.parse("READ c0:param"), Lane.READ, (), PAGE))


def test_reads_and_writes_slow_each_other_as_it_was_measured() -> None:
    plan = plan_of(TWO, update="backward", prefetch=1)
    program = compile_program(TWO, plan)
    none = TimeProfile((UnitSeconds(0, 0, 0, 0),) * 2)
    costs = Costs(TWO, plan, none, MACHINE, (0, 0))
    free = replace(DISK, both_capacity=2.0)
    apart = replace(costs, hardware=replace(MACHINE, disk=free))
    assert simulate(program, costs, costs.capacity).seconds > simulate(program, apart, apart.capacity).seconds


def test_a_lane_gives_way_to_computing_and_still_takes_its_part_of_the_cores() -> None:
    costs = Costs(TWO, plan_of(TWO), PROFILE, MACHINE, (1, 1))
    reading = Instruction(Action.parse("READ c0:param"), Lane.READ, (), PAGE)
    assert costs(reading).shares == {"disk": 1.0, "cores": 0.25}
    assert costs(reading).gives_way == {"cores": 1.5}
    assert costs(replace(reading, num_bytes=0)).shares == {}
    saving = costs(Instruction(Action.parse("SAVE a0.0"), Lane.WRITE, (), PAGE))
    assert (saving.shares["cores"], saving.gives_way["cores"]) == (0.5, 1.5)
    computing = Instruction(Action.parse("F0.0"), Lane.COMPUTE, ())
    computing_s, reading_s = (costs(each).seconds for each in (computing, reading))
    together = simulate(Program((computing, reading)), costs, costs.capacity)
    met_s = 1.5 * reading_s
    assert together.seconds == pytest.approx(met_s + computing_s - met_s / 1.25)
    spans = {span.lane: span.end_s for span in together.timeline.spans}
    assert spans["read"] == pytest.approx(met_s), "as it was measured, whatever else uses the cores"


def test_figures_of_a_machine_round_trip_and_are_checked() -> None:
    assert Hardware.from_json(MACHINE.to_json()) == MACHINE
    assert Hardware.from_json(replace(MACHINE, disk=None, net=None).to_json()).disk is None
    with pytest.raises(ValueError, match="no figures of a machine"):
        Hardware.from_json('{"name": "x"}')
    with pytest.raises(ValueError, match="copy_bytes_per_s=0"):
        replace(MACHINE, copy_bytes_per_s=0)
    with pytest.raises(ValueError, match="latency_s=-1"):
        replace(DISK.read, latency_s=-1)
    with pytest.raises(ValueError, match="no transfer is faster"):
        replace(DISK.read, beside=0.5)
    with pytest.raises(ValueError, match="two directions"):
        replace(DISK, both_capacity=3.0)


def test_offloading_takes_the_forward_what_handing_over_takes() -> None:
    units = tuple(replace(unit, offload_s=0.125) for unit in PROFILE.units)
    plan = replace(plan_of(TWO), activations=(Activations.OFFLOAD_DISK, Activations.RECOMPUTE))
    costs = Costs(TWO, plan, replace(PROFILE, units=units), MACHINE, (2048, 1024))
    assert costs(Instruction(Action.parse("F0.0"), Lane.COMPUTE)).seconds == 1.125
    assert costs(Instruction(Action.parse("F1.0"), Lane.COMPUTE)).seconds == 4.75, "its own, and the loss's"
    with pytest.raises(ValueError, match="cannot be negative"):
        replace(units[0], offload_s=-1.0)
