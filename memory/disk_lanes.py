"""The read lane and the write lane of the disk tier: threads that keep several transfers in flight, in a safe order.

Owns the threads, the order of requests on the same bytes, the bound on bytes in flight, deadlines, and the delivery of
results and errors. It does not know files, extents or checksums: a request is a number of blocks and a function that
moves one of them (`disk.py`).

    submit -> [full? wait] -> WAITING (for an earlier request on the same bytes) -> QUEUED -> blocks run -> done
               back-pressure                                                       FIFO      depth at a time

A request waits only for requests that were admitted before it, so no order of calls can deadlock. Its error is
delivered when none of its blocks is running any more: from then on nobody touches the caller's memory. Every wait has a
deadline and, past it, raises LaneTimeout with what it waited for and what each thread is doing.
"""

import copy
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from .direct_io import AlignedBuffer
from .errors import LaneTimeout, StoreError
from .priority import give_way

__all__ = ["BlockTransfer", "DiskLanes", "LaneName", "LaneStatistics", "Order", "Ticket"]

LaneName = Literal["read", "write"]

BlockTransfer = Callable[[int, AlignedBuffer], Callable[[], None] | None]
"""Moves block number `int`; the buffer is the thread's own scratch memory, for what is not aligned. What it returns is
called when the device may already have the next block: the checksum."""


class Ticket:
    """A request on its way. `wait()` returns when it is done, or raises its error; times are `time.perf_counter()`."""

    def __init__(self, lanes: "DiskLanes", lane: LaneName, label: str, num_bytes: int, num_blocks: int) -> None:
        self.label = label
        self.lane: LaneName = lane
        self.num_bytes = num_bytes
        self.submitted_s = time.perf_counter()
        self.start_s = 0.0  # the first block began
        self.end_s = 0.0
        self.error: BaseException | None = None
        self.done = False
        # What follows belongs to the lanes and is guarded by their lock.
        self._lanes = lanes
        self._num_blocks = num_blocks
        self._next_block = 0
        self._num_running = 0
        self._num_done = 0
        self._num_blockers = 0
        self._followers: list[Ticket] = []
        self._transfer: BlockTransfer | None = None
        self._finish: Callable[[BaseException | None], None] | None = None

    @property
    def seconds(self) -> float:
        """From its first block's start to its last block's end; 0 if it never ran."""
        return self.end_s - self.start_s if self.done and self.start_s else 0.0

    def wait(self, timeout_s: float | None = None) -> "Ticket":
        """Return self once done. Raises the request's own error (each caller gets its own copy), or LaneTimeout after
        `timeout_s` (default: the deadline of the lanes); then the request goes on and may be waited for again."""
        return self._lanes.wait(self, timeout_s)

    def __str__(self) -> str:
        state = f"{self._num_done} of {self._num_blocks} blocks done"
        if self._num_blockers:
            state += f", behind {self._num_blockers} earlier requests for the same bytes"
        return f"{self.label} ({self.num_bytes:,} bytes, {state})"


@dataclass
class Order:
    """The last requests on one run of bytes: a read follows the last write, a write follows everything."""

    last_write: Ticket | None = None
    reads: list[Ticket] = field(default_factory=list)

    def enter(self, ticket: Ticket) -> list[Ticket]:
        """Take `ticket` in; returns the unfinished ones that it has to follow."""
        self.reads = [read for read in self.reads if not read.done]
        earlier = [] if self.last_write is None or self.last_write.done else [self.last_write]
        if ticket.lane == "read":
            self.reads.append(ticket)
            return earlier
        earlier += self.reads
        self.last_write, self.reads = ticket, []
        return earlier


@dataclass(frozen=True)
class LaneStatistics:
    """What one lane has done so far. `busy_s` counts time with at least one block running, not thread-seconds."""

    num_requests: int
    num_failed: int
    num_bytes: int
    busy_s: float
    held_back_s: float
    """Seconds that callers waited because too many bytes were in flight."""
    in_flight_bytes: int
    peak_in_flight_bytes: int
    num_in_flight: int
    peak_num_in_flight: int


@dataclass
class _Lane:
    """The state of one lane, guarded by the lock of the DiskLanes."""

    name: LaneName
    ready: threading.Condition
    queue: deque[Ticket] = field(default_factory=deque)
    num_moving: int = 0  # blocks that the device has
    running: dict[str, tuple[Ticket, int, float]] = field(default_factory=dict)  # thread -> ticket, block, since
    num_requests: int = 0
    num_failed: int = 0
    num_bytes: int = 0
    busy_s: float = 0.0
    busy_since_s: float = 0.0
    held_back_s: float = 0.0
    in_flight_bytes: int = 0
    peak_in_flight_bytes: int = 0
    num_in_flight: int = 0
    peak_num_in_flight: int = 0

    def snapshot(self) -> LaneStatistics:
        busy_s = self.busy_s + (time.perf_counter() - self.busy_since_s if self.running else 0.0)
        return LaneStatistics(
            self.num_requests, self.num_failed, self.num_bytes, busy_s, self.held_back_s,
            self.in_flight_bytes, self.peak_in_flight_bytes, self.num_in_flight, self.peak_num_in_flight,
        )  # fmt: skip


class DiskLanes:
    """Threads that have `depth` blocks read and `depth` written at a time, with at most `limit_bytes` in flight on each
    lane. One thread more than that on each: the device never waits for a checksum.

    A request larger than the limit is let in when its lane is empty. `scratch_bytes` is each thread's memory for
    transfers that are not aligned; it costs nothing until used.
    """

    def __init__(self, name: str, depth: int, limit_bytes: int, deadline_s: float, scratch_bytes: int) -> None:
        if depth < 1 or limit_bytes < 1 or deadline_s <= 0:
            raise ValueError(
                f"depth ({depth}), limit_bytes ({limit_bytes}) and deadline_s ({deadline_s}) must be positive"
            )
        self._name = name
        self._depth = depth
        self._limit_bytes = limit_bytes
        self._deadline_s = deadline_s
        self._scratch_bytes = scratch_bytes
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._lanes: dict[LaneName, _Lane] = {
            "read": _Lane("read", threading.Condition(self._lock)),
            "write": _Lane("write", threading.Condition(self._lock)),
        }
        self._open: dict[Ticket, None] = {}  # in order of admission
        self._undelivered: list[Ticket] = []
        self._closing = False
        self._threads = [
            threading.Thread(target=self._work, args=(lane,), name=f"outgrow-{lane.name}-{index}", daemon=True)
            for lane in self._lanes.values()
            for index in range(depth + 1)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        lane: LaneName,
        label: str,
        num_bytes: int,
        num_blocks: int,
        order: Order,
        transfer: BlockTransfer,
        finish: Callable[[BaseException | None], None],
    ) -> Ticket:
        """Queue a request; waits while too many bytes are in flight. `finish` is called once with the error or None,
        before anyone that waits or follows sees it done. Raises LaneTimeout, or StoreError once closed."""
        ticket = Ticket(self, lane, label, num_bytes, num_blocks)
        ticket._transfer, ticket._finish = transfer, finish
        with self._lock:
            state = self._lanes[lane]
            self._admit(state, ticket)
            earlier = order.enter(ticket)
            for other in earlier:
                other._followers.append(ticket)
            ticket._num_blockers = len(earlier)
            self._open[ticket] = None
            if not earlier:
                self._enqueue(ticket)
        return ticket

    def wait(self, ticket: Ticket, timeout_s: float | None = None) -> Ticket:
        """See `Ticket.wait`."""
        with self._lock:
            self._wait_until(lambda: ticket.done, timeout_s, lambda: f"waiting for {ticket}")
            if ticket.error is not None and ticket in self._undelivered:
                self._undelivered.remove(ticket)
        if ticket.error is not None:
            raise copy.copy(ticket.error) from ticket.error.__cause__
        return ticket

    def drain(self, timeout_s: float | None = None) -> None:
        """Wait until nothing is in flight. Raises the first error that no `wait` has raised yet, then forgets them."""
        with self._lock:
            self._wait_until(lambda: not self._open, timeout_s, lambda: f"draining {len(self._open)} requests")
            failed, self._undelivered = self._undelivered, []
        if failed:
            error = copy.copy(failed[0].error)
            assert error is not None
            if len(failed) > 1:
                error.add_note(f"{len(failed) - 1} more requests failed: " + ", ".join(t.label for t in failed[1:9]))
            raise error

    def close(self, timeout_s: float | None = None) -> None:
        """Cancel what has not begun, wait for what runs, end the threads. May be repeated.

        Raises LaneTimeout if a transfer does not come back; its thread is left behind, with the file that it uses.
        """
        with self._lock:
            self._closing = True
            for ticket in list(self._open):
                ticket.error = ticket.error or StoreError(
                    f"{ticket.label} was cancelled: disk store {self._name} was closed"
                )
                self._stop(ticket)
            for lane in self._lanes.values():
                lane.ready.notify_all()
            self._changed.notify_all()
            self._wait_until(
                lambda: not self._open, timeout_s, lambda: f"closing with {len(self._open)} requests running"
            )
        for thread in self._threads:
            thread.join()  # each is past its last block: nothing is open
        self._threads = []
        self._undelivered = []

    def statistics(self, lane: LaneName) -> LaneStatistics:
        """A snapshot of one lane."""
        with self._lock:
            return self._lanes[lane].snapshot()

    # Everything below is called with the lock held, but for `_work`, which takes it.

    def _admit(self, lane: _Lane, ticket: Ticket) -> None:
        """Back-pressure: wait until the request's bytes fit beside those in flight, or nothing is."""

        def fits() -> bool:
            return (
                not lane.num_in_flight or lane.in_flight_bytes + ticket.num_bytes <= self._limit_bytes or self._closing
            )

        if not fits():
            began_s = time.perf_counter()
            self._wait_until(
                fits,
                None,
                lambda: (
                    f"holding back {ticket.label} ({ticket.num_bytes:,} bytes) while {lane.in_flight_bytes:,} of at "
                    f"most {self._limit_bytes:,} bytes are in flight on the {lane.name} lane"
                ),
            )
            lane.held_back_s += time.perf_counter() - began_s
        if self._closing:
            raise StoreError(f"{self._name}: {ticket.label} was refused, the disk store is closed")
        lane.in_flight_bytes += ticket.num_bytes
        lane.num_in_flight += 1
        lane.peak_in_flight_bytes = max(lane.peak_in_flight_bytes, lane.in_flight_bytes)
        lane.peak_num_in_flight = max(lane.peak_num_in_flight, lane.num_in_flight)

    def _enqueue(self, ticket: Ticket) -> None:
        lane = self._lanes[ticket.lane]
        lane.queue.append(ticket)
        lane.ready.notify(ticket._num_blocks)

    def _stop(self, ticket: Ticket) -> None:
        """Start no more blocks of a failed request; it is done when none is running."""
        queue = self._lanes[ticket.lane].queue
        if ticket in queue:
            queue.remove(ticket)
        if not ticket._num_running and not ticket.done:
            self._complete(ticket)

    def _complete(self, ticket: Ticket) -> None:
        lane = self._lanes[ticket.lane]
        ticket.end_s = time.perf_counter()
        assert ticket._finish is not None
        try:
            ticket._finish(ticket.error)
        except BaseException as error:
            ticket.error = ticket.error or error
        ticket._transfer = ticket._finish = None  # they hold the caller's memory
        ticket.done = True
        del self._open[ticket]
        lane.in_flight_bytes -= ticket.num_bytes
        lane.num_in_flight -= 1
        lane.num_requests += 1
        if ticket.error is None:
            lane.num_bytes += ticket.num_bytes
        else:
            lane.num_failed += 1
            self._undelivered.append(ticket)
        for follower in ticket._followers:
            follower._num_blockers -= 1
            if not follower._num_blockers and not follower.done:
                self._enqueue(follower)
        ticket._followers = []
        self._changed.notify_all()

    def _wait_until(self, ready: Callable[[], bool], timeout_s: float | None, goal: Callable[[], str]) -> None:
        deadline_s = self._deadline_s if timeout_s is None else timeout_s
        if self._changed.wait_for(ready, deadline_s):
            return
        raise LaneTimeout(
            f"{self._name}: {goal()}: not done after {deadline_s:g} s. "
            f"{' '.join(self._doing(lane) for lane in self._lanes.values())} "
            "The disk hangs or is slower than promised: look at the kernel's log, or allow a longer deadline"
        )

    def _doing(self, lane: _Lane) -> str:
        """One sentence on what each thread of a lane is at, and for how long."""
        now_s = time.perf_counter()
        blocks = [
            f"block {block} of {ticket} for {now_s - began:.1f} s" for ticket, block, began in lane.running.values()
        ]
        return f"The {lane.name} lane has {len(lane.queue)} requests queued and runs {'; '.join(blocks) or 'nothing'}."

    def _work(self, lane: _Lane) -> None:
        """One thread: take the next block, move it, until closed."""
        give_way()
        me = threading.current_thread().name
        with AlignedBuffer(self._scratch_bytes) as scratch:
            while True:
                with self._lock:
                    while (not lane.queue or lane.num_moving == self._depth) and not self._closing:
                        lane.ready.wait()
                    if not lane.queue:
                        return
                    ticket = lane.queue[0]
                    block, transfer = ticket._next_block, ticket._transfer
                    assert transfer is not None
                    ticket._next_block += 1
                    if ticket._next_block == ticket._num_blocks:
                        lane.queue.popleft()
                    ticket._num_running += 1
                    lane.num_moving += 1
                    now_s = time.perf_counter()
                    ticket.start_s = ticket.start_s or now_s
                    if not lane.running:
                        lane.busy_since_s = now_s
                    lane.running[me] = ticket, block, now_s
                error: BaseException | None = None
                is_moving = True
                try:
                    check = transfer(block, scratch)
                    with self._lock:
                        is_moving = False
                        lane.num_moving -= 1
                        lane.ready.notify()
                    if check is not None:
                        check()
                except BaseException as caught:
                    error = _without_frames(caught)
                check = None  # it holds the caller's memory
                with self._lock:
                    del lane.running[me], transfer
                    if is_moving:
                        lane.num_moving -= 1
                        lane.ready.notify()
                    if not lane.running:
                        lane.busy_s += time.perf_counter() - lane.busy_since_s
                    ticket._num_running -= 1
                    ticket._num_done += error is None
                    ticket.error = ticket.error or error
                    if ticket.error is not None:
                        self._stop(ticket)
                    elif ticket._num_done == ticket._num_blocks:
                        self._complete(ticket)
                    del ticket, error


def _without_frames(error: BaseException) -> BaseException:
    """`error` and its causes without tracebacks: their frames would keep the caller's memory alive."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error
