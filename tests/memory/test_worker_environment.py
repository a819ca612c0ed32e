"""What processes that train are told: huge pages are what the kernel's records say, heaps what the C library says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from outgrow.memory.worker_environment import asks_for_huge_pages, worker_environment

_SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_NAME = "THP_MEM_ALLOC_ENABLE"
_HUGE_BYTES = """
import torch
tensors = [torch.ones(16 << 20, dtype=torch.uint8) for _ in range(4)]
rows = [line.split() for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")]
print(int(rows[0][1]) << 10)
"""
_NUM_HEAPS = """
import threading
import numpy
from outgrow.memory.allocator import num_heaps
threads = [threading.Thread(target=numpy.zeros, args=(1 << 14,)) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(num_heaps())
"""


def answer(text: str, environment: dict[str, str]) -> int:
    done = subprocess.run(
        [sys.executable, "-c", text], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(
    not _SWITCH.exists() or "[madvise]" not in _SWITCH.read_text(), reason="this kernel gives them to all, or to none"
)
def test_tensors_of_a_process_with_the_variable_lie_in_huge_pages() -> None:
    assert answer(_HUGE_BYTES, {_NAME: "0"}) < 8 << 20
    assert answer(_HUGE_BYTES, worker_environment()) > 32 << 20


def test_threads_of_such_a_process_share_one_heap() -> None:
    assert answer(_NUM_HEAPS, {"MALLOC_ARENA_MAX": "8"}) > 1
    assert answer(_NUM_HEAPS, worker_environment()) == 1


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(_NAME, raising=False)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    assert (worker_environment(), asks_for_huge_pages()) == ({_NAME: "1", "MALLOC_ARENA_MAX": "4"}, False)
    monkeypatch.delenv("MALLOC_ARENA_MAX")
    monkeypatch.setenv(_NAME, "0")
    assert (worker_environment(), asks_for_huge_pages()) == ({_NAME: "0", "MALLOC_ARENA_MAX": "1"}, False)
    monkeypatch.setenv(_NAME, "1")
    assert asks_for_huge_pages()
