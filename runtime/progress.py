"""The live display: step, loss, speed, memory of each worker against its budget, time left.

Owns what is shown, by `rich`, on stderr's side of the console; a line every few seconds where that is no terminal. It
measures nothing.
"""

import statistics
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table

from ..memory.budget import format_bytes
from .events import Drifted, Event, Failure, MemoryHeld, Rows, Started

__all__ = ["LiveDisplay"]

_LINE_EVERY_S = 5.0
_RECENT_STEPS = 20


class LiveDisplay:
    """Shows the events of one run. `close` leaves the last state on the screen."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console if console is not None else Console(stderr=True)
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            expand=True,
        )
        self._task = self._bar.add_task("starting", total=None)
        self._budgets: dict[int, Mapping[str, int]] = {}
        self._held: dict[int, Mapping[str, int]] = {}
        self._row: dict[str, Any] | None = None
        self._said: dict[str, Any] | None = None
        self._recent_s: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._num_steps: int | None = None
        self._drifted: set[str] = set()
        self._began_s = self._said_s = time.monotonic()
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(self._render(), console=self._console, refresh_per_second=4, transient=False)
            self._live.start()
        else:
            self._console.print("outgrow: starting", highlight=False)

    def show(self, event: Event) -> None:
        """Take one event in."""
        match event:
            case Started(rank=rank, budget_bytes=budget, num_steps=num_steps):
                self._budgets[rank] = budget
                self._num_steps = num_steps
                self._bar.update(self._task, total=num_steps, description="training")
            case Rows(rows=rows):
                self._row = rows[-1]
                self._recent_s.extend(row["step_s"] for row in rows)
                self._bar.update(self._task, completed=self._row["step"])
            case MemoryHeld(rank=rank, peak_bytes=peak_bytes):
                self._held[rank] = peak_bytes
            case Drifted(rank=rank, finding=finding):
                if finding.place not in self._drifted:
                    self._drifted.add(finding.place)  # other ranks say the same of it
                    self._console.print(f"outgrow: rank {rank}: {finding.words}", highlight=False, soft_wrap=True)
            case Failure(kind=kind, place=place):
                self._bar.update(self._task, description=f"{kind} ({place})")
        if self._live is not None:
            self._live.update(self._render())
        elif self._row is not None and time.monotonic() - self._said_s >= _LINE_EVERY_S:
            self._say()

    def close(self) -> None:
        """Leave the last state on the screen and give the terminal back."""
        if self._live is not None:
            self._bar.stop_task(self._task)
            self._live.update(self._render())
            self._live.stop()
        elif self._row is not None and self._row is not self._said:
            self._say()

    def _say(self) -> None:
        self._said_s, self._said = time.monotonic(), self._row
        held = ", ".join(f"rank {rank} {_memory_text(peaks)}" for rank, peaks in sorted(self._held.items()))
        self._console.print(f"outgrow: {self._line()} | {held}", highlight=False, soft_wrap=True)

    def _line(self) -> str:
        if self._row is None:
            return "waiting for the first step"
        row = self._row
        parts = [
            f"step {row['step']}" + (f"/{self._num_steps}" if self._num_steps else ""),
            f"loss {row['loss']:.4f}",
            f"{row['tokens_per_s']:,.0f} tokens/s",
            f"lr {row['lr']:.2e}",
        ]
        if row["grad_norm"] is not None:
            parts.append(f"norm {row['grad_norm']:.3g}")
        if self._num_steps and row["step"] < self._num_steps:
            parts.append(f"{(self._num_steps - row['step']) * statistics.median(self._recent_s):.0f} s left")
        return "  ".join(parts)

    def _render(self) -> Group:
        memory = Table.grid(padding=(0, 2))
        for rank in sorted(self._budgets):
            for tier, held_bytes in self._held.get(rank, {}).items():
                budget_bytes = self._budgets[rank].get(tier)
                if not held_bytes and not budget_bytes:
                    continue
                memory.add_row(
                    f"rank {rank}",
                    tier,
                    ProgressBar(total=budget_bytes, completed=held_bytes, width=24) if budget_bytes else "",
                    format_bytes(held_bytes) + (f" of {format_bytes(budget_bytes)}" if budget_bytes else ""),
                )
        return Group(self._bar, self._line(), memory)


def _memory_text(peak_bytes: Mapping[str, int]) -> str:
    return " ".join(f"{tier} {format_bytes(held)}" for tier, held in peak_bytes.items() if held)
