"""Huge pages for tensors: torch's variable is what the kernel's records say it is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from outgrow.memory.huge_pages import asks_for_huge_pages, huge_page_environment

_SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_NAME = next(iter(huge_page_environment()))
_HUGE_BYTES = """
import torch
tensors = [torch.ones(16 << 20, dtype=torch.uint8) for _ in range(4)]
rows = [line.split() for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")]
print(int(rows[0][1]) << 10)
"""


def huge_bytes(environment: dict[str, str]) -> int:
    answer = subprocess.run(
        [sys.executable, "-c", _HUGE_BYTES],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(answer.stdout)


@pytest.mark.skipif(
    not _SWITCH.exists() or "[madvise]" not in _SWITCH.read_text(), reason="this kernel gives them to all, or to none"
)
def test_tensors_of_a_process_with_the_variable_lie_in_huge_pages() -> None:
    assert huge_bytes({_NAME: "0"}) < 8 << 20
    assert huge_bytes(huge_page_environment()) > 32 << 20


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(_NAME, raising=False)
    assert (huge_page_environment(), asks_for_huge_pages()) == ({_NAME: "1"}, False)
    monkeypatch.setenv(_NAME, "0")
    assert (huge_page_environment(), asks_for_huge_pages()) == ({_NAME: "0"}, False)
    monkeypatch.setenv(_NAME, "1")
    assert asks_for_huge_pages()
