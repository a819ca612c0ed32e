"""Mail between ranks that share no memory: torch.distributed, one message for all tensors of a key.

Owns the tags that messages are matched by. Sends are asynchronous and keep their contents until they are through. A
rank that fails can tell nobody here: the others learn it when the group's own time is over.
"""

import threading
import zlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from .mail import Key, Mail

__all__ = ["MessageMail"]

_ALIGN_BYTES = 64


class MessageMail(Mail):
    """See `Mail`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self._step = 0
        self._sending = threading.Lock()  # of who notes what is on its way
        self._pending: list[tuple[Any, torch.Tensor]] = []

    def begin(self, step: int) -> None:
        self._step = step

    def send(self, to: int, key: Key, tensors: Sequence[torch.Tensor | None], likes: Sequence[torch.Tensor]) -> None:
        # The whole length goes in any case: a receiver must not have to ask for it.
        content = torch.zeros(_bytes(likes), dtype=torch.uint8)
        for number, tensor in enumerate(tensors):
            content[number] = tensor is not None
        start = _flag_bytes(tensors)
        for tensor in tensors:
            if tensor is not None:
                part = content[start : start + tensor.nbytes].view(tensor.dtype)
                part.view(tensor.shape).copy_(tensor.detach())
                start += _aligned(tensor.nbytes)
        work = dist.isend(content, group=self.group, group_dst=to, tag=self._tag(key))
        with self._sending:
            self._pending = [each for each in self._pending if not each[0].is_completed()] + [(work, content)]

    def receive(self, sender: int, key: Key, likes: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        content = torch.empty(_bytes(likes), dtype=torch.uint8)
        dist.recv(content, group=self.group, group_src=sender, tag=self._tag(key))
        result: list[torch.Tensor | None] = []
        start = _flag_bytes(likes)
        for number, like in enumerate(likes):
            if not content[number]:
                result.append(None)
                continue
            result.append(content[start : start + like.nbytes].view(like.dtype).view(like.shape).clone())
            start += _aligned(like.nbytes)
        return result

    def exchange(self, what: str, values: Sequence[float]) -> torch.Tensor:
        rows = torch.empty(self.size * len(values), dtype=torch.float64)
        dist.all_gather_single(rows, torch.tensor(values, dtype=torch.float64), group=self.group)
        return rows.view(self.size, len(values))

    def fail(self, message: str, for_good: bool = False) -> None:
        """Nothing: there is no way past the messages that the others wait for."""

    def close(self) -> None:
        self._pending = []

    def _tag(self, key: Key) -> int:
        return zlib.crc32(repr((self._step, key)).encode()) & 0x7FFFFFFF


def _flag_bytes(tensors: Sequence[Any]) -> int:
    return _aligned(len(tensors))


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    return _flag_bytes(tensors) + sum(_aligned(tensor.nbytes) for tensor in tensors)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
