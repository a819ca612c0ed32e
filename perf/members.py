"""A member that trains: slices its rank's share of a global batch, times a step, and reads its memory.

Owns what is the same for every training contestant, ours and peers, so that all of them are timed alike. It does not
own how a step is done: that is the function it is given.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .contestants import StepReport
from .models import Batches
from .rank import Rank

__all__ = ["Trainee", "peak_rss_bytes", "proportional_bytes", "reset_peak_rss"]


def peak_rss_bytes() -> int:
    """The greatest resident set of this process since its start or `reset_peak_rss`; shared pages count whole."""
    return _kilobytes(Path("/proc/self/status"), "VmHWM") * 1024


def reset_peak_rss() -> None:
    """Let `peak_rss_bytes` start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def proportional_bytes() -> int:
    """The proportional set size of this process: private pages, and each shared page by its number of users."""
    return _kilobytes(Path("/proc/self/smaps_rollup"), "Pss") * 1024


def _kilobytes(path: Path, field: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise OSError(f"{path} has no field {field}; it needs a Linux kernel of 4.14 or later")


@dataclass(frozen=True, slots=True)
class Trainee:
    """One rank of a training contestant.

    Attributes:
        rank: which one.
        batches: step -> global batch, the same on every rank.
        train: this rank's (inputs, targets) -> loss as the mean over the global batch. Does one whole step.
        finish: called once at the end.
        remark: what a reader of its figures should know, e.g. the transport that was chosen.
    """

    rank: Rank
    batches: Batches
    train: Callable[[Tensor, Tensor], float]
    finish: Callable[[], None] = lambda: None
    remark: str = ""

    def step(self, index: int) -> StepReport:
        """One training step on the batch of that index. Making the batch is not timed. Memory's peak is this step's."""
        inputs, targets = (tensor.chunk(self.rank.count)[self.rank.index] for tensor in self.batches(index))
        reset_peak_rss()
        self.rank.barrier()
        started = time.perf_counter()
        loss = self.train(inputs, targets)
        return StepReport(time.perf_counter() - started, loss, peak_rss_bytes())

    def steps(self, first: int, count: int) -> list[float]:
        """Losses of several steps, for curves."""
        return [self.step(index).loss for index in range(first, first + count)]

    def describe(self) -> str:
        return self.remark

    def close(self) -> None:
        self.finish()
