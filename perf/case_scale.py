"""The case `scale`: a GPT far larger than memory, trained within a budget that the kernel enforces.

Owns the sizes and the bound that the steps are held against. It does not own the search for the largest model, with
which `--largest` replaces all this (`case_largest.py`).

The model is a GPT 3072 wide. It is built by its own function, which allocates nothing, and filled unit by unit into the
disk tier (`confined_work.py`), in a memory cgroup whose limit is the budget. The bound is that of `bound.py`. Compute
cannot be measured in memory for a model that does not fit: it is that of models of 1 and 3 blocks, all in memory, and
of the line through the two at the model's number of blocks.
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace

from ..memory.budget import parse_bytes
from ..memory.errors import OutgrowError
from .bound import Bandwidth, Moved, least_seconds, least_seconds_shared, line_through
from .case_disk import disk_folder
from .case_largest import search
from .cgroup import CgroupUnavailable
from .confined import Job, Outcome, run_confined
from .figures import Figure, Target
from .suite import Findings, Options

__all__ = ["run"]

_MIB = 1 << 20
_BUDGET = "8GiB"
_LARGEST_BUDGET = "4GiB"
_SMALL_BLOCKS = (1, 3)


def run(options: Options, say: Callable[[str], None]) -> Findings:
    """Train the model `num_rounds` steps, or search the largest.

    Raises:
        ValueError: a folder that does not lie on a disk, or a budget that is no size.
        OutgrowError: the disk failed, or this machine cannot hold three blocks in memory for the bound.
    """
    from .models import CONFIGS, GPTConfig  # torch, which only a run needs

    (config,) = options.configs
    model = asdict(CONFIGS[config])
    if options.num_blocks is not None:
        model["num_blocks"] = options.num_blocks
    budget_bytes = parse_bytes(options.budget or (_LARGEST_BUDGET if options.largest else _BUDGET), "--budget")
    with tempfile.TemporaryDirectory(prefix="outgrow-scale-", dir=disk_folder(options.folder)) as folder:
        job = Job("engine", model, options.num_rounds, budget_bytes=budget_bytes, folder=folder)
        try:
            if options.largest:
                return search(job, say)
            return _train(job, GPTConfig(**model).num_parameters, say)
        except CgroupUnavailable as error:
            return Findings((Figure(config, "within budget", "s", (), note=f"not measured: {error}"),))


# ---- one model


def _train(job: Job, num_parameters: int, say: Callable[[str], None]) -> Findings:
    from ..memory.disk_speed import measure_disk

    assert job.budget_bytes is not None
    assert job.folder is not None
    say(f"{num_parameters / 1e9:.2f} billion parameters within {job.budget_bytes / _MIB:,.0f} MiB")
    outcome = run_confined(job, job.budget_bytes)
    section = (
        f"{num_parameters / 1e9:.2f} billion parameters, {16 * num_parameters / 1e9:.1f} GB of state with gradients, "
        f"in {job.budget_bytes / _MIB:,.0f} MiB"
    )
    if outcome.end != "trained":
        return Findings(
            (Figure(section, "a step", "s", (), Target(low=0.0), note=f"{outcome.end}: {outcome.message[-600:]}"),)
        )
    say("the disk alone")
    speed = measure_disk(job.folder)
    disk = Bandwidth(speed.read_bytes_per_s, speed.write_bytes_per_s, speed.both_bytes_per_s)
    compute_s = _compute_seconds(job, say)
    moved = [Moved(r, w, {}) for r, w in zip(outcome.read_bytes, outcome.write_bytes, strict=True)]
    bounds = [least_seconds(compute_s, each, disk) for each in moved]
    shares = tuple(bound / step_s for (bound, _), step_s in zip(bounds, outcome.step_s, strict=True))
    shared = [least_seconds_shared(compute_s, each, disk) for each in moved]
    shared_shares = tuple(bound / step_s for (bound, _), step_s in zip(shared, outcome.step_s, strict=True))
    peak_bytes = max(outcome.resident_peak_bytes, outcome.group_peak_bytes or 0)
    return Findings(
        (
            Figure(section, "start-up", "s", (outcome.startup_s,), note=outcome.plan),
            Figure(section, "a step", "s", outcome.step_s, note=_busy(outcome)),
            Figure(section, "losses", "nats", outcome.losses, note=", ".join(f"{loss:.6f}" for loss in outcome.losses)),
            Figure(section, "read, a step", "bytes", tuple(map(float, outcome.read_bytes))),
            Figure(section, "written, a step", "bytes", tuple(map(float, outcome.write_bytes))),
            Figure(section, "disk, read", "GB/s", (disk.read_bytes_per_s / 1e9,)),
            Figure(section, "disk, written", "GB/s", (disk.write_bytes_per_s / 1e9,)),
            Figure(section, "disk, both together", "GB/s", (disk.both_bytes_per_s / 1e9,)),
            Figure(section, "compute of the bound", "s", (compute_s,), note="by 1 and 3 blocks in memory"),
            Figure(section, "bound / a step", "ratio", shares, note=f"bound {bounds[-1][0]:.1f} s by {bounds[-1][1]}"),
            Figure(
                section, "shared bound / a step", "ratio", shared_shares,
                note=f"bound {shared[-1][0]:.1f} s by {shared[-1][1]}",
            ),
            Figure(
                section, "peak / budget", "ratio", (peak_bytes / job.budget_bytes,), Target(high=1.0),
                note=outcome.peaks,
            ),
        ),
        ("1 rank of 2 threads, float32, AdamW; the group counts the page cache of the process too.",),
    )  # fmt: skip


def _compute_seconds(job: Job, say: Callable[[str], None]) -> float:
    """Of a step of the job's model, were it in memory."""
    points: list[tuple[float, float]] = []
    for num_blocks in _SMALL_BLOCKS:
        say(f"{num_blocks} block{'s' * (num_blocks > 1)} in memory")
        small = replace(
            job, model={**job.model, "num_blocks": num_blocks}, budget_bytes=None, folder=None, offload="none",
            num_steps=3,
        )  # fmt: skip
        outcome = run_confined(small)
        if outcome.end != "trained":
            raise OutgrowError(f"the bound's compute needs {num_blocks} blocks in memory: {outcome.message}")
        points.append((float(num_blocks), min(outcome.step_s[1:])))
    return line_through(points[0], points[1], float(job.model["num_blocks"]))


def _busy(outcome: Outcome) -> str:
    return "busy in the last: " + ", ".join(f"{lane} {seconds:.1f} s" for lane, seconds in outcome.busy_s)
