"""One rank's disk tier: its store, and the buffers in host memory that reads and writes go through.

Owns the store's life, and the host tier where nobody else needs one. Does not own what lies where on disk
(`memory/disk.py`), the buffers' offsets (`memory/arena.py`, at compile time), nor when something moves (programs).
"""

import logging
from collections.abc import Mapping
from contextlib import ExitStack

import torch

from ..memory.direct_io import AlignedBuffer, DirectIO, round_up
from ..memory.disk import DEPTH, DiskStatistics, DiskStore, ExtentSpec
from ..memory.disk_lanes import Ticket
from ..memory.errors import LaneTimeout
from ..memory.tiers import HostTier
from ..scheduler.program import Program

__all__ = ["DiskTier"]

_log = logging.getLogger(__name__)


class DiskTier:
    """Extents by name (`c7:param`, `c7:optim`, `a7.0`) on disk, and for each a buffer in the arena that has its size.

    Args:
        folder: on the disk.
        run, rank: name the files: one for the state, one for activations where the plan moves any.
        extents: name -> bytes; of the state. Sizes are rounded up to whole pages.
        limit_bytes: of both files together, or None.
        io: the system calls, for tests.
        deadline_s: how long any wait for the disk may last.
        depth: transfers in flight on each lane.
        host: whose arena reads and writes go through; None: one of its own.

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
        deadline_s: float = 60.0,
        depth: int = DEPTH,
        host: HostTier | None = None,
    ) -> None:
        self._deadline_s, self._depth = deadline_s, depth
        self._folder, self._run, self._rank, self._io = folder, run, rank, io
        self._limit_bytes = limit_bytes
        self._stores: list[DiskStore] = []
        self._store_of: dict[str, DiskStore] = {}
        self._sizes: dict[str, int] = {}
        self._host = host or HostTier()
        if extents:
            self._open(run, extents)

    def add_activations(self, extents: Mapping[str, int]) -> None:
        """Room for saved activations, once their sizes are known. Raises as `DiskStore`."""
        if extents:
            self._open(f"{self._run}-activations", extents)

    def _open(self, name: str, extents: Mapping[str, int]) -> None:
        specs = [ExtentSpec(extent, round_up(num_bytes)) for extent, num_bytes in extents.items()]
        taken = sum(store.file_bytes for store in self._stores)
        limit = None if self._limit_bytes is None else self._limit_bytes - taken
        store = DiskStore(
            self._folder,
            name,
            self._rank,
            specs,
            limit_bytes=limit,
            depth=self._depth,
            io=self._io,
            deadline_s=self._deadline_s,
        )
        self._stores.append(store)
        self._store_of |= dict.fromkeys(extents, store)
        self._sizes |= {spec.name: spec.num_bytes for spec in specs}

    def lay_out(self, program: Program, takes_pages: bool = False) -> None:
        """Make the arena that a program's buffers lie in. Its pages take memory from their first use on, or at once."""
        self._host.lay_out(program.places("host"), takes_pages)

    def buffer(self, name: str) -> torch.Tensor:
        """The buffer that `name` is read into: uint8, flat, page-aligned."""
        return self._host.buffer(name)

    def read(self, name: str, into: torch.Tensor | None = None) -> Ticket:
        """Begin to fill `into` (None: the buffer of that name) with what was written last."""
        return self._store_of[name].read(name, self.buffer(name) if into is None else into)

    def write(self, name: str, source: torch.Tensor | None = None) -> Ticket:
        """Begin to write `source` (None: the buffer of that name)."""
        return self._store_of[name].write(name, self.buffer(name) if source is None else source)

    def is_written(self, name: str) -> bool:
        """Whether anything was ever written under that name."""
        return self._store_of[name].generation(name) > 0

    def settle(self) -> None:
        """After a failure: wait until no transfer touches a buffer any more. What they failed with is of no interest
        now: what was not written is refused when it is read.

        Raises:
            LaneTimeout: a transfer does not come back.
        """
        for store in self._stores:
            try:
                store.drain()
            except LaneTimeout:
                raise
            except Exception as error:
                _log.debug("a transfer that nobody waited for failed: %s", error)

    def staging(self, name: str) -> AlignedBuffer:
        """Memory of an extent's size, for the time before and after programs run. The caller closes it."""
        return AlignedBuffer(self._sizes[name])

    @property
    def arena_bytes(self) -> int:
        """Host memory that the buffers take."""
        return self._host.arena_bytes

    def statistics(self) -> list[DiskStatistics]:
        """Of each file."""
        return [store.statistics() for store in self._stores]

    def close(self) -> None:
        """End the lanes, remove the files, give the arena back. The first error goes on once all are closed."""
        with ExitStack() as stack:
            stack.callback(self._host.close)
            for store in self._stores:
                stack.callback(store.close)
