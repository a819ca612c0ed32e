"""Invariant 2: a training's whole process stays within the budget that was given, by the kernel's own count.

Where a memory cgroup can be made, its limit is the budget and the kernel would kill; elsewhere the resident set's
high-water mark is compared.
"""

import tempfile

import pytest

from outgrow.perf.case_budgets import draw
from outgrow.perf.cgroup import CgroupUnavailable
from outgrow.perf.confined import Job, Outcome, run_confined

MODEL = {"num_blocks": 6, "width": 384, "num_heads": 6, "num_tokens": 16000, "length": 128, "batch_size": 8}
MIB = 1 << 20


def confined(job: Job) -> Outcome:
    assert job.budget_bytes is not None
    try:
        return run_confined(job, job.budget_bytes)
    except CgroupUnavailable:
        return run_confined(job)


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory(dir="/var/tmp") as path:  # on a disk, where /tmp may lie in memory
        yield path


def within(job: Job, outcome: Outcome) -> bool:
    assert job.budget_bytes is not None
    return max(outcome.resident_peak_bytes, outcome.group_peak_bytes or 0) <= job.budget_bytes


def test_state_of_370_mib_trains_within_a_budget_that_does_not_hold_it(folder: str) -> None:
    free = run_confined(Job("engine", MODEL, 2, 4))
    tight = Job("engine", MODEL, 2, 4, 620 * MIB, folder)
    outcome = confined(tight)
    assert outcome.end == "trained", outcome.message
    assert within(tight, outcome), outcome
    assert outcome.losses == free.losses
    assert "freed blocks kept" in outcome.plan
    assert sum(outcome.read_bytes) > 0
    assert free.resident_peak_bytes > 620 * MIB


def test_a_budget_below_the_process_is_refused_before_the_first_step(folder: str) -> None:
    outcome = confined(Job("engine", MODEL, 1, 4, 380 * MIB, folder))
    assert outcome.end == "refused", outcome
    assert "no plan fits into the host budget of 380.00 MiB" in outcome.message
    assert outcome.step_s == ()


@pytest.mark.parametrize("seed", [0, 3])
def test_random_models_within_random_budgets(folder: str, seed: int) -> None:
    job = draw(seed, folder)
    outcome = confined(job)
    assert outcome.end in ("trained", "refused"), outcome
    assert outcome.end == "refused" or within(job, outcome), outcome


def test_two_ranks_each_within_the_budget(folder: str) -> None:
    free = run_confined(Job("engine", MODEL, 2, 2, num_ranks=2))
    tight = Job("engine", MODEL, 2, 2, 720 * MIB, folder, num_ranks=2)
    outcome = confined(tight)
    assert outcome.end == "trained", outcome.message
    assert within(tight, outcome), outcome
    assert outcome.losses == free.losses
    assert sum(outcome.read_bytes) > 0
