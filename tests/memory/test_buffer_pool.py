"""The pool: exact sizes, known count, waits with deadlines."""

import threading

import pytest

from outgrow.memory.buffer_pool import BufferPool
from outgrow.memory.direct_io import round_up
from outgrow.memory.errors import DoesNotFit, LaneTimeout


def test_buffers_are_reused_and_never_more_than_planned() -> None:
    pool = BufferPool({5000: 2, 100: 1}, deadline_s=0.01)
    assert pool.num_bytes == 2 * round_up(5000) + round_up(100)
    first, second = pool.take(5000), pool.take(5000)
    assert first is not second
    assert first.num_bytes == 5000
    with pytest.raises(LaneTimeout, match="none of the 2 buffers of 5,000 bytes"):
        pool.take(5000)
    pool.give(first)
    assert pool.take(5000) is first
    pool.close()


def test_a_waiting_caller_gets_what_is_given_back() -> None:
    pool = BufferPool({4096: 1})
    buffer = pool.take(4096)
    got = []
    thread = threading.Thread(target=lambda: got.append(pool.take(4096)))
    thread.start()
    pool.give(buffer)
    thread.join(10)
    assert got == [buffer]


def test_mistakes_are_refused() -> None:
    pool = BufferPool({4096: 1})
    with pytest.raises(DoesNotFit, match="no buffers of 8,192 bytes"):
        pool.take(8192)
    buffer = pool.take(4096)
    pool.give(buffer)
    with pytest.raises(ValueError, match="twice"):
        pool.give(buffer)
    with pytest.raises(ValueError, match="at least one"):
        BufferPool({4096: 0})
