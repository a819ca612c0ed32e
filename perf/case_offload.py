"""The case `offload`: state on disk against state in memory, against the disk's bound, and within a budget.

Owns who runs against whom, the targets, and the check that all of them do the same work to the bit (equal losses).

- *compute-bound* (batch 8x256 in one micro-batch): tokens/s with everything on disk over the same engine's with
  everything in memory, round by round, once the heaps of both processes have grown to about what they keep: fresh pages
  come in some steps until then, and one such step is slower by more than what is looked for.
- *input/output-bound* (batch 1x64): the least time that the step can take (`bound.py`) over what it took, round by
  round. Compute is what the in-memory engine takes at the same batch; bandwidths are those of the disk lanes, in the
  same round and folder, with the same block size and depth. The *shared* bound also takes what the disk moves when it
  reads and writes at the same time: on a disk that serves one request at a time, no step comes nearer to the bound than
  the ratio of the two.
- *against DeepSpeed* (where it is installed): its ZeRO-3 with parameters and optimizer on NVMe, against everything on
  disk in a quarter of what it takes, both at batch 8x256.
- *within budget*: 8 micro-batches of 1x256 in a memory cgroup whose limit is the budget, the worker process included.
  The smallest budget is searched in steps of 64 MiB: the planner accepts it, and the kernel does not kill.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from ..memory.worker_environment import worker_environment
from .bound import Bandwidth, least_seconds, least_seconds_shared
from .case_disk import disk_folder
from .cgroup import CgroupUnavailable
from .confined import Job, Outcome, run_confined
from .contestants import Contestant, Group
from .figures import Figure, Target, paired_ratios
from .suite import Findings, Options

__all__ = ["run", "smallest_multiple"]

_MIB = 1 << 20
_BUDGETS_MIB = {"M": (1536, 1126), "S": (768,)}  # 1.5 GiB and 1.1 GiB
_LEAST_MIB = 448  # a process with torch alone is about as large
_STEP_MIB = 64
_NUM_STEPS = 2

_IN_MEMORY_TARGET = Target(low=0.95)
_BOUND_TARGET = Target(low=0.85)
_SAME = Target(high=0.0)
_DEEPSPEED_SPEED_TARGET = Target(low=1.5)
_DEEPSPEED_MEMORY_TARGET = Target(high=0.25)
_SETTLED = 8  # rounds, until the heap of a process has about the size that it keeps
_QUARTER = {"M": ("1800MiB", 1), "S": ("512MiB", 4)}  # host budget, micro-batches


def run(options: Options, say: Callable[[str], None]) -> Findings:
    """Measure every configuration asked for; budgets only with extras.

    Raises:
        ContestantFailed: one of them failed; its name and traceback are in the message.
        ValueError: an unknown configuration, or a folder that does not lie on a disk.
    """
    from .models import CONFIGS  # torch, which only a run needs

    unknown = [config for config in options.configs if config not in _BUDGETS_MIB]
    if unknown:
        raise ValueError(f"no configuration {unknown[0]!r} here; there are {', '.join(_BUDGETS_MIB)}")
    figures: list[Figure] = []
    notes = ["1 rank of 2 threads, float32, AdamW; every step's update included."]
    with tempfile.TemporaryDirectory(prefix="outgrow-offload-", dir=disk_folder(options.folder)) as folder:
        for config in options.configs:
            figures += _compute_bound(config, CONFIGS[config].tokens_per_step, folder, options, say)
            figures += _disk_bound(config, folder, options, say)
            if options.with_extras:
                figures += _against_deepspeed(config, CONFIGS[config].tokens_per_step, folder, options, say)
                found, remark = _within_budgets(config, asdict(CONFIGS[config]), folder, say)
                figures += found
                notes += remark
    return Findings(tuple(figures), tuple(notes))


# ---- against memory


def _pair(config: str, batch_size: int, length: int, folder: str) -> tuple[Contestant, Contestant]:
    sizes = {"config": config, "batch_size": batch_size, "length": length}
    return _engine("in memory", **sizes, offload="none"), _engine("on disk", **sizes, offload="all", folder=folder)


def _engine(name: str, **arguments: object) -> Contestant:
    """The engine as workers of a run have it."""
    environment = worker_environment()
    return Contestant(name, ".member_offload:engine", num_threads=2, arguments=arguments, environment=environment)


def _compute_bound(config: str, tokens: int, folder: str, options: Options, say: Callable[[str], None]) -> list[Figure]:
    settled = replace(options, num_warmup=max(options.num_warmup, _SETTLED))
    turns, losses = _measure(_pair(config, 8, 256, folder), settled, lambda line: say(f"{config} 8x256, {line}"))
    section = f"{config}, batch 8x256: everything on disk against everything in memory"
    return [
        *(_speed(section, name, tokens, reports, note=str(reports[-1].moved)) for name, reports in turns.items()),
        _speed_up(section, "on disk", "in memory", turns, _IN_MEMORY_TARGET),
        _reads(section, turns["on disk"]),
        _agreement(section, losses),
    ]


def _speed(section: str, name: str, tokens: int, reports: Sequence[Any], note: str) -> Figure:
    """Tokens a second in every round, and the process's peak."""
    peak_mib = _peak_bytes(reports) / _MIB
    return Figure(
        section,
        name,
        "tokens/s",
        tuple(tokens / each.seconds for each in reports),
        note=f"RSS {peak_mib:,.0f} MiB; {note}",
    )


def _speed_up(section: str, one: str, other: str, turns: dict[str, list[Any]], target: Target) -> Figure:
    """How many times faster `one` was than `other`, round by round."""
    seconds = {name: [each.seconds for each in turns[name]] for name in (one, other)}
    return Figure(section, f"{one} / {other}", "ratio", paired_ratios(seconds[other], seconds[one]), target)


def _reads(section: str, reports: Sequence[Any]) -> Figure:
    """State read from disk over the fewest bytes that steps of this order can read in as much memory."""
    read, least = reports[-1].state_reads
    note = f"{read / 1e9:.2f} GB of state read, at least {least / 1e9:.2f}"
    return Figure(section, "state read / least", "ratio", (read / least,) if least else (), note=note)


def _peak_bytes(reports: Sequence[Any]) -> int:
    return max(each.peak_rss_bytes for each in reports)


def _disk_bound(config: str, folder: str, options: Options, say: Callable[[str], None]) -> list[Figure]:
    lanes = Contestant("disk lanes", ".member_offload:disk", num_threads=2, arguments={"folder": folder})
    contestants = (*_pair(config, 1, 64, folder), lanes)
    turns, losses = _measure(contestants, options, lambda line: say(f"{config} 1x64, {line}"))
    section = f"{config}, batch 1x64: everything on disk against the bound"
    speeds: list[Bandwidth] = turns["disk lanes"]
    bounds = [
        least_seconds(memory.seconds, on_disk.moved, speed)
        for memory, on_disk, speed in zip(turns["in memory"], turns["on disk"], speeds, strict=True)
    ]
    shared = [
        least_seconds_shared(memory.seconds, on_disk.moved, speed)
        for memory, on_disk, speed in zip(turns["in memory"], turns["on disk"], speeds, strict=True)
    ]
    measured = [each.seconds for each in turns["on disk"]]
    return [
        Figure(section, "in memory, a step", "s", tuple(each.seconds for each in turns["in memory"])),
        Figure(section, "on disk, a step", "s", tuple(measured), note=str(turns["on disk"][-1].moved)),
        Figure(section, "disk, read", "GB/s", tuple(speed.read_bytes_per_s / 1e9 for speed in speeds)),
        Figure(section, "disk, written", "GB/s", tuple(speed.write_bytes_per_s / 1e9 for speed in speeds)),
        Figure(section, "disk, both together", "GB/s", tuple(speed.both_bytes_per_s / 1e9 for speed in speeds)),
        Figure(
            section,
            "bound / on disk",
            "ratio",
            paired_ratios([seconds for seconds, _ in bounds], measured),
            _BOUND_TARGET,
            note=f"bound {bounds[-1][0]:.2f} s by {bounds[-1][1]}, in the last round",
        ),
        Figure(
            section,
            "shared bound / on disk",
            "ratio",
            paired_ratios([seconds for seconds, _ in shared], measured),
            note=f"bound {shared[-1][0]:.2f} s by {shared[-1][1]}, in the last round",
        ),
        Figure(
            section,
            "bound / shared bound",
            "ratio",
            paired_ratios([seconds for seconds, _ in bounds], [seconds for seconds, _ in shared]),
            note="the most that any step of these bytes can reach of the bound on this disk",
        ),
        _reads(section, turns["on disk"]),
        _agreement(section, losses),
    ]


def _measure(
    contestants: Sequence[Contestant], options: Options, say: Callable[[str], None]
) -> tuple[dict[str, list[Any]], dict[str, list[float]]]:
    """Name -> what rank 0 reported in every measured round; and name -> all its losses, warm-up included."""
    with Group(contestants, say=say) as group:
        warmup = group.rounds(options.num_warmup)
        measured = group.rounds(options.num_rounds, first=options.num_warmup)
    turns = {name: [ranks[0] for ranks in rounds] for name, rounds in measured.items()}
    losses = {
        name: [ranks[0].loss for ranks in warmup[name] + measured[name]]
        for name in measured
        if hasattr(turns[name][0], "loss")
    }
    return turns, losses


def _agreement(section: str, losses: dict[str, list[float]]) -> Figure:
    """Steps in which not all losses have the same bits."""
    reference, *others = losses
    num_steps = min(len(values) for values in losses.values())
    different = sum(any(losses[name][i] != losses[reference][i] for name in others) for i in range(num_steps))
    return Figure(
        section,
        "steps whose losses differ",
        "steps",
        (float(different),),
        _SAME,
        note=f"of {num_steps}, {len(losses)} contestants, compared to the bit",
    )


# ---- against DeepSpeed


def _against_deepspeed(
    config: str, tokens: int, folder: str, options: Options, say: Callable[[str], None]
) -> list[Figure]:
    host, micro_batches = _QUARTER[config]
    section = f"{config}, batch 8x256: everything on disk, in {host}, against DeepSpeed ZeRO-3 on NVMe"
    ours = _engine(
        "on disk",
        config=config,
        batch_size=8,
        length=256,
        offload="all",
        folder=folder,
        host=host,
        micro_batches=micro_batches,
        order="by-unit" if micro_batches > 1 else None,
        activations="offload:disk",  # the disk has time left for them, and nothing is recomputed
    )
    theirs = Contestant(
        "DeepSpeed",
        ".peers:deepspeed",
        num_threads=2,
        arguments={"config": config, "stage": 3, "nvme_folder": f"{folder}/deepspeed"},
        requires=("deepspeed",),
        environment={"DS_ACCELERATOR": "cpu"},
    )
    if theirs.missing:
        return [Figure(section, "DeepSpeed", "tokens/s", (), note=f"missing: {', '.join(theirs.missing)}")]
    turns, losses = _measure((ours, theirs), options, lambda line: say(f"{config} against DeepSpeed, {line}"))
    first = {name: values[0] for name, values in losses.items()}
    return [
        *(
            _speed(section, name, tokens, reports, note=f"first loss {first[name]:.6f}")
            for name, reports in turns.items()
        ),
        _speed_up(section, "on disk", "DeepSpeed", turns, _DEEPSPEED_SPEED_TARGET),
        _reads(section, turns["on disk"]),
        Figure(
            section,
            "peak of on disk / DeepSpeed",
            "ratio",
            (_peak_bytes(turns["on disk"]) / _peak_bytes(turns["DeepSpeed"]),),
            _DEEPSPEED_MEMORY_TARGET,
        ),
    ]


# ---- within budget


def _within_budgets(
    config: str, model: dict[str, int], folder: str, say: Callable[[str], None]
) -> tuple[list[Figure], list[str]]:
    job = Job("engine", model, num_steps=_NUM_STEPS, micro_batches=model["batch_size"])
    section = f"{config}, {model['batch_size']} micro-batches of 1x{model['length']} in a cgroup of the budget"

    def within(mib: int) -> Outcome:
        say(f"{config}, within {mib:,} MiB")
        return run_confined(replace(job, budget_bytes=mib * _MIB, folder=folder), mib * _MIB)

    budgets = _BUDGETS_MIB[config]
    outcomes: dict[int, Outcome] = {}

    def trains(mib: int) -> bool:
        if mib not in outcomes:
            outcomes[mib] = within(mib)
        return outcomes[mib].end == "trained"

    try:
        for mib in budgets:
            trains(mib)
        smallest = smallest_multiple(
            trains,
            _LEAST_MIB // _STEP_MIB * _STEP_MIB,
            min(budgets) // _STEP_MIB * _STEP_MIB,
            _STEP_MIB,
        )
        say(f"{config}, plain PyTorch within {budgets[0]:,} MiB")
        plain = run_confined(replace(job, who="plain"), budgets[0] * _MIB)
    except CgroupUnavailable as error:
        return [Figure(section, "within budget", "ratio", (), note=f"not measured: {error}")], []
    say(f"{config}, without a limit")
    free = run_confined(replace(job, offload="none"))
    figures = [Figure(section, "in memory, no limit: a step", "s", _steps(free), note=_remark(free))]
    for mib in budgets:
        figures += _budget_figures(section, mib, outcomes[mib], free)
    if smallest is None:
        figures.append(Figure(section, "smallest budget", "bytes", (), note="none below the ones above is survived"))
    else:
        figures.append(
            Figure(section, "smallest budget", "bytes", (float(smallest * _MIB),), note=_remark(outcomes[smallest]))
        )
    figures.append(
        Figure(
            section,
            f"plain PyTorch in {budgets[0]:,} MiB is killed",
            "times",
            (float(plain.end == "killed"),),
            Target(low=1.0),
            note=f"{plain.end} {plain.message[-200:]}, after {len(plain.losses)} steps",
        )
    )
    trained = {"free": free} | {str(mib): each for mib, each in outcomes.items() if each.end == "trained"}
    figures.append(_agreement(section, {name: list(each.losses) for name, each in trained.items()}))
    tried = ", ".join(f"{mib:,} {outcomes[mib].end}" for mib in sorted(outcomes))
    bad = [f"{mib:,} MiB: {each.end}: {each.message[-300:]}" for mib, each in outcomes.items() if _is_bad(each)]
    over = [f"{config}, {_over(mib, each)}" for mib, each in outcomes.items() if each.resident_peak_bytes > mib * _MIB]
    return figures, [f"{config}: budgets in MiB: {tried}.", *bad, *over]


def _is_bad(outcome: Outcome) -> bool:
    """Neither trained nor refused in time: what must not happen within any budget."""
    return outcome.end not in ("trained", "refused")


def _over(mib: int, outcome: Outcome) -> str:
    """The group does not count pages of libraries that other processes loaded first; the resident set does."""
    excess_mib = outcome.resident_peak_bytes / _MIB - mib
    return f"{mib:,} MiB: {outcome.end}, but the resident set was {excess_mib:,.0f} MiB above the budget."


def _budget_figures(section: str, mib: int, outcome: Outcome, free: Outcome) -> list[Figure]:
    if outcome.end != "trained":
        note = f"{outcome.end}: {outcome.message[-300:]}"
        return [Figure(section, f"{mib:,} MiB: peak / budget", "ratio", (), Target(high=1.0), note=note)]
    peak_bytes = outcome.resident_peak_bytes
    figures = [
        Figure(
            section, f"{mib:,} MiB: peak / budget", "ratio", (peak_bytes / (mib * _MIB),), Target(high=1.0),
            note=_remark(outcome),
        ),
        Figure(section, f"{mib:,} MiB: a step", "s", _steps(outcome)),
    ]  # fmt: skip
    if free.end == "trained":
        ratio = min(_steps(free)) / min(_steps(outcome))
        figures.append(Figure(section, f"{mib:,} MiB: speed / in memory", "ratio", (ratio,)))
    if outcome.predicted_bytes:
        ratio = outcome.predicted_bytes / peak_bytes
        figures.append(Figure(section, f"{mib:,} MiB: predicted peak / VmHWM", "ratio", (ratio,)))
    return figures


def _steps(outcome: Outcome) -> tuple[float, ...]:
    """Seconds of the steps behind the first, which compiles the plan and takes memory for the first time."""
    return outcome.step_s[1:] or outcome.step_s


def _remark(outcome: Outcome) -> str:
    if outcome.end != "trained":
        return f"{outcome.end}: {outcome.message[-300:]}"
    words = [f"VmHWM {outcome.resident_peak_bytes / _MIB:,.0f} MiB"]
    if outcome.group_peak_bytes is not None:
        words.append(f"cgroup {outcome.group_peak_bytes / _MIB:,.0f}")
    if outcome.predicted_bytes is not None:
        words.append(f"predicted {outcome.predicted_bytes / _MIB:,.0f}")
    words += [f"start {outcome.startup_s:.1f} s", outcome.plan]
    return ", ".join(words)


def smallest_multiple(is_enough: Callable[[int], bool], low: int, high: int, step: int) -> int | None:
    """The smallest of low, low + step, ..., high that is enough, where more is enough too; None where `high` is not.

    Raises:
        ValueError: `high` is not on the grid above `low`.
    """
    if step < 1 or high < low or (high - low) % step:
        raise ValueError(f"{high} is not {low} plus a multiple of {step}")
    if not is_enough(high):
        return None
    first, last = 0, (high - low) // step  # `last` is enough
    while first < last:
        middle = (first + last) // 2
        if is_enough(low + middle * step):
            last = middle
        else:
            first = middle + 1
    return low + last * step
