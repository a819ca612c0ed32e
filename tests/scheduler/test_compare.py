"""Predicted against measured, for two timelines that can be added up by hand."""

import random

import pytest
from steps import random_plan, random_shape

from outgrow.memory.timeline import Span, Timeline
from outgrow.parallel.actions import Kind
from outgrow.scheduler.compare import WORDS, Pair, compare, stalled_s
from outgrow.scheduler.passes import compile_program
from outgrow.scheduler.simulate import Work, simulate

PREDICTED = Timeline(
    (
        Span("read", "READ c0:param", 0.0, 1.0, 100),
        Span("compute", "F0.0", 1.0, 2.0),
        Span("read", "READ c1:param", 1.0, 2.0, 100),
        Span("compute", "F1.0", 2.0, 3.0),
        Span("compute", "B1.0", 3.0, 5.0),
        Span("compute", "B0.0", 5.0, 7.0),
        Span("compute", "STEP c0", 7.0, 7.5),
    )
)
MEASURED = Timeline(
    (
        Span("read", "READ c0:param", 0.0, 2.0, 100),
        Span("compute", "F0.0", 2.0, 3.0),
        Span("read", "READ c1:param", 2.0, 4.5, 100),
        Span("compute", "F1.0", 4.5, 5.5),
        Span("compute", "B1.0", 5.5, 9.5),
        Span("compute", "B0.0", 9.5, 11.0),
        Span("write", "WRITE c0:param", 11.0, 11.25, 60),
    )
)


def test_lanes_are_held_against_each_other() -> None:
    found = compare(PREDICTED, MEASURED)
    assert found.step == Pair(7.5, 11.25)
    compute, read, write = found.lanes
    assert (compute.lane, read.lane, write.lane) == ("compute", "read", "write")
    assert compute.busy == Pair(6.5, 7.5)
    assert compute.stalled == Pair(1.0, 3.5)
    assert read.busy == Pair(2.0, 4.5)
    assert read.stalled == Pair(0.0, 0.0)
    assert read.num_bytes == 200
    assert write.busy == Pair(0.0, 0.25)
    assert write.num_bytes == 60


def test_units_are_held_against_each_other_by_name() -> None:
    found = compare(PREDICTED, MEASURED, ["embed"])
    assert [(unit.run, unit.name) for unit in found.units] == [(0, "embed"), (1, "unit 1")]
    assert found.units[0].forward == Pair(1.0, 1.0)
    assert found.units[0].backward == Pair(2.0, 1.5)
    assert found.units[1].backward == Pair(2.0, 4.0)


def test_parts_of_a_backward_count_as_backward_and_micro_batches_add_up() -> None:
    parts = Timeline(
        tuple(
            Span("compute", word, n, n + 1) for n, word in enumerate(("F0.0", "F0.1", "R0.0", "I0.0", "W0.0", "B0.1"))
        )
    )
    (unit,) = compare(parts, Timeline(())).units
    assert unit.forward == Pair(2.0, 0.0)
    assert unit.backward == Pair(4.0, 0.0)


def test_kinds_of_actions_come_in_the_order_of_the_vocabulary() -> None:
    found = compare(PREDICTED, MEASURED)
    assert list(found.kinds) == [Kind.F, Kind.B, Kind.STEP, Kind.READ, Kind.WRITE]
    assert found.kinds[Kind.READ] == Pair(2.0, 4.5)
    assert found.kinds[Kind.STEP] == Pair(0.5, 0.0)


def test_the_greatest_differences_are_named() -> None:
    found = compare(PREDICTED, MEASURED, ["embed", "head"])
    largest = [("disk reads", Pair(2.0, 4.5)), ("waiting of the compute lane", Pair(1.0, 3.5))]
    assert found.largest(2) == largest
    rest = ["backward of head", "backward of embed", "optimizer updates", "disk writes"]
    assert [name for name, _ in found.largest(9)] == [name for name, _ in largest] + rest
    assert compare(PREDICTED, PREDICTED).largest() == []


def test_a_pair_says_how_much_longer_it_took() -> None:
    assert Pair(2.0, 3.0).difference_s == 1.0
    assert Pair(2.0, 3.0).ratio == 1.5
    assert Pair(0.0, 3.0).ratio is None


def test_every_kind_has_words() -> None:
    assert set(WORDS) == set(Kind)
    assert len(set(WORDS.values())) == len(WORDS)


def test_the_sums_of_a_simulated_step_are_the_simulators_own() -> None:
    rng = random.Random(3)
    for _ in range(20):
        shape = random_shape(rng)
        program = compile_program(shape, random_plan(rng, shape))
        works = {instruction: Work(rng.random()) for instruction in program.instructions}
        found = simulate(program, works.__getitem__)
        for lane, waits in found.stalls_s.items():
            assert stalled_s(found.timeline, lane) == pytest.approx(sum(waits.values()))
        sums = compare(found.timeline, found.timeline)
        busy = sum(row.busy.measured_s for row in sums.lanes)
        assert sum(pair.predicted_s for pair in sums.kinds.values()) == pytest.approx(busy)
        compute = sum(pair.predicted_s for kind, pair in sums.kinds.items() if kind.is_compute)
        assert sum(u.forward.predicted_s + u.backward.predicted_s for u in sums.units) == pytest.approx(compute)
