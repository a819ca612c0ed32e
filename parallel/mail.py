"""What the ranks of a pipeline send each other: tensors to one rank, numbers to all.

Owns how messages get there; a message is found by its key, whatever the order in which messages come. Does not own when
they are sent (programs) nor what they are for. One thread receives at a time, beside others that send; `fail` may come
from any.

    SharedMail    ranks on one host: contents in shared memory that the sender owns, notes of them in a pipe of the
                  receiver, which sleeps in the kernel until one comes
    MessageMail   torch.distributed everywhere else (`message_mail.py`)

A sender never waits: it makes another buffer where the receiver has not emptied the last one, and uses buffers again.
"""

import os
import pickle
import select
import struct
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from mmap import MAP_SHARED, mmap
from typing import Any

import torch
import torch.distributed as dist

from ..memory.errors import OutgrowError

__all__ = ["Key", "Mail", "MailError", "SharedMail"]

Key = tuple[str, int, int]
"""What a message is (`SEND_F`), of which stage or chunk, of which micro-batch."""

_ALIGN_BYTES = 64
_FOR_GOOD = (1 << 32) - 1  # a step that never comes
_DESCRIPTION_BYTES = 2048  # of a note; below PIPE_BUF, so that notes of several senders do not mix
_HEAD = struct.Struct("<HHIiqq")  # length, sender, step, buffer, bytes of the buffer, bytes of the content


class MailError(OutgrowError):
    """Another rank of the pipeline failed, has gone, or does not answer."""


@dataclass(frozen=True, slots=True)
class _Note:
    sender: int
    step: int
    buffer: int  # descriptor in the sender's process; -1: none
    room_bytes: int
    num_bytes: int
    words: Any


class Mail(ABC):
    """The exchange between the ranks of one pipeline.

    Attributes:
        rank, size: in the pipeline.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    @abstractmethod
    def begin(self, step: int) -> None:
        """A step begins: what earlier ones have left is forgotten. Every rank counts alike."""

    @abstractmethod
    def send(self, to: int, key: Key, tensors: Sequence[torch.Tensor | None], likes: Sequence[torch.Tensor]) -> None:
        """Send tensors, None for those that there are not. Their values are taken now.

        Args:
            likes: as the receiver gives them.
        """

    @abstractmethod
    def receive(self, sender: int, key: Key, likes: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """Wait for a message.

        Args:
            likes: tensors (their values do not matter) of the shapes and dtypes that were sent.

        Raises:
            MailError: the sender has failed, or has gone, or nothing came within the deadline.
        """

    @abstractmethod
    def exchange(self, what: str, values: Sequence[float]) -> torch.Tensor:
        """Every rank's `values`: float64 [size, len(values)]. Also a barrier."""

    @property
    def forgets(self) -> bool:
        """Whether a step that failed leaves nothing behind: the next one can begin as if it had not been."""
        return False

    @abstractmethod
    def fail(self, message: str, for_good: bool = False) -> None:
        """Tell the others that this step will not be finished here, or, `for_good`, no other one either."""

    @abstractmethod
    def close(self) -> None:
        """Let go of all memory. May be repeated."""


class SharedMail(Mail):
    """Ranks of one host. Collective.

    Args:
        deadline_s: how long to wait for one message.

    Raises:
        OSError: on every rank, if one could not open another's pipe.
    """

    def __init__(self, group: dist.ProcessGroup, deadline_s: float = 1800.0) -> None:
        super().__init__(group)
        self._deadline_s = deadline_s
        self._step = 0
        self._read, self._own = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._ends: tuple[int, ...] = (self._read, self._own)
        offers: list[Any] = [None] * self.size
        dist.all_gather_object(offers, (os.getpid(), self._own), group=group)
        self._pids = [pid for pid, _ in offers]
        self._pipes: list[int] = []
        self._processes: list[int] = []
        failure = None
        try:
            for rank, (pid, descriptor) in enumerate(offers):
                mine = rank == self.rank
                path = f"/proc/{pid}/fd/{descriptor}"
                self._pipes.append(self._own if mine else os.open(path, os.O_WRONLY | os.O_CLOEXEC))
                if not mine:
                    self._processes.append(os.pidfd_open(pid))
            self._try_sharing()
        except OSError as error:
            failure = f"rank {self.rank} cannot open what another rank made: {error}"
        failures: list[str | None] = [None] * self.size
        dist.all_gather_object(failures, failure, group=group)
        self._poll = select.poll()
        for descriptor in (self._read, *self._processes):
            self._poll.register(descriptor, select.POLLIN)
        self._reading = threading.Lock()  # of who takes what has come: a sender, but not from under a receiver
        self._rest = b""
        self._arrived: dict[tuple[int, int, Key], _Note] = {}
        self._given_up: dict[int, str] = {}  # step -> what another rank said
        self._buffers: dict[int, mmap] = {}  # own ones: descriptor -> memory
        self._free: dict[int, list[int]] = {}  # their bytes -> those that are empty
        self._opened: dict[tuple[int, int], mmap] = {}  # others' ones
        if any(failures):
            self.close()
            raise OSError("; ".join(each for each in failures if each))

    def _try_sharing(self) -> None:
        """Raise OSError where a peer's descriptors are another process namespace's."""
        for rank, descriptor in enumerate(self._pipes):
            if rank != self.rank and not os.readlink(f"/proc/self/fd/{descriptor}").startswith("pipe:"):
                raise OSError(f"what rank {rank} offers is no pipe: the ranks do not share a host")

    def begin(self, step: int) -> None:
        self._step = step
        self._given_up = {at: said for at, said in self._given_up.items() if at >= step}
        self._arrived = {at: note for at, note in self._arrived.items() if note.step >= step or self._give_back(note)}

    def send(self, to: int, key: Key, tensors: Sequence[torch.Tensor | None], likes: Sequence[torch.Tensor]) -> None:
        present = [tensor is not None for tensor in tensors]
        parts = [tensor.detach() for tensor in tensors if tensor is not None]
        num_bytes = sum(_aligned(part.nbytes) for part in parts)
        buffer, room_bytes = self._buffer(num_bytes)
        start = 0
        for part in parts:
            _view(self._buffers[buffer], start, part).copy_(part)
            start += _aligned(part.nbytes)
        self._write(to, buffer, room_bytes, num_bytes, (key, present))

    def receive(self, sender: int, key: Key, likes: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        note = self._await(sender, key)
        _, present = note.words
        assert len(present) == len(likes), f"{key} has {len(present)} tensors, {len(likes)} were expected"
        wanted = sum(_aligned(like.nbytes) for like, there in zip(likes, present, strict=True) if there)
        assert wanted == note.num_bytes, f"{key} has {note.num_bytes} bytes, {wanted} were expected"
        result: list[torch.Tensor | None] = []
        start = 0
        for like, there in zip(likes, present, strict=True):
            if there:
                memory = self._memory(sender, note.buffer, note.room_bytes)
                result.append(_view(memory, start, like).clone())
                start += _aligned(like.nbytes)
            else:
                result.append(None)
        self._give_back(note)
        return result

    def exchange(self, what: str, values: Sequence[float]) -> torch.Tensor:
        key = (what, -1, -1)
        for peer in range(self.size):
            if peer != self.rank:
                self._write(peer, -1, 0, 0, (key, list(values)))
        rows = [list(values) if p == self.rank else self._await(p, key).words[1] for p in range(self.size)]
        return torch.tensor(rows, dtype=torch.float64)

    @property
    def forgets(self) -> bool:
        return True

    def fail(self, message: str, for_good: bool = False) -> None:
        for peer in range(self.size):
            with suppress(OSError, MailError):  # it has gone
                self._write(peer, -1, 0, 0, (None, message[:500]), _FOR_GOOD if for_good else None)

    def close(self) -> None:
        for descriptor in {*self._ends, *self._pipes, *self._processes, *self._buffers}:
            os.close(descriptor)
        self._ends, self._pipes, self._processes, self._buffers, self._opened = (), [], [], {}, {}

    # ---- notes

    def _write(
        self, to: int, buffer: int, room_bytes: int, num_bytes: int, words: Any, step: int | None = None
    ) -> None:
        body = pickle.dumps(words)
        assert len(body) <= _DESCRIPTION_BYTES, f"a note of {len(body)} bytes is too long"
        note = (
            _HEAD.pack(len(body), self.rank, self._step if step is None else step, buffer, room_bytes, num_bytes) + body
        )
        try:
            os.write(self._pipes[to], note)
        except BrokenPipeError:
            raise MailError(f"rank {to} of the pipeline has left") from None

    def _await(self, sender: int, key: Key) -> _Note:
        with self._reading:
            return self._awaited(sender, key, time.monotonic() + self._deadline_s)

    def _awaited(self, sender: int, key: Key, until: float) -> _Note:
        while (note := self._arrived.pop((sender, self._step, key), None)) is None:
            for step in (self._step, _FOR_GOOD):
                if step in self._given_up:
                    raise MailError(self._given_up[step])
            rest_s = until - time.monotonic()
            if rest_s <= 0:
                raise MailError(f"{_name(key)} of rank {sender} did not come within {self._deadline_s:g} s")
            ready = {descriptor for descriptor, _ in self._poll.poll(rest_s * 1000)}
            if self._read in ready:
                self._take()
            elif ready:
                gone = [self._pids[rank] for rank in range(self.size) if rank != self.rank and not self._lives(rank)]
                raise MailError(f"a rank of the pipeline has ended (process {', '.join(map(str, gone))})")
        return note

    def _lives(self, rank: int) -> bool:
        place = rank - (rank > self.rank)
        return not select.select([self._processes[place]], [], [], 0)[0]

    def _take(self) -> None:
        """Read what has come."""
        while True:
            try:
                content = os.read(self._read, 1 << 16)
            except BlockingIOError:
                break
            self._rest += content
            if len(content) < 1 << 16:
                break
        while len(self._rest) >= _HEAD.size:
            length, sender, step, buffer, room_bytes, num_bytes = _HEAD.unpack_from(self._rest)
            end = _HEAD.size + length
            if len(self._rest) < end:
                break
            words = pickle.loads(self._rest[_HEAD.size : end])
            self._rest = self._rest[end:]
            note = _Note(sender, step, buffer, room_bytes, num_bytes, words)
            if words is None:  # a buffer of this rank is empty again
                self._free.setdefault(room_bytes, []).append(buffer)
            elif words[0] is None:  # for those who wait in that step: this rank may still have an earlier one to end
                self._given_up.setdefault(step, f"rank {sender} of the pipeline gave the step up: {words[1]}")
            elif step < self._step:
                self._give_back(note)
            else:
                self._arrived[sender, step, words[0]] = note

    # ---- buffers

    def _buffer(self, num_bytes: int) -> tuple[int, int]:
        """An empty buffer of this rank, and its bytes."""
        if self._reading.acquire(blocking=False):
            try:
                self._take()
            finally:
                self._reading.release()
        room_bytes = max(1 << 12, 1 << (num_bytes - 1).bit_length()) if num_bytes else 1 << 12
        with suppress(IndexError):
            return self._free.setdefault(room_bytes, []).pop(), room_bytes
        descriptor = os.memfd_create("outgrow-mail", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, room_bytes)
        self._buffers[descriptor] = mmap(descriptor, room_bytes, MAP_SHARED)
        return descriptor, room_bytes

    def _memory(self, sender: int, descriptor: int, room_bytes: int) -> mmap:
        found = self._opened.get((sender, descriptor))
        if found is None:
            opened = os.open(f"/proc/{self._pids[sender]}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
            found = self._opened[sender, descriptor] = mmap(opened, room_bytes, MAP_SHARED)
            os.close(opened)
        return found

    def _give_back(self, note: _Note) -> bool:
        if note.buffer >= 0:
            self._write(note.sender, note.buffer, note.room_bytes, 0, None)
        return False


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGN_BYTES) * _ALIGN_BYTES


def _view(memory: mmap, start_bytes: int, like: torch.Tensor) -> torch.Tensor:
    if not like.numel():
        return torch.empty_like(like)
    flat = torch.frombuffer(memory, dtype=like.dtype, offset=start_bytes, count=like.numel())
    return flat.view(like.shape)


def _name(key: Key) -> str:
    what, index, micro_batch = key
    return f"{what} s{index}.{micro_batch}" if index >= 0 else what
