"""Every schedule is as good as published, for every number of ranks and micro-batches."""

from io import StringIO

import pytest
from rich.console import Console

from outgrow.scheduler.pipeline_table import Entry, Published, as_table, entries, micro_batch_counts, published
from outgrow.scheduler.pipelines import NAMES

PATTERNS = NAMES[:-1]


@pytest.mark.parametrize("p", [2, 4, 8, 16])
def test_named_schedules(p: int) -> None:
    rows = list(entries([p], PATTERNS))
    assert len(rows) == len(PATTERNS) * len(micro_batch_counts(p))
    assert [row for row in rows if not row.is_as_published] == []


@pytest.mark.parametrize("p", [3, 4, 8])
def test_four_chunks(p: int) -> None:
    names = [name for name in PATTERNS if name in ("interleaved", "looped-bfs", "gis", "pipeoffload-half")]
    assert [row for row in entries([p], names, num_chunks=4) if not row.is_as_published] == []


def test_auto_keeps_up_with_the_best() -> None:
    assert [row for row in entries([4], ["auto"]) if not row.is_as_published] == []


def test_memory_in_parts_of_one_forward_one_backward() -> None:
    for p in (4, 8, 16):
        assert published("v-half", p, 4 * p).peak == p / 2 + 1
        assert published("v-min", p, 4 * p).peak == (p + 4) / 3


def test_micro_batch_counts() -> None:
    assert micro_batch_counts(4) == [2, 4, 8, 13, 16]
    assert micro_batch_counts(1) == [1, 2, 4]


def test_worse_is_seen_and_shown() -> None:
    worse = Entry("1f1b", 2, 4, 3.5, 0.2, 3.5, 2, Published(3, 2))
    assert not worse.is_as_published
    console = Console(width=120, file=StringIO())
    console.print(as_table([worse]))
    assert "3.5/2 (3/2)" in console.file.getvalue()
    with pytest.raises(ValueError, match="nothing is published of 'auto'"):
        published("auto", 2, 4)
