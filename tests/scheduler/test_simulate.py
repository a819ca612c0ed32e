"""Programs on a clock: by hand, against bounds that no schedule can pass, and with shared resources."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import chain, plan_of, random_plan, random_shape

from outgrow.parallel.actions import Kind
from outgrow.scheduler.happens import Order
from outgrow.scheduler.passes import compile_program
from outgrow.scheduler.program import Instruction, Lane, Program
from outgrow.scheduler.simulate import Change, Work, simulate, simulated_seconds


def program(text: str) -> Program:
    """Lane, action and positions that are waited for, one instruction a line."""
    lines = [line.split(" <- ") for line in text.strip().splitlines()]
    whole = (f"{n} {words[0].strip()} 0 <- {words[1] if len(words) > 1 else '-'}" for n, words in enumerate(lines))
    return Program.parse("\n".join(whole))


SMALL = program("""read READ c0:param
    read READ c1:param
    compute F0.0 <- 0
    compute F1.0 <- 1
    compute B1.0
    write WRITE c1:param <- 4""")
SECONDS = {Kind.READ: 2.0, Kind.F: 1.0, Kind.B: 3.0, Kind.WRITE: 1.0}


def cost(instruction: Instruction) -> Work:
    return Work(SECONDS[instruction.action.kind])


def test_lanes_overlap_and_waits_have_a_reason() -> None:
    found = simulate(SMALL, cost)
    assert [(span.action, span.start_s, span.end_s) for span in found.timeline.spans] == [
        ("READ c0:param", 0, 2),
        ("F0.0", 2, 3),
        ("READ c1:param", 2, 4),
        ("F1.0", 4, 5),
        ("B1.0", 5, 8),
        ("WRITE c1:param", 8, 9),
    ]
    assert found.seconds == 9
    assert found.stalls_s["compute"] == {"READ c0:param": 2, "READ c1:param": 1}
    assert found.stalls_s["write"] == {"B1.0": 8}
    assert found.stalls_s["read"] == {}


def test_a_shared_resource_slows_all_its_users_in_proportion() -> None:
    both = program("read READ c0:param\nwrite WRITE c1:param")
    shares = {"disk": 1.0}

    def seconds(capacity: float) -> list[float]:
        found = simulate(both, lambda _: Work(2.0, shares), lambda _, users: capacity if users > 1 else 1.0)
        return [span.end_s for span in found.timeline.spans]

    assert seconds(2.0) == [2, 2]
    assert seconds(1.0) == [4, 4]
    assert seconds(1.25) == pytest.approx([3.2, 3.2])


def test_what_is_left_goes_on_at_full_speed_when_the_other_ends() -> None:
    both = program("read READ c0:param\nwrite WRITE c1:param")
    found = simulate(both, lambda i: Work(1.0 if i.lane is Lane.READ else 3.0, {"disk": 1.0}))
    assert [span.end_s for span in found.timeline.spans] == pytest.approx([2, 4])


def test_bytes_come_and_go() -> None:
    changes = {0: [Change("host", 5)], 1: [Change("host", 7)], 2: [Change("host", 0, -5)], 5: [Change("host", 0, -7)]}
    found = simulate(SMALL, cost, changes=changes, begin_bytes={"host": 100})
    assert found.held_bytes["host"] == ((0, 100), (0, 105), (2, 112), (3, 107), (9, 100))
    assert found.timeline.peak_bytes == {"host": 112}


def test_work_cannot_be_negative() -> None:
    with pytest.raises(ValueError, match="cannot be negative"):
        Work(-1.0)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_every_rule_holds_for_random_programs(seed: int) -> None:
    rng = random.Random(seed)
    shape = random_shape(rng)
    compiled = compile_program(shape, random_plan(rng, shape))
    works = {i: Work(rng.choice((0.0, rng.random())), {"x": rng.random()}) for i in compiled.instructions}
    found = simulate(compiled, works.__getitem__)
    assert simulated_seconds(compiled, works.__getitem__) == found.seconds
    slower = simulate(compiled, lambda i: Work(2 * works[i].seconds, works[i].shares))
    assert slower.seconds == pytest.approx(2 * found.seconds)
    spans = {}
    for lane, order in compiled.by_lane.items():
        mine = [span for span in found.timeline.spans if span.lane == lane]
        assert sorted(span.action for span in mine) == sorted(str(compiled.instructions[p].action) for p in order)
        spans |= dict(zip(order, mine, strict=True))
    order = Order(compiled)
    for second in spans:
        for first in spans:
            if order.is_before(first, second):
                assert spans[first].end_s <= spans[second].start_s + 1e-9
    busiest = max(sum(works[compiled.instructions[p]].seconds for p in o) for o in compiled.by_lane.values())
    assert busiest <= found.seconds + 1e-9
    total = sum(works[i].seconds for i in compiled.instructions)
    assert found.seconds <= total * len(compiled.by_lane) + 1e-9
    for lane, waits in found.stalls_s.items():
        last = max((span.end_s for span in found.timeline.spans if span.lane == lane), default=0.0)
        assert sum(waits.values()) + found.timeline.busy_s(lane) == pytest.approx(last)


def test_a_faster_disk_never_makes_a_step_longer_on_these_chains() -> None:
    shape = chain((0,), (1,), (2,))
    for prefetch in (0, 1, 2):
        compiled = compile_program(shape, plan_of(shape, update="backward", prefetch=prefetch))
        times = []
        for disk_s in (4.0, 2.0, 1.0, 0.0):
            times.append(
                simulate(
                    compiled, lambda i, s=disk_s: Work(s if i.action.kind in (Kind.READ, Kind.WRITE) else 1.0)
                ).seconds
            )
        assert times == sorted(times, reverse=True)
