"""Threads that move bytes give way to those that compute."""

import os
import threading
from pathlib import Path

from outgrow.memory.disk import DiskStore, ExtentSpec
from outgrow.memory.priority import give_way


def niceness(thread: threading.Thread) -> int:
    assert thread.native_id is not None
    return os.getpriority(os.PRIO_PROCESS, thread.native_id)


def test_only_the_thread_that_gives_way_does() -> None:
    before = niceness(threading.current_thread())
    seen: list[int] = []

    def run() -> None:
        for _ in range(3):
            give_way()
            seen.append(niceness(threading.current_thread()))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [min(before + 10 * times, 19) for times in (1, 2, 3)]
    assert niceness(threading.current_thread()) == before


def test_the_disk_lanes_give_way(tmp_path: Path) -> None:
    before = niceness(threading.current_thread())
    known = set(threading.enumerate())
    with DiskStore(tmp_path, "run", 0, [ExtentSpec("c0:param", 4096)], depth=2) as store:
        store.write("c0:param", bytes(4096)).wait()
        store.read("c0:param", bytearray(4096)).wait()
        lanes = set(threading.enumerate()) - known
        assert len(lanes) == 6
        # Every thread gives way before it takes its first block; those that had none may not have begun.
        assert min(before + 10, 19) in {niceness(thread) for thread in lanes}
        assert niceness(threading.current_thread()) == before
