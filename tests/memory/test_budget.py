"""Sizes as text, and the budget that a worker gets when none is given."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from outgrow.memory import budget
from outgrow.memory.budget import Memory, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("2GiB", 2 << 30),
        ("500MB", 500_000_000),
        ("1.5 GiB", 3 << 29),
        ("1KiB", 1024),
        ("1kB", 1000),
        ("3T", 3 << 40),
        ("2g", 2 << 30),
        (" 64 mib ", 64 << 20),
        ("123", 123),
        ("7B", 7),
        (4096, 4096),
    ],
)
def test_sizes_are_read(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    "size", ["", "GiB", "2XB", "-1GiB", "1e9", "2 Gi B", "0", "0GiB", "0.0001B", "2iB", 0, -5, True, 1.5, None, [1]]
)
def test_what_is_no_size_is_refused_with_the_name_of_the_argument(size):
    with pytest.raises(ValueError, match="Memory\\(host\\)"):
        parse_bytes(size, "Memory(host)")


def test_an_error_shows_what_was_given_and_what_would_do():
    with pytest.raises(ValueError, match=r"size='2 apples' is no size; write e\.g\. '2GiB'"):
        parse_bytes("2 apples")


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (3 << 19, "1.50 MiB"),
        (3 << 29, "1.50 GiB"),
        (5 << 42, "20480.00 GiB"),
        (-(3 << 19), "-1.50 MiB"),
    ],
)
def test_sizes_for_people(num_bytes, text):
    assert format_bytes(num_bytes) == text


def test_a_budget_is_checked_when_it_is_made():
    with pytest.raises(ValueError, match="host"):
        Memory(host="a lot")
    assert Memory(host="1GiB").host_bytes == 1 << 30
    assert Memory(host=5000).host_bytes == 5000
    assert Memory().host_bytes is None


@pytest.mark.parametrize(
    ("total", "limit", "workers", "share"),
    [
        (1000, None, 1, 900),
        (1000, None, 3, 300),
        (1000, 500, 1, 450),
        (1000, 500, 2, 225),
        (1000, 5000, 1, 900),
        (1000, None, 0, 900),
    ],
)
def test_detection_shares_the_smaller_of_machine_and_cgroup(monkeypatch, total, limit, workers, share):
    monkeypatch.setattr(budget, "psutil", SimpleNamespace(virtual_memory=lambda: SimpleNamespace(total=total)))
    monkeypatch.setattr(budget, "cgroup_limit_bytes", lambda: limit)
    assert Memory.detect(workers).host_bytes == share


def test_budgets_by_tier():
    memory = Memory(device="2GiB", host="6GiB", disk=Path("/scratch"), disk_limit="200GiB", unified=False)
    assert (memory.device_bytes, memory.host_bytes, memory.disk_limit_bytes) == (2 << 30, 6 << 30, 200 << 30)
    assert memory.disk_folder == "/scratch"
    nothing = Memory()
    assert (nothing.device_bytes, nothing.disk_limit_bytes, nothing.disk_folder) == (None, None, None)
    assert Memory(unified=True, host="1GiB").unified


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"disk_limit": "1GiB"}, "Memory(disk_limit='1GiB') without disk=: give the folder that it limits"),
        ({"disk": "/scratch", "disk_limit": "much"}, "Memory(disk_limit)='much' is no size"),
        ({"device": 0}, "Memory(device)=0"),
        ({"disk": ""}, "Memory(disk=''): the path of a folder on a disk"),
        ({"disk": 7}, "Memory(disk=7): the path of a folder on a disk"),
        ({"unified": "yes"}, "Memory(unified='yes'): True, False, or None"),
        ({"device": "1GiB", "unified": True}, "device and host are the same bytes; give host= alone, or unified=False"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Memory(**words)
