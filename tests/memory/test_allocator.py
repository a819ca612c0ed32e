"""Freed blocks are kept: a second use of the same size meets no page fault."""

import subprocess
import sys

_SCRIPT = """
import resource, torch
from outgrow.memory.allocator import keep_freed_blocks, return_freed_blocks
from outgrow.memory.process import read_process_memory

def faults(num_bytes=64 << 20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.ones(num_bytes, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults()
assert keep_freed_blocks()
faults(96 << 20)  # something larger was there before: small blocks beside it do not matter then
again = min(faults() for _ in range(3))  # where the heap begins is a matter of luck
kept_bytes = read_process_memory().resident_bytes
assert return_freed_blocks()
print(given_back, again, kept_bytes - read_process_memory().resident_bytes)
"""


def test_blocks_that_were_freed_are_used_again() -> None:
    answer = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True)
    given_back, kept, returned_bytes = map(int, answer.stdout.split())
    assert given_back > 1000  # pages, huge or not
    assert kept < given_back / 10
    assert returned_bytes > 60 << 20
