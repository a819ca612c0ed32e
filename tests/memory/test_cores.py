"""A thread that computes with two threads on two cores keeps to one of them, and its kernels' helper to the other."""

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
