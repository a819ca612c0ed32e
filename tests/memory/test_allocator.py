"""Freed blocks are kept: a second use of the same size meets no page fault; in tight memory only as far as they fit."""

import subprocess
import sys

from outgrow.memory.allocator import StepHeap

_FAULTS = """
import resource, torch
from outgrow.memory.allocator import StepHeap, keep_freed_blocks, num_heaps
from outgrow.memory.allocator import return_blocks_at_once, return_freed_blocks, uses_first_heap
from outgrow.memory.process import peak_host_bytes, read_process_memory, reset_peak

def faults(num_bytes=64 << 20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.ones(num_bytes, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""
_KEPT = """
given_back = faults()
assert keep_freed_blocks()
faults(96 << 20)  # something larger was there before: small blocks beside it do not matter then
again = min(faults() for _ in range(3))  # where the heap begins is a matter of luck
kept_bytes = read_process_memory().resident_bytes
assert return_freed_blocks()
print(given_back, again, kept_bytes - read_process_memory().resident_bytes)
"""
_STEP = """
MIB = 1 << 20
return_blocks_at_once()
given_back = faults()

def phase(number):
    live = torch.ones((20 + number) * MIB, dtype=torch.uint8)  # no size comes twice: old blocks do not fit
    for _ in range(3):
        live = torch.ones(live.numel(), dtype=torch.uint8)

def phases(heap):
    for number in range(12):
        heap.make_room(4 * (20 + number) * MIB)
        phase(number)

begin = read_process_memory().resident_bytes
for spare_mib in (200, 1 << 20):
    heap = StepHeap(begin + spare_mib * MIB, 4 * MIB)
    reset_peak()
    heap.begin_step()
    phases(heap)
    heap.begin_step()  # what a step has left is there for the next one
    faults()
    again = faults()
    peak_bytes, num_returns = peak_host_bytes(0) - begin, heap.num_returns
    heap.end_steps()
    print(peak_bytes, num_returns, again, read_process_memory().resident_bytes - begin)
heap.make_room(1 << 60)
spare = read_process_memory().resident_bytes + 200 * MIB
staying = StepHeap(spare, 4 * MIB, is_ample=True)
reset_peak()
staying.begin_step()
phases(staying)
staying.end_steps()
faults()
kept = faults()
print(peak_host_bytes(0) - spare, staying.num_returns, kept)
return_blocks_at_once()
return_freed_blocks()
print(heap.num_returns, given_back, faults(), num_heaps(), int(uses_first_heap()))
"""

_THREADS = """
import threading
found = [num_heaps(), int(uses_first_heap())]
thread = threading.Thread(target=lambda: found.extend((int(uses_first_heap()), num_heaps())))
thread.start()
thread.join()
print(*found[:2], found[3], found[2])
"""


def run(script: str) -> list[list[int]]:
    answer = subprocess.run([sys.executable, "-c", _FAULTS + script], capture_output=True, text=True, check=True)
    return [list(map(int, line.split())) for line in answer.stdout.splitlines()]


def test_blocks_that_were_freed_are_used_again() -> None:
    [[given_back, kept, returned_bytes]] = run(_KEPT)
    assert given_back > 1000  # pages, huge or not
    assert kept < given_back / 10
    assert returned_bytes > 60 << 20


def test_in_steps_blocks_are_kept_as_far_as_the_budget_goes() -> None:
    tight, ample, staying, [num_returns, given_back, after, num_heaps, is_first] = run(_STEP)
    peak_bytes, tight_returns, kept, left_bytes = tight
    assert peak_bytes <= 200 << 20, "twelve phases made 1200 MiB"
    assert tight_returns > 0
    assert kept < given_back / 10
    assert left_bytes < 8 << 20, "when steps are over everything is given back"
    assert ample[1] == num_returns == 0, "nothing had to be given back, and outside of steps nothing is"
    assert ample[2] < given_back / 10
    assert staying[0] <= 0 < staying[1], "freed blocks that stay are bound too"
    assert staying[2] < given_back / 10, "behind the steps"
    assert after > 1000, "when steps are over blocks go back at once"
    assert (num_heaps, is_first) == (1, 1)


def test_a_thread_may_have_a_heap_of_its_own() -> None:
    assert run(_THREADS) == [[1, 1, 2, 0]]


def test_where_freed_blocks_are_kept_all_threads_have_one_heap() -> None:
    assert run("keep_freed_blocks()\n" + _THREADS) == [[1, 1, 1, 1]]


def test_where_blocks_cannot_be_kept_nothing_is_asked(monkeypatch) -> None:
    monkeypatch.setattr("outgrow.memory.allocator.keep_freed_blocks", lambda: False)
    heap = StepHeap(1, 0)
    heap.begin_step()
    heap.make_room(1 << 40)
    assert heap.num_returns == 0


def test_no_end_of_the_heap_is_too_large_to_be_kept() -> None:
    """Pages that nobody touches cost nothing: three GiB are asked for, and freed."""
    script = """
from outgrow.memory.heap_room import heap_bytes
keep_freed_blocks()
heap_bytes()  # nothing is made behind the blocks that stays
blocks = [torch.empty(768 << 20, dtype=torch.uint8) for _ in range(4)]
before, _ = heap_bytes()
while blocks:
    blocks.pop()
print(before, heap_bytes()[0])
"""
    [[before, after]] = run(script)
    assert before >= 3 << 30
    assert after == before
