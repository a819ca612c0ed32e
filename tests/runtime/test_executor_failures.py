"""The executor when something goes wrong: on a lane, in the model, or with time; and the step after that."""

import threading
from collections.abc import Iterator

import pytest
from lanes import ONE_LANE, PATIENCE_S, Log, act, program, run

from outgrow.memory.errors import LaneTimeout
from outgrow.runtime.executor import Executor
from outgrow.scheduler.program import Lane


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def executor(log: Log) -> Iterator[Executor]:
    with Executor(log.handlers(), deadline_s=PATIENCE_S) as executor:
        yield executor
        for gate in log.gates.values():
            gate.set()


class HandlerError(Exception):
    """Of a kind of its own."""


def test_a_failure_on_another_lane_releases_compute_with_the_error_itself(log, executor):
    error = HandlerError("the net is down")
    log.errors["GATHER c0.0"] = error
    executor.begin(program("net GATHER c0.0", "net GATHER c1.0", "compute F0.0 <- 0"))
    with pytest.raises(HandlerError, match="the net is down") as caught:
        run(executor, "F0.0")
    assert caught.value is error
    assert any("on lane net" in note and "handle" in note for note in error.__notes__)
    assert log.done == [], "the lane went on after its failure"
    with pytest.raises(HandlerError):
        executor.finish()


def test_a_failure_while_compute_is_already_waiting_ends_the_wait(log, executor):
    gate = log.gate("GATHER c0.0")
    log.errors["GATHER c0.0"] = HandlerError("late")
    executor.begin(program("net GATHER c0.0", "compute F0.0 <- 0"))
    caught: list[BaseException] = []

    def model() -> None:
        try:
            executor.advance_to(act("F0.0"))
        except HandlerError as error:
            caught.append(error)

    thread = threading.Thread(target=model)
    thread.start()
    assert log.started["GATHER c0.0"].wait(PATIENCE_S)
    gate.set()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert [str(error) for error in caught] == ["late"]


def test_a_failure_releases_the_other_lanes_without_a_note_of_theirs(log, executor):
    error = HandlerError("the disk is gone")
    log.errors["READ c0:param"] = error
    gate = log.gate("READ c0:param")
    executor.begin(program("read READ c0:param", "net GATHER c0 <- 0", "h2d UP c0:param <- 0", "compute F0.0 <- 1, 2"))
    assert log.started["READ c0:param"].wait(PATIENCE_S)
    gate.set()
    with pytest.raises(HandlerError):
        run(executor, "F0.0")
    executor.abort(error)
    executor.begin(program("net GATHER c1", "h2d UP c1:param", "compute F0.0 <- 0, 1"))
    run(executor, "F0.0")
    executor.finish()
    assert sorted(log.done) == ["GATHER c1", "UP c1:param"], "the released lanes serve the next step"
    assert len(error.__notes__) == 1
    assert "on lane read" in error.__notes__[0]


def test_a_failure_in_a_handler_of_the_compute_lane_is_raised_where_it_happens(log, executor):
    log.errors["GATHER c0.0"] = HandlerError("here")
    executor.begin(program("compute GATHER c0.0", "compute F0.0"))
    with pytest.raises(HandlerError, match="here"):
        run(executor, "F0.0")
    executor.abort(log.errors["GATHER c0.0"])
    assert not executor.active


def test_a_failure_while_compute_is_in_a_handler_is_what_compute_raises(log, executor):
    net, compute = log.gate("GATHER c0.0"), log.gate("STEP c0")
    log.errors["GATHER c0.0"] = HandlerError("the net is down")
    executor.begin(program("net GATHER c0.0", "compute STEP c0", "compute F0.0"))
    caught: list[BaseException] = []

    def model() -> None:
        try:
            executor.advance_to(act("F0.0"))
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=model)
    thread.start()
    assert log.started["STEP c0"].wait(PATIENCE_S)
    net.set()
    with executor._changed:
        assert executor._changed.wait_for(lambda: executor._failure is not None, PATIENCE_S)
    compute.set()
    thread.join(PATIENCE_S)
    assert caught == [log.errors["GATHER c0.0"]]


def test_the_next_step_begins_when_every_lane_has_left_the_aborted_one(log, executor):
    gate = log.gate("GATHER c0.0")
    again = program("net GATHER c0.0", "net REDUCE c1.0", "compute F0.0 <- 0, 1", "compute NORM")
    executor.begin(again)
    assert log.started["GATHER c0.0"].wait(PATIENCE_S)
    executor.abort(HandlerError("the model failed"))
    with pytest.raises(HandlerError, match="the model failed"):
        executor.advance_to(act("F0.0"))
    begun = threading.Event()
    thread = threading.Thread(target=lambda: (executor.begin(again), begun.set()))
    thread.start()
    assert not begun.is_set()
    gate.set()  # the old step's action ends, and only then the same program starts once more
    assert begun.wait(PATIENCE_S)
    thread.join()
    run(executor, "F0.0")
    timeline = executor.finish()
    assert log.done == ["GATHER c0.0", "GATHER c0.0", "REDUCE c1.0", "NORM"], "the aborted step went on"
    assert [span.action for span in timeline.spans] == ["GATHER c0.0", "REDUCE c1.0", "F0.0", "NORM"]


def test_a_lane_that_does_not_leave_an_aborted_step_is_named(log):
    gate = log.gate("GATHER c0.0")
    with Executor(log.handlers(), deadline_s=0.05) as executor:
        executor.begin(program("net GATHER c0.0", "compute F0.0"))
        assert log.started["GATHER c0.0"].wait(PATIENCE_S)
        executor.abort(HandlerError("the model failed"))
        with pytest.raises(LaneTimeout, match=r"net did not leave the aborted one within 0\.05 s"):
            executor.begin(ONE_LANE)
        gate.set()


def test_a_wait_without_progress_ends_at_its_deadline_and_says_what_waits(log):
    gate = log.gate("GATHER c0.0")
    with Executor(log.handlers(), deadline_s=0.05) as executor:
        executor.begin(program("net GATHER c0.0", "net GATHER c1.0", "compute F0.0 <- 0, 1"))
        assert log.started["GATHER c0.0"].wait(PATIENCE_S)
        with pytest.raises(LaneTimeout) as caught:
            executor.advance_to(act("F0.0"))
        assert str(caught.value) == (
            "F0.0 waited 0.05 s in which no action finished; net is at GATHER c0.0, waiting for its end; "
            "compute is at F0.0, waiting for GATHER c0.0, GATHER c1.0"
        )
        gate.set()


def test_a_lane_that_waits_for_compute_too_long_fails_the_step(log):
    with Executor(log.handlers(), deadline_s=0.05) as executor:
        executor.begin(program("compute F0.0", "net REDUCE c0.0 <- 0", "compute STEP c0 <- 1"))
        with pytest.raises(LaneTimeout, match=r"REDUCE c0\.0 waited 0\.05 s"):
            begin_and_wait_for_failure(executor)
        executor._deadline_s = PATIENCE_S
        lane = executor._threads[Lane.NET]
        assert lane.is_alive(), "the lane serves the next step"
        executor.begin(program("net REDUCE c1.0", "compute F0.0 <- 0"))
        executor.advance_to(act("F0.0"))
        executor.finish()
        assert executor._threads == {Lane.NET: lane}
    assert log.done == ["REDUCE c1.0"]


def begin_and_wait_for_failure(executor: Executor) -> None:
    executor.advance_to(act("F0.0"))
    with executor._changed:
        assert executor._changed.wait_for(lambda: executor._failure is not None, PATIENCE_S)
    executor.finish()
