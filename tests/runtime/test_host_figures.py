"""What a process takes beside its model."""

import mmap
import os
from pathlib import Path

import torch

from outgrow.runtime.host_figures import process_bytes

SHARED = Path("/dev/shm")
NUM_BYTES = 32 << 20
SLACK_BYTES = 8 << 20


def test_parameters_that_others_wrote_count_as_resident_as_they_will_be() -> None:
    path = SHARED / f"outgrow-test-{os.getpid()}"
    try:
        with path.open("w+b") as file:
            file.truncate(NUM_BYTES)
            with mmap.mmap(file.fileno(), NUM_BYTES) as another_rank:
                another_rank.write(b"\1" * NUM_BYTES)
        before = process_bytes([])
        parameter = torch.from_file(str(path), shared=True, size=NUM_BYTES, dtype=torch.uint8)
        assert abs(process_bytes([parameter]) - before) < SLACK_BYTES
        assert process_bytes([]) > before + NUM_BYTES - SLACK_BYTES
    finally:
        path.unlink(missing_ok=True)


def test_parameters_without_values_take_nothing() -> None:
    before = process_bytes([])
    assert abs(process_bytes([torch.empty(NUM_BYTES, device="meta")]) - before) < SLACK_BYTES
