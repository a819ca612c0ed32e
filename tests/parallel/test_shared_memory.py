"""Memory shared by real processes: one copy, no names left behind, a clear no where it cannot be."""

import gc
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from outgrow.parallel import shared_memory
from outgrow.parallel.shared_memory import can_share, open_segment


def group() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world


def mapped(word: str) -> list[str]:
    """The lines of this process's memory map that speak of `word`."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if word in line]


def open_descriptors() -> set[str]:
    return {os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()}


def write_and_read(rank: int) -> tuple[list[float], int, list[float], bool]:
    segment = open_segment(group(), 64 * 4)
    fresh = bool((segment.tensor == 0).all())
    dist.barrier()
    view = segment.view(torch.float32, 128, 8)
    view[rank] = rank + 1.0
    dist.barrier()
    seen = view.tolist()
    untouched = segment.view(torch.float32, 0, 32).tolist()
    dist.barrier()
    return seen, segment.tensor.numel(), untouched, fresh


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_every_rank_sees_what_the_others_wrote(num_ranks):
    for seen, num_bytes, untouched, fresh in run_ranks(write_and_read, num_ranks):
        assert seen == [*(rank + 1.0 for rank in range(num_ranks)), *[0.0] * (8 - num_ranks)]
        assert num_bytes == 256
        assert untouched == [0.0] * 32
        assert fresh


def traces_left(rank: int) -> dict[str, object]:
    segment = open_segment(group(), 1 << 16)
    address = segment.tensor.data_ptr()
    found = {
        "aligned": address % 64,
        "mapped": len(mapped("memfd:outgrow")),
        "named": len(mapped("/dev/shm")),
    }
    dist.barrier()
    view = segment.view(torch.float32, 0, 4)
    del segment
    gc.collect()
    found["while viewed"] = len(mapped("memfd:outgrow"))
    view[0] = 1.0  # the memory lives as long as a view of it
    del view
    gc.collect()
    found["after"] = len(mapped("memfd:outgrow"))
    found["open after"] = [link for link in open_descriptors() if "memfd:" in link]
    return found


def test_a_segment_has_no_name_and_goes_with_its_last_view():
    for found in run_ranks(traces_left, 2):
        assert found == {"aligned": 0, "mapped": 1, "named": 0, "while viewed": 1, "after": 0, "open after": []}


def many_segments(rank: int) -> list[float]:
    segments = [open_segment(group(), 64) for _ in range(5)]
    for number, segment in enumerate(segments):
        segment.view(torch.float32, 0, 4)[rank] = 10.0 * number + rank
    dist.barrier()
    seen = [segment.view(torch.float32, 0, 4)[1 - rank].item() for segment in segments]
    dist.barrier()
    return seen


def test_segments_are_apart():
    assert run_ranks(many_segments, 2) == [[10.0 * n + 1 for n in range(5)], [10.0 * n for n in range(5)]]


def empty_segment(rank: int) -> int:
    return open_segment(group(), 0).tensor.numel()


def test_a_segment_of_nothing_can_be_opened():
    assert run_ranks(empty_segment, 2) == [1, 1]


def refuse(rank: int, how: str) -> tuple[bool, str, list[str]]:
    """Break sharing in one way on one rank; what both ranks find then."""
    real_open = shared_memory.os.open
    if how == "peer cannot open" and rank == 1:

        def forbidden(path: object, flags: int) -> int:
            raise PermissionError(13, "not allowed here", str(path))

        shared_memory.os.open = forbidden  # pyright: ignore[reportAttributeAccessIssue]
    elif how == "another process" and rank == 1:  # the pid means another process in this rank's namespace
        shared_memory.os.open = lambda _path, _flags: os.memfd_create("somebody else's")  # pyright: ignore[reportAttributeAccessIssue]
    elif how == "nothing to make" and rank == 0:

        def no_memory(*_: object) -> int:
            raise OSError(12, "out of memory")

        shared_memory.os.memfd_create = no_memory  # pyright: ignore[reportAttributeAccessIssue]
    shares = can_share(group())
    message = ""
    try:
        open_segment(group(), 64)
    except OSError as error:
        message = str(error)
    shared_memory.os.open = real_open
    gc.collect()
    return shares, message, [link for link in open_descriptors() if "memfd:" in link]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("peer cannot open", "rank 1 could not open rank 0's shared memory: .*not allowed here"),
        ("another process", "rank 1 could not open .*that process is another one"),
        ("nothing to make", "rank 0 could not make 128 shared bytes: .*out of memory"),
    ],
)
def test_if_one_rank_cannot_share_all_ranks_say_so_and_why(how, reason):
    outcomes = run_ranks(refuse, 2, how)
    for shares, message, descriptors in outcomes:
        assert shares is False
        with pytest.raises(OSError, match=reason):
            raise OSError(message)
        assert descriptors == []


def sharing(rank: int) -> bool:
    return can_share(group())


def test_ranks_of_one_host_can_share():
    assert run_ranks(sharing, 3) == [True, True, True]
