"""Memory that the ranks of one host share.

Owns anonymous segments: made by one rank with `memfd_create`, opened by its peers through `/proc`. They have no name,
so nothing stays behind when processes are killed, and no mount limits their size. Does not own what is kept in them
(`parallel/collectives.py`).
"""

import mmap
import os
import secrets
from pathlib import Path

import torch
import torch.distributed as dist

__all__ = ["SharedSegment", "can_share", "open_segment"]

_TOKEN_BYTES = 64  # the head of a segment; also keeps what follows aligned


class SharedSegment:
    """`num_bytes` that all ranks of a group see. `tensor` is uint8 [num_bytes], 64-byte aligned, zero at first.

    The pages that a rank never touches cost it nothing; the pages that several ranks touch exist once.
    """

    def __init__(self, memory: mmap.mmap, num_bytes: int) -> None:
        self._memory = memory
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8, offset=_TOKEN_BYTES, count=num_bytes)

    def view(self, dtype: torch.dtype, start_bytes: int, num_elems: int) -> torch.Tensor:
        """`num_elems` of `dtype` from byte `start_bytes` on, flat."""
        return self.tensor[start_bytes : start_bytes + num_elems * dtype.itemsize].view(dtype)


def can_share(group: dist.ProcessGroup) -> bool:
    """Whether all ranks of the group run on one host and can open each other's memory. Collective."""
    try:
        open_segment(group, 64)
    except OSError:
        return False
    return True


def open_segment(group: dist.ProcessGroup, num_bytes: int) -> SharedSegment:
    """Make a segment on the group's first rank and open it on all. Collective.

    Raises:
        OSError: on every rank, if one rank could not make or open it; the message has every rank's reason.
    """
    rank = dist.get_rank(group)
    whole_bytes = max(num_bytes, 1) + _TOKEN_BYTES
    descriptor, token, offer, failure = -1, b"", None, None
    if rank == 0:
        try:
            token = secrets.token_bytes(_TOKEN_BYTES)
            descriptor = os.memfd_create("outgrow", os.MFD_CLOEXEC)
            os.ftruncate(descriptor, whole_bytes)
            os.pwrite(descriptor, token, 0)
            offer = (os.getpid(), descriptor, token)
        except (OSError, AttributeError) as error:
            failure = f"rank 0 could not make {whole_bytes} shared bytes: {error}"
    box = [offer]
    dist.broadcast_object_list(box, group=group, group_src=0)
    memory: mmap.mmap | None = None
    if box[0] is not None:
        pid, peer_descriptor, token = box[0]
        try:
            if rank != 0:
                descriptor = os.open(Path(f"/proc/{pid}/fd/{peer_descriptor}"), os.O_RDWR | os.O_CLOEXEC)
            if os.pread(descriptor, _TOKEN_BYTES, 0) != token:
                raise OSError("that process is another one: the ranks do not share a host or a process namespace")
            memory = mmap.mmap(descriptor, whole_bytes, mmap.MAP_SHARED)
        except OSError as error:
            failure = f"rank {rank} could not open rank 0's shared memory: {error}"
    failures: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(failures, failure, group=group)
    if descriptor >= 0:
        os.close(descriptor)  # the mapping keeps the memory alive
    reasons = [reason for reason in failures if reason]
    if reasons or memory is None:
        raise OSError("; ".join(reasons) or "no shared memory")
    return SharedSegment(memory, max(num_bytes, 1))
