"""The lanes alone: order, back-pressure, deadlines, delivery of errors, clean ends. No disk is touched."""

import threading
from collections.abc import Callable, Iterator

import pytest
from held import held

from outgrow.memory.direct_io import AlignedBuffer
from outgrow.memory.disk_lanes import DiskLanes, LaneName, Order, Ticket
from outgrow.memory.errors import LaneTimeout, StoreError

SHORT_S = 0.05
"""Long enough for anything that is free to run to have run; what must not happen has not happened after it."""


class Bench:
    """Lanes with a short way to submit one request that does as it is told."""

    def __init__(self, depth: int = 2, limit_bytes: int = 100, deadline_s: float = 20.0) -> None:
        self.lanes = DiskLanes("test store", depth, limit_bytes, deadline_s, 4096)
        self.log: list[str] = []
        self.errors: list[BaseException | None] = []

    def submit(
        self,
        lane: LaneName,
        label: str,
        order: Order | None = None,
        num_bytes: int = 10,
        num_blocks: int = 1,
        action: Callable[[int], None] = lambda block: None,
    ) -> Ticket:
        def transfer(block: int, scratch: AlignedBuffer) -> None:
            action(block)
            self.log.append(label)

        return self.lanes.submit(lane, label, num_bytes, num_blocks, order or Order(), transfer, self.errors.append)


@pytest.fixture
def bench() -> Iterator[Bench]:
    before = held()
    bench = Bench()
    yield bench
    bench.lanes.close()
    for lane in ("read", "write"):
        statistics = bench.lanes.statistics(lane)
        assert statistics.in_flight_bytes == statistics.num_in_flight == 0
        assert statistics.peak_in_flight_bytes <= 100
    assert held().since(before) == []


class Gate:
    """Holds whoever passes until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __call__(self, block: int) -> None:
        self.reached.set()
        assert self.opened.wait(30)


def boom(block: int) -> None:
    raise StoreError(f"block {block} failed")


def test_waiting_with_nothing_queued_returns_at_once(bench: Bench) -> None:
    bench.lanes.drain(0.0)
    ticket = bench.submit("read", "r").wait()
    assert ticket.wait(0.0) is ticket
    bench.lanes.drain()


def test_a_request_is_done_when_all_its_blocks_are(bench: Bench) -> None:
    gate = Gate()
    ticket = bench.submit("write", "w", num_blocks=5, action=lambda block: gate(block) if block == 2 else None)
    with pytest.raises(LaneTimeout, match="4 of 5 blocks done"):
        ticket.wait(SHORT_S)
    assert not ticket.done
    gate.opened.set()
    assert ticket.wait().done
    assert bench.log == ["w"] * 5
    assert bench.errors == [None]
    assert ticket.seconds > 0
    assert ticket.submitted_s <= ticket.start_s < ticket.end_s


@pytest.mark.parametrize(("first", "second"), [("write", "read"), ("read", "write"), ("write", "write")])
def test_conflicting_requests_run_in_the_order_of_their_calls(bench: Bench, first: LaneName, second: LaneName) -> None:
    order, gate = Order(), Gate()
    earlier = bench.submit(first, "first", order, action=gate)
    later = bench.submit(second, "second", order)
    bench.submit(second, "other extent").wait()  # nothing holds up other bytes
    with pytest.raises(LaneTimeout, match=r"second .*behind 1 earlier requests for the same bytes"):
        later.wait(SHORT_S)
    gate.opened.set()
    later.wait()
    assert earlier.done
    assert bench.log == ["other extent", "first", "second"]


def test_reads_of_the_same_bytes_run_together_and_a_write_follows_all(bench: Bench) -> None:
    order, gates = Order(), [Gate(), Gate()]
    reads = [bench.submit("read", f"r{i}", order, action=gate) for i, gate in enumerate(gates)]
    for gate in gates:
        assert gate.reached.wait(10)
    write = bench.submit("write", "w", order)
    gates[0].opened.set()
    reads[0].wait()
    with pytest.raises(LaneTimeout):
        write.wait(SHORT_S)
    gates[1].opened.set()
    write.wait()
    assert bench.log[-1] == "w"


def test_a_long_chain_on_the_same_bytes_keeps_its_order(bench: Bench) -> None:
    order = Order()
    lanes: list[LaneName] = ["write", "read", "write", "write", "read"] * 40
    for index, lane in enumerate(lanes):
        bench.submit(lane, str(index), order, num_bytes=1)
    bench.lanes.drain()
    assert [int(label) for label in bench.log] == list(range(200))


def test_bytes_in_flight_are_bounded_and_the_caller_waits(bench: Bench) -> None:
    gate = Gate()
    bench.submit("read", "big", num_bytes=60, action=gate)
    bench.submit("read", "fits", num_bytes=40).wait()
    submitted = threading.Event()

    def third() -> None:
        bench.submit("read", "held back", num_bytes=60)
        submitted.set()

    thread = threading.Thread(target=third)
    thread.start()
    assert not submitted.wait(SHORT_S)
    bench.submit("write", "the other lane is free", num_bytes=100).wait()
    gate.opened.set()
    thread.join(10)
    bench.lanes.drain()
    assert bench.log[-1] == "held back"
    assert bench.lanes.statistics("read").held_back_s > 0
    assert bench.lanes.statistics("read").peak_in_flight_bytes == 100


def test_a_request_over_the_limit_is_let_in_alone() -> None:
    bench = Bench(limit_bytes=100)
    bench.submit("write", "huge", num_bytes=1000).wait()
    assert bench.lanes.statistics("write").peak_in_flight_bytes == 1000
    bench.lanes.close()


def test_a_caller_held_back_past_the_deadline_is_told_by_what() -> None:
    bench, gate = Bench(deadline_s=SHORT_S), Gate()
    bench.submit("write", "WRITE c1:param", num_bytes=80, num_blocks=2, action=gate)
    with pytest.raises(LaneTimeout) as caught:
        bench.submit("write", "WRITE c2:param", num_bytes=80)
    text = str(caught.value)
    assert "test store: holding back WRITE c2:param (80 bytes) while 80 of at most 100 bytes are in flight" in text
    assert "block 0 of WRITE c1:param (80 bytes, 0 of 2 blocks done) for 0.1 s" in text or "for 0.0 s" in text
    assert "The read lane has 0 requests queued and runs nothing." in text
    gate.opened.set()
    bench.lanes.close(10)


def test_an_error_reaches_every_waiter_once_no_block_runs(bench: Bench) -> None:
    gate = Gate()
    started = threading.Barrier(2)

    def action(block: int) -> None:
        started.wait(10)  # both threads hold a block of this request
        if block == 0:
            raise StoreError("block 0 failed")
        gate(block)

    ticket = bench.submit("read", "r", num_blocks=6, action=action)
    with pytest.raises(LaneTimeout):
        ticket.wait(SHORT_S)  # failed, but block 1 may still touch the memory
    caught: list[BaseException] = []

    def waiter() -> None:
        try:
            ticket.wait()
        except StoreError as error:
            caught.append(error)

    threads = [threading.Thread(target=waiter) for _ in range(5)]
    for thread in threads:
        thread.start()
    gate.opened.set()
    for thread in threads:
        thread.join(10)
    assert [str(error) for error in caught] == ["block 0 failed"] * 5
    assert len(set(map(id, caught))) == 5
    assert bench.log == ["r"]  # block 1; blocks 2 to 5 never started
    assert [str(error) for error in bench.errors] == ["block 0 failed"]


def test_drain_raises_what_nobody_has_seen_and_only_once(bench: Bench) -> None:
    seen = bench.submit("read", "seen", action=boom)
    with pytest.raises(StoreError):
        seen.wait()
    bench.lanes.drain()
    for index in range(3):
        bench.submit("write", f"unseen {index}", action=boom)
    with pytest.raises(StoreError, match="block 0 failed") as caught:
        bench.lanes.drain()
    assert (
        caught.value.__notes__ == ["2 more requests failed: unseen 1, unseen 2"]
        or "unseen" in caught.value.__notes__[0]
    )
    bench.lanes.drain()
    assert bench.lanes.statistics("write").num_failed == 3


def test_a_bug_in_a_transfer_does_not_kill_the_thread(bench: Bench) -> None:
    for _ in range(5):
        with pytest.raises(ZeroDivisionError):
            bench.submit("read", "bug", action=lambda block: 1 // block and None).wait()
    bench.submit("read", "fine").wait()


def test_a_request_after_a_failed_one_on_the_same_bytes_still_runs(bench: Bench) -> None:
    order = Order()
    failed = bench.submit("write", "w", order, action=boom)
    after = bench.submit("read", "r", order)
    after.wait()
    assert failed.done


def test_closing_cancels_what_waits_and_finishes_what_runs() -> None:
    bench, gate, order = Bench(depth=1), Gate(), Order()
    running = bench.submit("write", "running", order, action=gate)
    assert gate.reached.wait(10)
    queued = bench.submit("write", "queued")
    follower = bench.submit("read", "follower", order)
    with pytest.raises(LaneTimeout, match=r"closing with 1 requests running.*block 0 of running"):
        bench.lanes.close(SHORT_S)
    for ticket in (queued, follower):
        with pytest.raises(StoreError, match="was cancelled"):
            ticket.wait()
    gate.opened.set()
    bench.lanes.close()
    bench.lanes.close()
    with pytest.raises(StoreError, match="was cancelled"):
        running.wait()
    with pytest.raises(StoreError, match="refused"):
        bench.submit("read", "late")
    assert bench.log == ["running"]
    assert len(bench.errors) == 3


def test_closing_releases_a_caller_that_is_held_back() -> None:
    bench, gate = Bench(), Gate()
    bench.submit("write", "w", num_bytes=100, action=gate)
    assert gate.reached.wait(10)
    caught: list[str] = []

    def held_back() -> None:
        try:
            bench.submit("write", "held", num_bytes=50)
        except StoreError as error:
            caught.append(str(error))

    thread = threading.Thread(target=held_back)
    thread.start()
    with pytest.raises(LaneTimeout):
        bench.lanes.close(SHORT_S)
    thread.join(10)
    gate.opened.set()
    bench.lanes.close()
    assert caught == ["test store: held was refused, the disk store is closed"]


def test_a_failed_request_lets_go_of_the_callers_memory(bench: Bench) -> None:
    buffer = AlignedBuffer(4096)

    def transfer(block: int, scratch: AlignedBuffer, view: memoryview = buffer.view) -> None:
        local = view[:10]
        try:
            raise OSError(5, "EIO")
        except OSError as error:
            raise StoreError(f"failed with {len(local)}") from error

    ticket = bench.lanes.submit("read", "r", 100, 1, Order(), transfer, lambda error: None)
    del transfer
    with pytest.raises(StoreError) as caught:
        ticket.wait()
    assert isinstance(caught.value.__cause__, OSError)
    assert buffer.close()


def test_settings_are_checked() -> None:
    for depth, limit_bytes, deadline_s in ((0, 1, 1.0), (1, 0, 1.0), (1, 1, 0.0)):
        with pytest.raises(ValueError, match="must be positive"):
            DiskLanes("x", depth, limit_bytes, deadline_s, 4096)


def test_the_device_has_the_next_block_while_one_is_checked_and_never_more_than_the_depth() -> None:
    moving, most, lock = 0, 0, threading.Lock()
    last_moved, both_checked = threading.Event(), threading.Barrier(2)

    def transfer(block: int, scratch: AlignedBuffer) -> Callable[[], None]:
        nonlocal moving, most
        with lock:
            moving += 1
            most = max(most, moving)
        if block == 1:
            last_moved.set()
        with lock:
            moving -= 1
        return check

    def check() -> None:
        assert last_moved.wait(20), "a check holds the device back"
        both_checked.wait(20)

    lanes = DiskLanes("test store", 1, 100, 20.0, 4096)
    try:
        lanes.submit("read", "r", 10, 2, Order(), transfer, lambda error: None).wait()
    finally:
        lanes.close()
    assert most == 1


def test_what_a_check_finds_fails_the_request() -> None:
    def find() -> None:
        raise StoreError("it is not what was written")

    lanes = DiskLanes("test store", 1, 100, 20.0, 4096)
    try:
        with pytest.raises(StoreError, match="not what was written"):
            lanes.submit("read", "r", 10, 2, Order(), lambda block, scratch: find, lambda error: None).wait()
        lanes.submit("read", "again", 10, 2, Order(), lambda block, scratch: None, lambda error: None).wait()
    finally:
        lanes.close()
