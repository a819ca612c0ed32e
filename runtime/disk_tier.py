"""One rank's disk tier: its store, and the arena in host memory that reads and writes go through.

Owns the store's life, the arena and the buffers in it. Does not own what lies where on disk (`memory/disk.py`), the
buffers' offsets (`memory/arena.py`, at compile time), nor when something moves (programs).
"""

from collections.abc import Mapping

import torch

from ..memory.direct_io import AlignedBuffer, DirectIO, round_up
from ..memory.disk import DiskStatistics, DiskStore, ExtentSpec
from ..scheduler.program import Program

__all__ = ["DiskTier"]


class DiskTier:
    """Extents by name (`c7:param`, `c7:optim`) on disk, and for each a buffer in the arena that has its size.

    Args:
        folder: on the disk.
        run, rank: name the file.
        extents: name -> bytes; all that will ever be stored. Sizes are rounded up to whole pages.
        limit_bytes: of the file, or None.
        io: the system calls, for tests.

    Raises: as `DiskStore`.
    """

    def __init__(
        self,
        folder: str,
        run: str,
        rank: int,
        extents: Mapping[str, int],
        limit_bytes: int | None = None,
        io: DirectIO | None = None,
    ) -> None:
        specs = [ExtentSpec(name, round_up(num_bytes)) for name, num_bytes in extents.items()]
        self._store = DiskStore(folder, run, rank, specs, limit_bytes=limit_bytes, io=io)
        self._sizes = {spec.name: spec.num_bytes for spec in specs}
        self._arena: AlignedBuffer | None = None
        self._buffers: dict[str, torch.Tensor] = {}

    def lay_out(self, program: Program) -> None:
        """Make the arena that a program's buffers lie in. Its pages take memory from their first use on."""
        self._buffers = {}
        if self._arena is not None:
            self._arena.close()
        num_bytes = program.arena_bytes("host")
        self._arena = AlignedBuffer(num_bytes) if num_bytes else None
        for buffer in program.buffers:
            assert self._arena is not None
            part = self._arena.padded[buffer.start_bytes : buffer.start_bytes + buffer.num_bytes]
            self._buffers[buffer.name] = torch.frombuffer(part, dtype=torch.uint8)  # a storage of its own

    def buffer(self, name: str) -> torch.Tensor:
        """The buffer that `name` is read into: uint8, flat, page-aligned."""
        return self._buffers[name]

    def read(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """Fill `into` (None: the buffer of that name) with what was written last, and return it. Waits."""
        target = self.buffer(name) if into is None else into
        self._store.read(name, target).wait()
        return target

    def write(self, name: str, source: torch.Tensor | None = None) -> None:
        """Write `source` (None: the buffer of that name). Waits."""
        self._store.write(name, self.buffer(name) if source is None else source).wait()

    def is_written(self, name: str) -> bool:
        """Whether anything was ever written under that name."""
        return self._store.generation(name) > 0

    def staging(self, name: str) -> AlignedBuffer:
        """Memory of an extent's size, for the time before and after programs run. The caller closes it."""
        return AlignedBuffer(self._sizes[name])

    def statistics(self) -> DiskStatistics:
        return self._store.statistics()

    def close(self) -> None:
        """End the lanes, remove the file, give the arena back."""
        self._buffers = {}
        if self._arena is not None:
            self._arena.close()
        self._store.close()
