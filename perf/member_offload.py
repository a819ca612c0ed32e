"""The members of the case `offload`: an engine with its state in memory or on disk, and the disk itself.

Owns how a step of theirs is timed and what it moved. It does not own turns nor what is made of the answers.
"""

from dataclasses import dataclass, replace

from ..memory.allocator import return_blocks_at_once
from ..memory.budget import Memory
from ..memory.disk_speed import measure_disk
from ..runtime.engine import Engine
from .bound import Bandwidth, Moved, moved_in
from .members import peak_rss_bytes
from .models import CONFIGS, build_gpt, random_batches, token_loss
from .peers import adamw
from .rank import Rank

__all__ = ["DiskMember", "EngineMember", "OffloadReport", "disk", "engine"]


@dataclass(frozen=True, slots=True)
class OffloadReport:
    """One step.

    Attributes:
        seconds: of the step.
        peak_rss_bytes: the process's greatest resident set in it.
        moved: between memory and disk.
        state_reads: bytes of state that it read, and the fewest that it could have (`Engine.state_reads`).
    """

    seconds: float
    loss: float
    peak_rss_bytes: int
    moved: Moved
    state_reads: tuple[int, int]


class EngineMember:
    """The engine on a GPT of a configuration, with a batch of its own size."""

    def __init__(
        self,
        config: str,
        batch_size: int,
        length: int,
        offload: str,
        folder: str | None,
        host: str | None = None,
        micro_batches: int = 1,
        order: str | None = None,
        activations: str | None = None,
    ) -> None:
        if host is not None:
            return_blocks_at_once()  # before anything is built: a heap that has grown does not shrink
        sizes = replace(CONFIGS[config], batch_size=batch_size, length=length)
        self._batches = random_batches(sizes)
        self._engine = Engine(
            build_gpt(sizes),
            optimizer=adamw,
            loss=token_loss,
            memory=Memory(host=host, disk=folder),
            micro_batches=micro_batches,
            offload=offload,
            order=order,
            activations=activations,
            run_name=f"perf-{batch_size}x{length}",
        )

    def step(self, index: int) -> OffloadReport:
        """One training step on the batch of that index."""
        result = self._engine.step(self._batches(index))  # its peak is reset at the step's begin
        reads = self._engine.state_reads()
        return OffloadReport(result.step_s, result.loss, peak_rss_bytes(), moved_in(result.timeline), reads)

    def close(self) -> None:
        self._engine.close()


class DiskMember:
    """The disk lanes alone, with the block size and depth that engines use."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def step(self, index: int) -> Bandwidth:
        """Half a GiB written and read, alone and together."""
        del index
        speed = measure_disk(self._folder)
        return Bandwidth(speed.read_bytes_per_s, speed.write_bytes_per_s, speed.both_bytes_per_s)

    def close(self) -> None: ...


def engine(
    rank: Rank,
    config: str,
    batch_size: int,
    length: int,
    offload: str,
    folder: str | None = None,
    host: str | None = None,
    micro_batches: int = 1,
    order: str | None = None,
    activations: str | None = None,
) -> EngineMember:
    """See `EngineMember`."""
    del rank
    return EngineMember(config, batch_size, length, offload, folder, host, micro_batches, order, activations)


def disk(rank: Rank, folder: str) -> DiskMember:
    """See `DiskMember`."""
    del rank
    return DiskMember(folder)
