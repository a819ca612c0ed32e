"""Every schedule against its published bubble and memory, for many numbers of ranks and micro-batches.

Owns the published formulas (equal times F = I = W = 1 of the p-th part of a model, no communication) and `entries`,
which compares. Sources: the papers named in the generators; the bounds for fewer micro-batches than ranks are the
length of the chain that one micro-batch has to run through, plus what the others add behind it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil

from rich.table import Table

from .pipeline_timing import simulate
from .pipelines import LOOP_NAMES, NAMES, schedule

__all__ = ["Entry", "Published", "as_table", "entries", "micro_batch_counts", "published"]

_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Published:
    """Bubble (of the span) and peak activations of the worst rank; None where nothing is published."""

    bubble: float | None
    peak: float | None


@dataclass(frozen=True, slots=True)
class Entry:
    """One schedule, measured by simulation, beside what is published."""

    name: str
    num_ranks: int
    num_micro_batches: int
    bubble: float
    bubble_share: float
    makespan_bubble: float
    peak: float
    published: Published

    @property
    def is_as_published(self) -> bool:
        """Neither a longer bubble nor a higher peak."""
        pairs = ((self.bubble, self.published.bubble), (self.peak, self.published.peak))
        return all(bound is None or value <= bound + _TOLERANCE for value, bound in pairs)


def micro_batch_counts(num_ranks: int) -> list[int]:
    """Fewer than, equal to, many times the ranks, and one that they do not divide."""
    p = num_ranks
    return sorted({ceil(p / 2), p, 2 * p, 4 * p, 3 * p + 1})


def published(name: str, num_ranks: int, num_micro_batches: int, num_chunks: int = 2) -> Published:
    """What the papers give for equal times.

    Raises:
        ValueError: a name that no paper has.
    """
    p, m, v = num_ranks, num_micro_batches, num_chunks
    interleaved_bubble = max(3 * (p - 1) / v, 3 * p + 3 * (m - 1) / v - 3 * m)
    half = ceil(p / 2)
    group = ceil(m / max(1, m // p)) if m > p else p  # groups of p, or of nearly p where p does not divide m
    formulas: dict[str, Published] = {
        "gpipe": Published(3 * (p - 1), m),
        "1f1b": Published(3 * (p - 1), min(m, p)),
        "interleaved": Published(interleaved_bubble, min(m, (group * (v - 1) + 2 * (p - 1) + 1) / v)),
        "looped-bfs": Published(interleaved_bubble, m),
        "zb-h1": Published(max(p - 1, 2 * p - 1 - m), min(m, p)),
        "zb-h2": Published(max(0, 2 * p - 1 - m), min(m, 2 * p - 1)),
        "zb-v": Published(max(0, 2 * p - 1 - m), min(m, p)),
        "v-half": Published(3 * (p - 1) / 2, p / 2 + 1),
        "v-min": Published(2 * (p - 1), (p + 4) / 3),
        "dualpipe-v": Published((p - 1) / 2 if m >= 2 * p else None, p + 1 / 2),
        "gis": Published(2 * (p - 1) / v if m >= p else interleaved_bubble, min(m, p)),
        "gis-half": Published(
            (2 * (p - 1) + (v - 1) * half) / v if m >= half else interleaved_bubble, p - (v - 1) * (p - half) / v
        ),
        "pipeoffload-half": Published(None, (v + 2) / (8 * v) * p + 2 / v),
        "pipeoffload-full": Published(None, 4 / v),
    }
    if name not in formulas:
        raise ValueError(f"nothing is published of {name!r}; there are {', '.join(formulas)}")
    return formulas[name]


def entries(num_ranks: Iterable[int], names: Iterable[str] = NAMES, num_chunks: int = 2) -> Iterator[Entry]:
    """Every named schedule for these numbers of ranks; `auto` has the best published bubble of all to keep up with."""
    for p in num_ranks:
        for m in micro_batch_counts(p):
            for name in names:
                chunks = num_chunks if name in (*LOOP_NAMES, "auto") else None
                timing = simulate(schedule(name, p, m, chunks=chunks))
                bound = Published(None, None)
                if name == "auto":
                    bounds = [published(other, p, m, num_chunks).bubble for other in NAMES if other != "auto"]
                    bound = Published(min(bubble for bubble in bounds if bubble is not None), None)
                else:
                    bound = published(name, p, m, num_chunks if chunks else 2)
                yield Entry(
                    name, p, m, round(timing.bubble_s, 9), timing.bubble_share,
                    round(timing.makespan_s - 3 * m, 9), max(timing.peak_activations), bound,
                )  # fmt: skip


def as_table(rows: Iterable[Entry]) -> Table:
    """For the terminal: one row per schedule and number of ranks; `bubble/peak (published)`, in red where worse."""
    rows = list(rows)
    table = Table(title="bubble / peak activations (published), for F = I = W = 1")
    for heading in ("ranks", "schedule", *("m = p/2", "m = p", "m = 2p", "m = 3p+1", "m = 4p")):
        table.add_column(heading, no_wrap=True)
    groups: dict[tuple[int, str], dict[int, Entry]] = {}
    for row in rows:
        groups.setdefault((row.num_ranks, row.name), {})[row.num_micro_batches] = row
    for (p, name), by_count in groups.items():
        counts = (ceil(p / 2), p, 2 * p, 3 * p + 1, 4 * p)
        table.add_row(str(p), name, *(_cell(by_count[count]) if count in by_count else "" for count in counts))
    return table


def _cell(entry: Entry) -> str:
    bound = entry.published
    known = "/".join("-" if value is None else f"{value:.4g}" for value in (bound.bubble, bound.peak))
    text = f"{entry.bubble:.4g}/{entry.peak:.4g} ({known})"
    return text if entry.is_as_published else f"[red]{text}[/red]"
