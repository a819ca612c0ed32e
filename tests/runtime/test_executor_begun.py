"""Actions that a lane begins and ends apart: the disk has the next transfer while one ends."""

import itertools
import threading

from lanes import PATIENCE_S, act, program

from outgrow.runtime.executor import Executor


class Begun:
    """Handlers of READ that begin at once and end when their gate opens."""

    def __init__(self, *names: str) -> None:
        self.begun = {name: threading.Event() for name in names}
        self.gates = {name: threading.Event() for name in names}
        self.ended: list[str] = []

    def __call__(self, action):
        name = str(action)
        self.begun[name].set()

        def end() -> None:
            assert self.gates[name].wait(PATIENCE_S)
            self.ended.append(name)

        return end


READS = ("READ c0:param", "READ c1:param", "READ c2:param")


def test_a_lane_begins_the_next_action_before_the_first_has_ended_and_no_third():
    reads = Begun(*READS)
    with Executor({act("READ c0:param").kind: reads}, deadline_s=PATIENCE_S) as executor:
        executor.begin(program(*(f"read {name}" for name in READS), "compute F0.0 <- 0"))
        assert reads.begun[READS[1]].wait(PATIENCE_S)
        assert not reads.begun[READS[2]].is_set()
        assert not executor.is_done(0)
        reads.gates[READS[0]].set()
        executor.advance_to(act("F0.0"))
        assert reads.begun[READS[2]].wait(PATIENCE_S)
        assert reads.ended == [READS[0]]
        for gate in reads.gates.values():
            gate.set()
        spans = [span for span in executor.finish().spans if span.lane == "read"]
    assert reads.ended == list(READS)
    assert [span.action for span in spans] == list(READS)
    for span, following in itertools.pairwise(spans):
        assert span.end_s <= following.start_s, "a lane does one thing at a time"


def test_what_was_begun_is_ended_before_a_lane_waits_for_another():
    reads = Begun(*READS[:2])
    reads.gates[READS[0]].set()
    with Executor({act("READ c0:param").kind: reads}, deadline_s=PATIENCE_S) as executor:
        executor.begin(program(f"read {READS[0]}", "compute F0.0 <- 0", f"read {READS[1]} <- 1"))
        executor.advance_to(act("F0.0"))  # would wait for good, if the lane waited for it with the first READ begun
        assert not reads.begun[READS[1]].is_set()
        executor.complete_micro_batch(0)
        reads.gates[READS[1]].set()
        executor.finish()
    assert reads.ended == list(READS[:2])
