"""The case `step`: training steps a second, on one rank of two threads and on two ranks of one.

Owns who runs against whom, the targets, and the check that all of them do the same work (equal losses). Contestants of
one group stand in memory together; both sides of every ratio are in the same group. On configuration M (134 million
parameters, 2.2 GB of state for each copy) the groups are small, so that they fit in 20 GiB.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from .contestants import Contestant, Group, StepReport
from .figures import Figure, Target, paired_ratios
from .suite import Findings, Options

__all__ = ["run"]

_PLAIN = Contestant("plain PyTorch", ".peers:plain", num_threads=2)
_SINGLE = Contestant("outgrow", ".ours:outgrow", num_threads=2)
_DDP = Contestant("DDP", ".peers:ddp", num_ranks=2)
_ZERO1 = Contestant("outgrow zero=1", ".ours:outgrow", num_ranks=2, arguments={"zero": 1})
_ZERO2 = Contestant("outgrow zero=2", ".ours:outgrow", num_ranks=2, arguments={"zero": 2})
_ZERO3 = Contestant("outgrow zero=3", ".ours:outgrow", num_ranks=2, arguments={"zero": 3})
_FSDP2 = Contestant("FSDP2", ".peers:fsdp2", num_ranks=2)
_FSDP2_KEEP = Contestant("FSDP2, no reshard", ".peers:fsdp2", num_ranks=2, arguments={"reshard_after_forward": False})
_DDP_ZERO = Contestant("DDP + ZeroRedundancyOptimizer", ".peers:ddp", num_ranks=2, arguments={"shard_optimizer": True})
_DEEPSPEED = Contestant(
    "DeepSpeed ZeRO-3",
    ".peers:deepspeed",
    num_ranks=2,
    arguments={"stage": 3},
    requires=("deepspeed",),
    environment={"DS_ACCELERATOR": "cpu"},
)

# Who stands in memory together; both sides of a ratio are always in one group.
_NEEDED = ((_PLAIN, _SINGLE), (_DDP, _ZERO1, _ZERO3), (_FSDP2, _ZERO3))
_EXTRA = ((_DDP, _ZERO2, _DDP_ZERO, _FSDP2_KEEP, _DEEPSPEED),)

# (ours, theirs, least ratio of our tokens a second to theirs)
_TARGETS = (
    (_SINGLE, _PLAIN, Target(low=0.97)),
    (_ZERO1, _DDP, Target(low=1.0)),
    (_ZERO3, _DDP, Target(low=0.95)),
    (_ZERO3, _FSDP2, Target(low=1.2)),
    (_ZERO2, _DDP, None),
    (_DDP_ZERO, _DDP, None),
    (_FSDP2_KEEP, _DDP, None),
    (_DEEPSPEED, _DDP, None),
)

# Greatest relative difference of losses on the same data that is still the same training. The order of summation alone
# makes about 1e-7 in the first steps; a parameter kept in bfloat16 makes 4e-6 in the very first.
_LOSS_TOLERANCE = 3e-6
_IDLE_LIMIT = 0.05


def run(options: Options, say: Callable[[str], None]) -> Findings:
    """Measure every configuration asked for.

    Raises:
        ContestantFailed: one of them failed; its name and traceback are in the message.
        ValueError: an unknown configuration.
    """
    figures: list[Figure] = []
    notes: list[str] = [
        "float32, AdamW; ratios are of tokens/s, round by round, of contestants that stood in memory together.",
        "RSS is the peak of a rank during a step; pages that ranks share count whole in each of them.",
    ]
    for config in options.configs:
        groups = _NEEDED + (_EXTRA if options.with_extras else ())
        for group in groups:
            found, remarks = _measure(config, group, options, lambda line, config=config: say(f"{config}, {line}"))
            figures += found
            notes += remarks
    return Findings(tuple(figures), tuple(notes))


def _measure(
    config: str, contestants: Sequence[Contestant], options: Options, say: Callable[[str], None]
) -> tuple[list[Figure], list[str]]:
    from .models import CONFIGS  # torch, which only a run needs

    if config not in CONFIGS:
        raise ValueError(f"no configuration {config!r}; there are {', '.join(CONFIGS)}")
    tokens = CONFIGS[config].tokens_per_step
    here = [replace(each, arguments={"config": config, **each.arguments}) for each in contestants]
    with Group(here, say=say) as group:
        warmup = group.rounds(options.num_warmup)
        measured = group.rounds(options.num_rounds, first=options.num_warmup)
        idle = group.idle_shares()
        remarks = {name: group.ask(name, "describe")[0] for name in measured}
    seconds = {name: [max(each.seconds for each in ranks) for ranks in turns] for name, turns in measured.items()}
    losses = {name: [ranks[0].loss for ranks in warmup[name] + measured[name]] for name in measured}
    section = f"{config}, {_shape(contestants[0])}, {contestants[0].name} and ours"
    figures = [_speed(section, contestant, tokens, seconds, measured, remarks) for contestant in here]
    for ours, theirs, target in _TARGETS:
        if ours.name in seconds and theirs.name in seconds:
            ratios = paired_ratios(seconds[theirs.name], seconds[ours.name])
            figures.append(Figure(section, f"{ours.name} / {theirs.name}", "ratio", ratios, target))
    figures.append(_agreement(section, losses))
    notes = [
        f"{config}: {name} used {share:.2f} of a core between its turns; the figures of its group are disturbed."
        for name, share in idle.items()
        if share > _IDLE_LIMIT
    ]
    return figures, notes


def _shape(contestant: Contestant) -> str:
    ranks, threads = contestant.num_ranks, contestant.num_threads
    return f"{ranks} rank{'s' * (ranks > 1)} of {threads} thread{'s' * (threads > 1)}"


def _speed(
    section: str,
    contestant: Contestant,
    tokens: int,
    seconds: dict[str, list[float]],
    measured: dict[str, list[list[Any]]],
    remarks: dict[str, str],
) -> Figure:
    if contestant.missing:
        return Figure(section, contestant.name, "tokens/s", (), note=f"missing: {', '.join(contestant.missing)}")
    reports: list[list[StepReport]] = measured[contestant.name]
    peak_bytes = max(report.peak_rss_bytes for ranks in reports for report in ranks)
    return Figure(
        section,
        contestant.name,
        "tokens/s",
        tuple(tokens / each for each in seconds[contestant.name]),
        note=", ".join(filter(None, (f"RSS {peak_bytes / 2**20:,.0f} MiB", remarks[contestant.name]))),
    )


def _agreement(section: str, losses: dict[str, list[float]]) -> Figure:
    """The greatest relative difference between any contestant's loss and the first one's, step by step."""
    reference, *others = losses
    differences = tuple(
        max((abs(losses[name][step] - loss) / abs(loss) for name in others), default=0.0)
        for step, loss in enumerate(losses[reference])
    )
    worst = max(others, key=lambda name: abs(losses[name][-1] - losses[reference][-1]), default=reference)
    return Figure(
        section,
        "losses differ by",
        "relative",
        (max(differences),),
        Target(high=_LOSS_TOLERANCE),
        note=f"at most, from {reference}, in {len(differences)} steps; at the last most by {worst}",
    )
