"""A thread that computes with two threads on two cores keeps to one of them, and its kernels' helper to the other.
Processes that compute side by side keep to a share of the cores each."""

import os
import threading

import pytest
import torch

from outgrow.memory import cores


def test_a_thread_and_its_helper_keep_to_a_core_each(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 3}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, mask: asked.append(list(mask)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    cores.keep_to_own_cores()
    assert asked == [[5], [3]], "the helper is born on one, and the thread goes on on the other"


@pytest.mark.parametrize(("num_cores", "num_threads"), [(1, 1), (2, 1), (4, 2), (4, 4)])
def test_elsewhere_nothing_is_kept(monkeypatch: pytest.MonkeyPatch, num_cores: int, num_threads: int) -> None:
    asked: list[object] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(num_cores)), raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *each: asked.append(each), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    cores.keep_to_own_cores()
    assert not asked


def test_other_threads_keep_all_cores() -> None:
    before = os.sched_getaffinity(0)
    thread = threading.Thread(target=cores.keep_to_own_cores)
    thread.start()
    thread.join()
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize(
    ("cores_there", "index", "num_processes", "own"),
    [({5, 3}, 0, 2, {3}), ({5, 3}, 1, 2, {5}), (set(range(6)), 1, 3, {2, 3}), (set(range(4)), 1, 2, {2, 3})],
)
def test_a_process_keeps_to_its_share(
    monkeypatch: pytest.MonkeyPatch, cores_there: set[int], index: int, num_processes: int, own: set[int]
) -> None:
    kept: dict[int, set[int]] = {}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores_there, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda thread, mask: kept.update({thread: set(mask)}), raising=False)
    over = threading.Event()
    other = threading.Thread(target=over.wait)
    other.start()
    cores.keep_process_to_share(index, num_processes)
    over.set()
    other.join()
    assert kept[threading.get_native_id()] == own
    assert other.native_id is not None
    assert kept[other.native_id] == own, "threads that were there before, too: they hold the interpreter's lock as well"


@pytest.mark.parametrize(("num_cores", "num_processes"), [(2, 1), (2, 4), (3, 2)])
def test_cores_that_cannot_be_shared_evenly_are_left_to_the_system(
    monkeypatch: pytest.MonkeyPatch, num_cores: int, num_processes: int
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(num_cores)), raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *each: asked.append(each), raising=False)
    cores.keep_process_to_share(0, num_processes)
    assert not asked
