"""Behind the second step the heap has what the next ones need; never more than the budget leaves."""

import subprocess
import sys

from outgrow.memory.heap_room import HeapRoom

MIB = 1 << 20
_STEPS = """
import resource, torch
from outgrow.memory.allocator import keep_freed_blocks
from outgrow.memory.heap_room import HeapRoom, heap_bytes
from outgrow.memory.process import read_process_memory

MIB = 1 << 20

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step(num_mib):
    blocks = [torch.ones(20 * MIB, dtype=torch.uint8) for _ in range(num_mib // 20)]
    before = faults()
    blocks.append(torch.ones(40 * MIB, dtype=torch.uint8))  # what the last step's blocks leave is too short for it
    return faults() - before

keep_freed_blocks()
room = HeapRoom(BUDGET)
step(240)
room.end_step()
print(room.taken_bytes)
step(240)
before = read_process_memory().resident_bytes
room.end_step()
print(room.taken_bytes, read_process_memory().resident_bytes - before, step(280))
for _ in range(3):
    room.end_step()
print(room.taken_bytes)
again = HeapRoom(None)  # another engine, whose steps find what they need
for _ in range(2):
    step(280)
    again.end_step()
print(again.taken_bytes)
"""


def run(script: str) -> list[list[int]]:
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return [list(map(int, line.split())) for line in answer.stdout.splitlines()]


def test_the_second_step_makes_the_heap_a_third_larger_and_the_next_one_meets_no_page_faults() -> None:
    [first], [taken_bytes, resident_bytes, faults], [later], [again] = run(_STEPS.replace("BUDGET", "None"))
    assert first == 0, "behind the first step nothing is known yet"
    assert 60 * MIB < taken_bytes < 150 * MIB
    assert abs(resident_bytes - taken_bytes) < 8 * MIB, "its pages are there"
    assert faults < 100, "a larger step"
    assert later == taken_bytes, "once"
    assert again == 0


def test_no_more_is_taken_than_a_quarter_of_what_the_budget_leaves() -> None:
    budget = "read_process_memory().resident_bytes + 600 * MIB"
    [first], [taken_bytes, *_], *_ = run(_STEPS.replace("BUDGET", budget))
    assert first == 0
    assert 20 * MIB < taken_bytes <= 85 * MIB, "about 300 MiB are left behind the second step"
    tight = "read_process_memory().resident_bytes + 300 * MIB"
    assert run(_STEPS.replace("BUDGET", tight))[1][0] == 0


def test_where_the_c_library_says_nothing_nothing_is_taken(monkeypatch) -> None:
    monkeypatch.setattr("outgrow.memory.heap_room.heap_bytes", lambda: (0, 0))
    room = HeapRoom(None)
    for _ in range(3):
        room.end_step()
    assert room.taken_bytes == 0


def test_a_process_that_may_have_no_more_goes_on_with_what_it_has() -> None:
    limited = """
import resource
step(240)
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used, used))
for _ in range(2):
    room.end_step()
print(room.taken_bytes)
"""
    begin = _STEPS[: _STEPS.index("step(240)\nroom")].replace("BUDGET", "None")
    assert run(begin + limited) == [[0]]
