"""Memory that is computed in and memory that is not: the device's and the host's arenas, and copies between the two.

Owns one arena for each tier, the memory of what stays on a tier, and the primitives by which a lane's thread copies
from one to the other. Does not own offsets (`memory/arena.py`, at compile time), when something is copied (programs),
nor the disk (`memory/disk.py`).

    HostTier            page-aligned memory of exact size; registered with CUDA where copies are to be asynchronous
    SimulatedDevice     host memory that plays the device: every path but the copies' own primitives is the same
    CudaDevice          one CUDA device: each lane's thread copies on a stream of its own

A copy is done when `copying()` is left: whoever depends on an action that copied may use its bytes at once, whatever
stream it computes on. What is copied from the device, or over what was read there, waits for the computing that was
queued before (`computed()`), and only for that: copies run beside the unit that computes now.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from .chunk import ALIGN_BYTES
from .direct_io import AlignedBuffer

__all__ = ["CudaDevice", "DeviceTier", "HostTier", "SimulatedDevice", "Tiers", "open_tiers"]

Places = Mapping[str, tuple[int, int]]
"""Buffer -> its first byte and its bytes in an arena."""


def _cut(memory: torch.Tensor, places: Places) -> dict[str, torch.Tensor]:
    """The buffers in `memory` (uint8), each with a storage of its own: by that a view tells whose bytes it sees."""
    return {name: torch.from_dlpack(memory[start : start + size]) for name, (start, size) in places.items()}


def _end_of(places: Places) -> int:
    return max((start + size for start, size in places.values()), default=0)


class _AlignedArena:
    """An arena in page-aligned host memory. Its pages take memory from their first use on, or at once."""

    def __init__(self, places: Places, pins: bool = False, takes_pages: bool = False) -> None:
        self.num_bytes = _end_of(places)
        self._memory = AlignedBuffer(self.num_bytes) if self.num_bytes else None
        if takes_pages and self._memory is not None:
            self._memory.take_pages()
        self._pinned: list[int] = []
        self.buffers: dict[str, torch.Tensor] = {}
        if self._memory is not None:
            whole = self._memory.tensor()
            if pins:
                self._pinned.append(_pin(whole))
            self.buffers = _cut(whole, places)

    def close(self) -> None:
        """Give the memory back, once the last view of it is gone."""
        self.buffers = {}
        for address in self._pinned:
            _unpin(address)
        self._pinned = []
        if self._memory is not None:
            self._memory.close()


class HostTier:
    """Host memory.

    Args:
        pins: whether copies to and from it are to be asynchronous for CUDA. What is pinned has exactly the size that
            was asked for (to whole pages): nothing is rounded up to powers of two.
    """

    def __init__(self, pins: bool = False) -> None:
        self._pins = pins
        self._arena = _AlignedArena({})
        self._kept: list[tuple[AlignedBuffer, int]] = []

    def lay_out(self, places: Places, takes_pages: bool = False) -> None:
        """Make the arena, in place of the one before.

        Args:
            takes_pages: at once, not at their first uses.
        """
        self._arena.close()
        self._arena = _AlignedArena(places, self._pins, takes_pages)

    def buffer(self, name: str) -> torch.Tensor:
        """A buffer of the arena: uint8, flat, page-aligned."""
        return self._arena.buffers[name]

    def empty(self, num_elems: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory for what stays on the host from step to step: flat, without values."""
        if not self._pins:
            return torch.empty(num_elems, dtype=dtype)
        memory = AlignedBuffer(max(num_elems * dtype.itemsize, 1))
        self._kept.append((memory, _pin(memory.tensor())))
        return memory.tensor(dtype)[:num_elems]

    @property
    def arena_bytes(self) -> int:
        return self._arena.num_bytes

    def close(self) -> None:
        self._arena.close()
        for memory, address in self._kept:
            _unpin(address)
            memory.close()
        self._kept = []


class DeviceTier(ABC):
    """Memory that is computed in, apart from the host's."""

    device: torch.device

    @abstractmethod
    def lay_out(self, places: Places) -> None:
        """Make the arena, in place of the one before."""

    @abstractmethod
    def buffer(self, name: str) -> torch.Tensor:
        """A buffer of the arena: uint8, flat, aligned as kernels like it."""

    @property
    @abstractmethod
    def arena_bytes(self) -> int: ...

    @abstractmethod
    def computed(self) -> None:
        """The compute lane has given out all the work of an action."""

    @abstractmethod
    def copying(self) -> AbstractContextManager[None]:
        """A context for a lane's thread: copies that begin in it wait for what was computed before, and are done when
        it is left."""

    def empty(self, num_elems: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory for what stays on the device from step to step: flat, without values."""
        return torch.empty(num_elems, dtype=dtype, device=self.device)

    def bring(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the device, in memory of its own."""
        return torch.empty_like(tensor, device=self.device).copy_(tensor)

    @abstractmethod
    def close(self) -> None:
        """Give the arena back."""


class SimulatedDevice(DeviceTier):
    """A part of the host's memory that is treated as if it were a device's: nothing is computed outside of it."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._arena = _AlignedArena({})

    def bring(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy at the same place within a cache line: on some processors the bits of a matrix product depend on where
        its operands lie, and a micro-batch is a slice of a batch."""
        if tensor.layout is not torch.strided or tensor.numel() == 0:
            return super().bring(tensor)
        memory = torch.empty(tensor.numel() * tensor.itemsize + ALIGN_BYTES, dtype=torch.uint8)
        begin = (tensor.data_ptr() - memory.data_ptr()) % ALIGN_BYTES
        flat = memory[begin : begin + tensor.numel() * tensor.itemsize].view(tensor.dtype)
        return flat.as_strided(tensor.shape, torch.empty_like(tensor, device="meta").stride()).copy_(tensor)

    def lay_out(self, places: Places) -> None:
        self._arena.close()
        self._arena = _AlignedArena(places)

    def buffer(self, name: str) -> torch.Tensor:
        return self._arena.buffers[name]

    @property
    def arena_bytes(self) -> int:
        return self._arena.num_bytes

    def computed(self) -> None:
        """Nothing is queued: it is computed already."""

    def copying(self) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self) -> None:
        self._arena.close()


class CudaDevice(DeviceTier):
    """One CUDA device.

    Raises:
        ValueError: there is none.
    """

    def __init__(self, index: int = 0) -> None:
        if not torch.cuda.is_available():
            raise ValueError("there is no CUDA device on this machine")
        self.device = torch.device("cuda", index)
        self._memory: torch.Tensor | None = None
        self._buffers: dict[str, torch.Tensor] = {}
        self._lock = threading.Lock()
        self._computed: torch.cuda.Event | None = None
        self._streams: dict[int, torch.cuda.Stream] = {}  # of a lane's thread

    def lay_out(self, places: Places) -> None:
        self._buffers, self._memory = {}, None
        if num_bytes := _end_of(places):
            self._memory = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
            self._buffers = _cut(self._memory, places)

    def buffer(self, name: str) -> torch.Tensor:
        return self._buffers[name]

    @property
    def arena_bytes(self) -> int:
        return 0 if self._memory is None else self._memory.numel()

    def computed(self) -> None:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        with self._lock:
            self._computed = event

    @contextmanager
    def copying(self) -> Iterator[None]:
        with self._lock:
            event = self._computed
            stream = self._streams.get(threading.get_ident())
            if stream is None:
                stream = self._streams[threading.get_ident()] = torch.cuda.Stream(self.device)
        with torch.cuda.stream(stream):
            if event is not None:
                stream.wait_event(event)
            yield
        stream.synchronize()

    def close(self) -> None:
        self._buffers, self._memory = {}, None


def _pin(memory: torch.Tensor) -> int:
    """Register host memory with CUDA, so that it is copied from and to without a stop in between; its address."""
    cudart = torch.cuda.cudart()
    assert cudart is not None
    torch.cuda.check_error(int(cudart.cudaHostRegister(memory.data_ptr(), memory.numel(), 0)))
    return memory.data_ptr()


def _unpin(address: int) -> None:
    cudart = torch.cuda.cudart()
    assert cudart is not None
    torch.cuda.check_error(int(cudart.cudaHostUnregister(address)))


@dataclass(frozen=True)
class Tiers:
    """The host's and the device's memory, where they are not the same."""

    host: HostTier
    device: DeviceTier

    def close(self) -> None:
        """Give both arenas back."""
        self.device.close()
        self.host.close()


def open_tiers() -> Tiers:
    """The tiers of this machine: those of its CUDA device, or else the host's memory with a part that plays one."""
    if torch.cuda.is_available():
        return Tiers(HostTier(pins=True), CudaDevice(torch.cuda.current_device()))
    return Tiers(HostTier(), SimulatedDevice())
