"""The case `budgets`: random models, budgets and policies, each in a memory cgroup whose limit is the budget.

Owns the draw and the verdict: a run is *refused* before step 1, or it trains and neither is killed nor ever holds more
than its budget, by the kernel's two counts: the group's (what the process itself brought in) and the process's resident
set (pages of libraries that others brought in included). Rounds are the number of triples.
"""

import random
import tempfile
from collections.abc import Callable

from .case_disk import disk_folder
from .confined import Job, Outcome, run_confined
from .figures import Figure, Target
from .suite import Findings, Options

__all__ = ["draw", "run"]

_MIB = 1 << 20
_PROCESS_MIB = 330  # of a process with torch and nothing else, about
_EXCHANGE_MIB = 130  # of compiled kernels between ranks
_EVERY = 5  # of so many triples one is of two ranks, each within the budget
_NONE = Target(high=0.0)


def draw(seed: int, folder: str | None) -> Job:
    """A triple: the same for the same seed."""
    dice = random.Random(seed)
    heads = dice.choice((2, 4, 6, 8))
    model = {
        "num_blocks": dice.randint(2, 12),
        "width": 64 * heads,
        "num_heads": heads,
        "num_tokens": dice.choice((1000, 8192, 32000)),
        "length": dice.choice((64, 128, 256)),
        "batch_size": 0,
    }
    micro_batches = dice.choice((1, 2, 4))
    model["batch_size"] = micro_batches * dice.choice((1, 2))
    width, tokens = model["width"], model["num_tokens"]
    num_ranks = 2 if seed % _EVERY == _EVERY - 1 else 1
    model["batch_size"] *= num_ranks
    parameters = model["num_blocks"] * 12 * width**2 + 2 * tokens * width
    states = int(16 * parameters * dice.uniform(0.1, 1.3)) // num_ranks
    budget = _PROCESS_MIB * _MIB + states + dice.randint(0, 150) * _MIB
    budget += (num_ranks > 1) * (_EXCHANGE_MIB * _MIB + 8 * parameters // model["num_blocks"])
    activations = dice.choice((None, None, "keep", "recompute"))
    return Job("engine", model, 2, micro_batches, budget, folder, activations=activations, num_ranks=num_ranks)


def run(options: Options, say: Callable[[str], None]) -> Findings:
    """Run `options.num_rounds` triples.

    Raises:
        CgroupUnavailable: no memory cgroup can be made here.
        ValueError: a folder that does not lie on a disk.
    """
    outcomes: list[tuple[Job, Outcome]] = []
    with tempfile.TemporaryDirectory(prefix="outgrow-budgets-", dir=disk_folder(options.folder)) as folder:
        for seed in range(options.num_rounds):
            job = draw(seed, folder)
            assert job.budget_bytes is not None
            say(f"triple {seed}: {job.budget_bytes / _MIB:,.0f} MiB")
            outcomes.append((job, run_confined(job, job.budget_bytes)))
    return Findings(_figures(outcomes), tuple(_line(seed, *pair) for seed, pair in enumerate(outcomes)))


def _figures(outcomes: list[tuple[Job, Outcome]]) -> tuple[Figure, ...]:
    trained = [(job, outcome) for job, outcome in outcomes if outcome.end == "trained"]
    refused = sum(outcome.end == "refused" for _, outcome in outcomes)
    over = sum(_is_over(job, outcome) for job, outcome in trained)
    lost = sum(outcome.end in ("killed", "failed") for _, outcome in outcomes)
    section = f"{len(outcomes)} random triples of model, budget and policy"
    ratios = tuple(
        outcome.predicted_bytes / outcome.resident_peak_bytes for _, outcome in trained if outcome.predicted_bytes
    )
    return (
        Figure(section, "killed or failed", "", (float(lost),), _NONE),
        Figure(section, "trained, but over the budget", "", (float(over),), _NONE),
        Figure(section, "trained within the budget", "", (float(len(trained) - over),)),
        Figure(section, "refused before step 1", "", (float(refused),)),
        Figure(section, "predicted peak / resident peak", "ratio", ratios, note=_range(ratios)),
    )


def _range(ratios: tuple[float, ...]) -> str:
    return f"{min(ratios):.3f} to {max(ratios):.3f}" if ratios else ""


def _is_over(job: Job, outcome: Outcome) -> bool:
    assert job.budget_bytes is not None
    return max(outcome.resident_peak_bytes, outcome.group_peak_bytes or 0) > job.budget_bytes


def _line(seed: int, job: Job, outcome: Outcome) -> str:
    assert job.budget_bytes is not None
    ranks = f"{job.num_ranks} ranks, " if job.num_ranks > 1 else ""
    group, resident = (outcome.group_peak_bytes or 0) / _MIB, outcome.resident_peak_bytes / _MIB
    return (
        f"{seed}: {ranks}{job.model['num_blocks']} x {job.model['width']}, {job.model['num_tokens']} tokens, "
        f"{job.model['batch_size']}x{job.model['length']} in {job.micro_batches}, {job.activations or 'open'}; "
        f"budget {job.budget_bytes / _MIB:,.0f} MiB: {outcome.end}, resident {resident:,.0f}, "
        f"group {group:,.0f}, predicted {(outcome.predicted_bytes or 0) / _MIB:,.0f} MiB. {outcome.plan}"
        f"{outcome.message[:160]}"
    )
