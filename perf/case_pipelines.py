"""The case `pipelines`: training steps in a pipeline of two ranks of one thread, against torch's own pipelining.

Owns who runs against whom (the same schedule, round by round), the targets, and two checks of our own figures: steps as
long as the simulator says, and memory as the schedules' tables say. torch has its usual stages, ours are cut by
measured costs. Does not own the members (`member_pipeline.py`).
"""

from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

from .contestants import Contestant, Group, StepReport
from .figures import Figure, Target, paired_ratios
from .suite import Findings, Options

__all__ = ["run"]

_COMPARED = ("1f1b", "interleaved", "zb-v")
_EXTRA = ("auto", "gpipe", "v-half")
_MICRO_BATCHES = 8
_LOSS_TOLERANCE = 3e-6


def _ours(schedule: str) -> Contestant:
    return Contestant(f"outgrow {schedule}", ".member_pipeline:outgrow", 2, arguments={"schedule": schedule})


def _torch(schedule: str) -> Contestant:
    return Contestant(f"torch {schedule}", ".member_pipeline:torch_pipelining", 2, arguments={"schedule": schedule})


def run(options: Options, say: Callable[[str], None]) -> Findings:
    """Measure the configuration.

    Raises:
        ContestantFailed: one of them failed; its name and traceback are in the message.
        ValueError: a configuration other than S, for which alone torch's stages are given.
    """
    if options.configs != ("S",):
        raise ValueError(f"pipelines are measured on configuration S, not {', '.join(options.configs)}")
    figures: list[Figure] = []
    for schedule in _COMPARED:
        contestants = _ours(schedule), _torch(schedule)
        figures += _measure(contestants, contestants, options, say)
    if options.with_extras:
        extra = tuple(_ours(schedule) for schedule in _EXTRA)
        figures += _measure((*extra, *(_ours(schedule) for schedule in _COMPARED)), extra, options, say)
    return Findings(
        tuple(figures),
        (
            f"float32, AdamW, {_MICRO_BATCHES} micro-batches; ratios are of tokens/s, round by round, of contestants "
            "that stood in memory together.",
            "Simulated: the programs of both ranks, played with the seconds of single units, on both ranks at once and "
            "on one alone, with update and gradient norm; the mean of two, whose units were timed right before and "
            "right after the step, as the machine's speed drifts. These are steps of their own, one each round.",
            "Activations kept: the most that a rank held for backward passes between two actions, read off the "
            "storages, over the schedule's table with what one forward of each stage left.",
        ),
    )


def _measure(
    contestants: tuple[Contestant, ...],
    simulated: tuple[Contestant, ...],
    options: Options,
    say: Callable[[str], None],
) -> list[Figure]:
    """Args:
    simulated: those of them that, after each round, do another step, which they foretell where they can.
    """
    from .models import CONFIGS  # torch, which only a run needs

    tokens = CONFIGS["S"].tokens_per_step
    here = [replace(each, arguments={"config": "S", **each.arguments}) for each in contestants]
    measured: dict[str, list[list[StepReport]]] = {each.name: [] for each in here}
    times: dict[str, list[list[Any]]] = {each.name: [] for each in simulated}
    with Group(here, say=say) as group:
        group.rounds(options.num_warmup)
        for turn in range(options.num_rounds):
            for name, (reports,) in group.rounds(1, first=options.num_warmup + turn).items():
                measured[name].append(reports)
            for name, told in times.items():
                told.append(group.ask(name, "foretold", options.num_warmup + turn))
        remarks = {each.name: group.ask(each.name, "describe")[0] for each in here}
    return figures_of("S, 2 ranks of 1 thread", tokens, measured, times, remarks)


def figures_of(
    section: str,
    tokens: int,
    measured: dict[str, list[list[StepReport]]],
    times: dict[str, list[list[Any]]],
    remarks: dict[str, str],
) -> list[Figure]:
    """What the answers of one group amount to.

    Args:
        measured, times: name -> for every round, the answers of its ranks, to `step` and to `foretold`.
        remarks: name -> what it says of itself.
    """
    section = f"{section}: {', '.join(measured)}"
    seconds = {name: [max(each.seconds for each in ranks) for ranks in turns] for name, turns in measured.items()}
    figures = [
        Figure(
            section,
            name,
            "tokens/s",
            tuple(tokens / each for each in values),
            note=", ".join(filter(None, (f"RSS {_peak_bytes(measured[name]) / 2**20:,.0f} MiB", remarks[name]))),
        )
        for name, values in seconds.items()
    ]
    for schedule in _COMPARED:
        ours, theirs = f"outgrow {schedule}", f"torch {schedule}"
        if ours in seconds and theirs in seconds:
            ratios = paired_ratios(seconds[theirs], seconds[ours])
            figures.append(Figure(section, f"{ours} / {theirs}", "ratio", ratios, Target(low=1.0)))
            losses = [
                abs(a[0].loss - b[0].loss) / b[0].loss for a, b in zip(measured[ours], measured[theirs], strict=True)
            ]
            figures.append(Figure(section, "losses differ by", "relative", tuple(losses), Target(high=_LOSS_TOLERANCE)))
    for name, turns in times.items():
        if name.startswith("outgrow"):
            ratios = tuple(max(each[0] for each in ranks) / max(each[1] for each in ranks) for ranks in turns)
            figures.append(Figure(section, f"{name}, measured / simulated", "ratio", ratios, Target(0.92, 1.08)))
            kept = tuple(max(each[2] / each[3] for each in ranks) for ranks in turns)
            mib = "/".join(f"{each[2] / 2**20:,.0f}" for each in turns[-1])
            note = f"{mib} MiB on the ranks"
            figures.append(
                Figure(section, f"{name}, activations kept / table", "ratio", kept, Target(high=1.05), note=note)
            )
    if (auto := seconds.get("outgrow auto")) is not None:
        # Against one of them, that with the best median: the fastest of each round would be the luckiest.
        others = {name: values for name, values in seconds.items() if name != "outgrow auto"}
        best = min(others, key=lambda name: median(others[name]))
        ratios = paired_ratios(others[best], auto)
        figures.append(Figure(section, "auto / the best of all", "ratio", ratios, Target(low=0.98), note=best))
    return figures


def _peak_bytes(turns: list[list[StepReport]]) -> int:
    return max(report.peak_rss_bytes for ranks in turns for report in ranks)
