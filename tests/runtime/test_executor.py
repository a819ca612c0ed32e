"""The executor on hand-written programs: order, lanes, skipped work, spans."""

import threading
from collections.abc import Iterator

import pytest
from lanes import ONE_LANE, PATIENCE_S, Log, act, program, run

from outgrow.memory.errors import LaneTimeout, OutOfOrder
from outgrow.runtime.executor import Executor
from outgrow.scheduler.program import Program


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def executor(log: Log) -> Iterator[Executor]:
    with Executor(log.handlers(), deadline_s=PATIENCE_S) as executor:
        yield executor
        for gate in log.gates.values():
            gate.set()


def test_the_compute_lane_runs_what_lies_between(log, executor):
    executor.begin(
        program("compute GATHER c0.0", "compute F0.0", "compute DROP c0.0", "compute B0.0", "compute STEP c0")
    )
    assert log.done == []
    executor.advance_to(act("F0.0"))
    assert log.done == ["GATHER c0.0"]
    assert str(executor.running) == "F0.0"
    assert executor.active
    executor.advance_to(act("B0.0"))
    assert log.done == ["GATHER c0.0", "DROP c0.0"]
    executor.complete_micro_batch(0)
    assert executor.running is None
    timeline = executor.finish()
    assert log.done == ["GATHER c0.0", "DROP c0.0", "STEP c0"]
    assert [span.action for span in timeline.spans] == ["GATHER c0.0", "F0.0", "DROP c0.0", "B0.0", "STEP c0"]
    assert not executor.active
    assert executor.running is None
    assert set(log.threads.values()) == {threading.current_thread().name}


def test_other_lanes_set_off_at_once_and_in_their_order(log, executor):
    executor.begin(program("net GATHER c0.0", "net GATHER c1.0", "compute F0.0 <- 0, 1"))
    assert run(executor, "F0.0") == ["F0.0"]
    executor.finish()
    assert log.done == ["GATHER c0.0", "GATHER c1.0"]
    assert log.threads == {"GATHER c0.0": "lane-net", "GATHER c1.0": "lane-net"}


def test_compute_waits_for_another_lane_and_another_lane_for_compute(log, executor):
    gate = log.gate("GATHER c0.0")
    executor.begin(
        program("net GATHER c0.0", "compute F0.0 <- 0", "compute B0.0", "net REDUCE c0.0 <- 2", "compute STEP c0 <- 3")
    )
    assert log.started["GATHER c0.0"].wait(PATIENCE_S)
    came = threading.Event()
    order: list[str] = []

    def model() -> None:
        executor.advance_to(act("F0.0"))
        order.append("F0.0")
        came.set()

    thread = threading.Thread(target=model)
    thread.start()
    assert not order, "F0.0 may not start before its gather"
    order.append("the gate opens")
    gate.set()
    assert came.wait(PATIENCE_S)
    thread.join()
    assert order == ["the gate opens", "F0.0"]
    executor.advance_to(act("B0.0"))
    assert "REDUCE c0.0" not in log.done, "the reduction may not start while B0.0 runs"
    executor.complete_micro_batch(0)
    executor.finish()
    assert log.done == ["GATHER c0.0", "REDUCE c0.0", "STEP c0"]


def test_two_lanes_run_at_the_same_time(log, executor):
    first, second = log.gate("GATHER c0.0"), log.gate("READ c1:param")
    executor.begin(program("net GATHER c0.0", "read READ c1:param", "compute F0.0 <- 0, 1"))
    assert log.started["GATHER c0.0"].wait(PATIENCE_S)
    assert log.started["READ c1:param"].wait(PATIENCE_S), "a lane waits for another without a dependency"
    second.set()
    first.set()
    run(executor, "F0.0")
    executor.finish()
    assert sorted(log.threads.values()) == ["lane-net", "lane-read"]


def test_dependencies_hold_between_lanes_other_than_compute(log, executor):
    gate = log.gate("READ c0:param")
    executor.begin(program("read READ c0:param", "net GATHER c0 <- 0", "compute F0.0"))
    run(executor, "F0.0")
    assert log.started["READ c0:param"].wait(PATIENCE_S)
    assert log.done == []
    gate.set()
    executor.finish()
    assert log.done == ["READ c0:param", "GATHER c0"]


def test_the_step_ends_only_when_all_lanes_are_done(log, executor):
    gate = log.gate("WRITE c0:optim")
    executor.begin(program("compute F0.0", "write WRITE c0:optim <- 0"))
    run(executor, "F0.0")
    ended = threading.Event()
    thread = threading.Thread(target=lambda: (executor.finish(), ended.set()))
    thread.start()
    assert log.started["WRITE c0:optim"].wait(PATIENCE_S)
    assert not ended.is_set()
    gate.set()
    assert ended.wait(PATIENCE_S)
    thread.join()
    assert log.done == ["WRITE c0:optim"]


def test_backwards_that_no_gradient_reached_are_passed_over(log, executor):
    executor.begin(
        program(
            "compute F0.0",
            "compute F1.0",
            "compute B1.0",
            "net REDUCE c1.0 <- 2",
            "compute B0.0",
            "net REDUCE c0.0 <- 4",
        )
    )
    assert run(executor, "F0.0", "F1.0", "B0.0") == ["F0.0", "F1.0", "B0.0"]
    executor.complete_micro_batch(0)
    timeline = executor.finish()
    assert log.done == ["REDUCE c1.0", "REDUCE c0.0"], "what depends on a backward without gradient still runs"
    assert "B1.0" not in [span.action for span in timeline.spans]


def test_completing_a_micro_batch_passes_over_its_backwards_and_leaves_the_next_alone(executor):
    executor.begin(program("compute F0.0", "compute B0.0", "compute F0.1", "compute B0.1", "compute NORM"))
    run(executor, "F0.0")
    executor.complete_micro_batch(0)
    assert run(executor, "F0.1", "B0.1") == ["F0.1", "B0.1"]
    executor.complete_micro_batch(1)
    executor.finish()


def test_a_micro_batch_without_samples_does_everything_but_compute(log, executor):
    executor.begin(program(
        "net GATHER c0.0", "compute F0.0 <- 0", "compute DROP c0.0", "compute B0.0", "net REDUCE c0.0 <- 3",
        "compute F0.1", "compute B0.1", "compute STEP c0 <- 4",
    ))  # fmt: skip
    executor.skip_micro_batch(0)
    assert run(executor, "F0.1", "B0.1") == ["F0.1", "B0.1"]
    timeline = executor.finish()
    assert sorted(log.done) == ["DROP c0.0", "GATHER c0.0", "REDUCE c0.0", "STEP c0"]
    assert {span.action for span in timeline.spans} == {*log.done, "F0.1", "B0.1"}


def test_an_earlier_micro_batch_s_actions_are_run_before_a_later_one_is_skipped(log, executor):
    executor.begin(
        program("compute F0.0", "compute B0.0", "compute DROP c0.0", "compute F0.1", "compute B0.1", "compute NORM")
    )
    run(executor, "F0.0", "B0.0")
    executor.complete_micro_batch(0)
    executor.skip_micro_batch(1)
    executor.finish()
    assert log.done == ["DROP c0.0", "NORM"]


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (["F1.0"], "has F0.0 next, the model came to F1.0"),
        (["F0.0", "F0.0"], "has F1.0 next, the model came to F0.0"),
        (["F0.0", "B0.0"], "has F1.0 next, the model came to B0.0"),
        (["F0.0", "F1.0", "F2.0"], "has B1.0 next, the model came to F2.0"),
        (["F0.0", "F1.0", "B0.0", "B1.0"], "has no B1.0 left"),
        (["F0.1"], "has F0.0 next, the model came to F0.1"),
    ],
)
def test_another_order_is_an_error_that_names_both(executor, compute, message):
    executor.begin(ONE_LANE)
    with pytest.raises(OutOfOrder, match=message):
        run(executor, *compute)


def test_a_step_that_ends_before_its_forwards_is_an_error(executor):
    executor.begin(ONE_LANE)
    run(executor, "F0.0")
    with pytest.raises(OutOfOrder, match=r"has F1\.0 next, but the model's step is over"):
        executor.finish()


def test_lanes_that_a_program_does_not_use_do_not_end_its_step(log, executor):
    executor.begin(program("read READ c0:param", "h2d UP c0:param", "compute F0.0"))
    run(executor, "F0.0")
    executor.finish()
    gate = log.gate("GATHER c0.0")
    executor.begin(program("net GATHER c0.0", "compute F0.0"))
    run(executor, "F0.0")
    assert log.started["GATHER c0.0"].wait(PATIENCE_S)
    ended = threading.Event()
    thread = threading.Thread(target=lambda: (executor.finish(), ended.set()))
    thread.start()
    assert not ended.wait(0.05), "the step ended before its net lane"
    gate.set()
    assert ended.wait(PATIENCE_S)
    thread.join()


def threads_since(before: set[threading.Thread]) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread not in before]


def test_one_executor_runs_many_steps(log, executor):
    before = set(threading.enumerate())
    for step in range(20):
        executor.begin(
            program(f"net GATHER c{step}.0", "compute F0.0 <- 0", "compute B0.0", f"net REDUCE c{step}.0 <- 2")
        )
        run(executor, "F0.0", "B0.0")
        executor.complete_micro_batch(0)
        assert len(executor.finish().spans) == 4
    assert log.done == [text for step in range(20) for text in (f"GATHER c{step}.0", f"REDUCE c{step}.0")]
    assert [thread.name for thread in threads_since(before)] == ["lane-net"]


def test_spans_are_read_off_the_clock_from_the_begin_of_the_step(log):
    times = iter([100.0, 101.0, 102.5, 102.5, 104.0, 105.0, 107.0])
    with Executor(log.handlers(), clock=lambda: next(times)) as executor:
        executor.begin(program("compute GATHER c0.0", "compute F0.0", "compute STEP c0"))
        run(executor, "F0.0")
        timeline = executor.finish()
    found = [(span.lane, span.action, span.start_s, span.end_s, span.num_bytes) for span in timeline.spans]
    assert found == [
        ("compute", "GATHER c0.0", 1.0, 2.5, 7),
        ("compute", "F0.0", 2.5, 4.0, 7),
        ("compute", "STEP c0", 5.0, 7.0, 7),
    ]


def test_closing_ends_the_threads_and_a_running_step(log):
    before = set(threading.enumerate())
    executor = Executor(log.handlers())
    executor.begin(program("net GATHER c0.0", "read READ c0:param", "compute F0.0", "net REDUCE c0.0 <- 2"))
    lanes = threads_since(before)
    assert sorted(lane.name for lane in lanes) == ["lane-net", "lane-read"]
    executor.advance_to(act("F0.0"))
    executor.close()
    assert not any(lane.is_alive() for lane in lanes)
    with pytest.raises(RuntimeError, match="the executor was closed"):
        executor.finish()
    executor.close()
    with pytest.raises(AssertionError, match="closed"):
        executor.begin(ONE_LANE)


def test_steps_do_not_overlap(executor):
    executor.begin(ONE_LANE)
    with pytest.raises(AssertionError, match="running already"):
        executor.begin(ONE_LANE)


@pytest.mark.parametrize("call", [
    lambda executor: executor.advance_to(act("F0.0")),
    lambda executor: executor.complete_micro_batch(0),
    lambda executor: executor.skip_micro_batch(0),
    lambda executor: executor.finish(),
])  # fmt: skip
def test_without_a_step_nothing_can_be_done(executor, call):
    with pytest.raises(AssertionError, match="no step is running"):
        call(executor)


def test_an_empty_program_is_a_step(executor):
    executor.begin(Program(()))
    assert executor.finish().spans == ()


# ---- micro-batches that take turns, and steps that are given up

TURNS = program("compute F0.0", "compute F0.1", "compute B0.0", "compute REDUCE c0.0", "compute B0.1", "compute NORM")


def test_the_next_compute_action_leaves_out_what_is_over_or_has_no_sample(log, executor):
    executor.begin(TURNS)
    assert str(executor.next_compute(set())) == "F0.0"
    assert str(executor.next_compute({0})) == "F0.1"
    assert executor.next_compute({0, 1}) is None
    executor.skip_micro_batch(1)
    assert executor.next_compute({0}) is None
    run(executor, "F0.0")
    assert str(executor.next_compute(set())) == "B0.0", "F0.1 has no sample"
    run(executor, "B0.0")
    assert executor.next_compute(set()) is None
    executor.finish()
    assert log.done == ["REDUCE c0.0", "NORM"]


def test_a_backward_can_be_passed_over_in_its_turn(log, executor):
    executor.begin(TURNS)
    run(executor, "F0.0", "F0.1", "B0.0")
    executor.pass_over(act("B0.1"))
    assert log.done == ["REDUCE c0.0"]
    assert executor.running is None
    assert [span.action for span in executor.finish().spans] == ["F0.0", "F0.1", "B0.0", "REDUCE c0.0", "B0.1", "NORM"]


def test_a_forward_cannot_be_passed_over(executor):
    executor.begin(TURNS)
    with pytest.raises(OutOfOrder, match=r"F0\.0 next, but the model left it out"):
        executor.pass_over(act("F0.0"))
    executor.abort(RuntimeError())


def test_a_micro_batch_without_samples_is_skipped_wherever_its_actions_stand(log, executor):
    executor.begin(TURNS)
    executor.skip_micro_batch(0)
    assert run(executor, "F0.1", "B0.1") == ["F0.1", "B0.1"]
    executor.complete_micro_batch(1)
    executor.finish()
    assert log.done == ["REDUCE c0.0", "NORM"]


def test_what_was_done_of_a_step_that_was_given_up_is_known(log, executor):
    """The writes that it carried over from the step before, for one."""
    gate = log.gate("WRITE c1:param")
    executor.begin(program("write WRITE c0:param", "write WRITE c1:param", "write WRITE c2:param", "compute F0.0 <- 0"))
    run(executor, "F0.0")
    assert log.started["WRITE c1:param"].wait(PATIENCE_S)
    executor.abort(ZeroDivisionError())
    gate.set()
    executor.await_lanes()
    assert log.done == ["WRITE c0:param", "WRITE c1:param"]
    assert executor.is_done(0)
    assert not executor.is_done(2)
    executor.begin(program("compute F0.0"))
    executor.advance_to(act("F0.0"))
    executor.finish()
    assert executor.is_done(0)


def test_lanes_that_do_not_leave_a_step_are_named(log):
    with Executor(log.handlers(), deadline_s=0.05) as executor:
        gate = log.gate("READ c0:param")
        executor.begin(program("read READ c0:param", "compute F0.0"))
        assert log.started["READ c0:param"].wait(PATIENCE_S)
        executor.abort(ZeroDivisionError())
        with pytest.raises(LaneTimeout, match=r"read did not leave the aborted one within 0\.05 s"):
            executor.await_lanes()
        gate.set()


def test_what_the_next_action_needs_can_be_had_before_it_comes(log, executor):
    """Parameters that the model's own code uses before its first unit."""
    gate = log.gate("READ c0:param")
    executor.begin(program("read READ c0:param", "compute GATHER c0.0", "compute F0.0 <- 0"))
    threading.Timer(0.0, gate.set).start()
    executor.await_next()
    assert set(log.done) == {"READ c0:param", "GATHER c0.0"}
    assert executor.running is None
    assert run(executor, "F0.0") == ["F0.0"]
    executor.finish()
