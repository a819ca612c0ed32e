"""The case `memory`: bytes of model state on a rank, measured, for zero=0..3 on 1, 2 and 4 ranks.

Two measurements that know nothing of each other, each against the formula of the ZeRO paper for float32 with Adam,

    bytes(stage) = parameters * (4 / (N if stage >= 3) + 4 / (N if stage >= 2) + 8 / (N if stage >= 1))

- *held*: what the engine says that it holds, added up from its live storages at their peak.
- *pss*: by how much the kernel's proportional set size grew, from before the model was built to the greatest reading
  before an update, when parameters, gradients and optimizer state are all there. It also counts what the formula leaves
  out: buffers for exchange, gathered copies, what is left of activations.

The target, within 5%, is asked of what is held. The second is there to catch a copy that the first does not know of:
its excess in MiB should be that of the buffers. The model has many small blocks, because the largest sizes the buffers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .contestants import Contestant, Group
from .figures import Figure, Target
from .suite import Findings, Options

__all__ = ["Holdings", "formula_bytes", "run"]

_NUM_RANKS = (1, 2, 4)
_STAGES = (0, 1, 2, 3)
_CONFIG = "memory"
_WITHIN_5_PERCENT = Target(0.95, 1.05)


def formula_bytes(num_parameters: int, num_ranks: int, stage: int) -> float:
    """Bytes of parameters, gradients and Adam's two moments on a rank, in float32."""
    shards = [num_ranks if stage >= needed else 1 for needed in (3, 2, 1)]
    return num_parameters * sum(size / count for size, count in zip((4, 4, 8), shards, strict=True))


@dataclass(frozen=True, slots=True)
class Holdings:
    """What one rank held during one step.

    Attributes:
        peak_bytes_by_slot: slot -> the most that the engine held of it at a time.
        pss_bytes: growth of the proportional set size at its greatest reading before an update.
        num_parameters: of the model.
        transport: by which the ranks exchange.
    """

    peak_bytes_by_slot: dict[str, int]
    pss_bytes: int
    num_parameters: int
    transport: str


def run(options: Options, say: Callable[[str], None]) -> Findings:
    """Measure every stage at every number of ranks, one after the other, each in processes of its own.

    Raises:
        ContestantFailed: one of them failed.
    """
    figures: list[Figure] = []
    for num_ranks in _NUM_RANKS:
        for stage in _STAGES:
            name = f"zero={stage} on {num_ranks}"
            contestant = Contestant(
                name,
                ".member_memory:build",
                num_ranks,
                arguments={"config": _CONFIG, "zero": stage},
                # Freed blocks go back to the kernel, so that the resident set shows what is held and not what was.
                environment={"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"},
            )
            with Group([contestant], say=lambda line: None) as group:
                say(f"{name}: measuring")
                group.rounds(options.num_warmup)
                turns = group.rounds(options.num_rounds, first=options.num_warmup)[name]
            figures += _figures(num_ranks, stage, turns)
    return Findings(
        tuple(figures),
        (
            "held: peak bytes of live storages by the engine's own books, mean over ranks; shared pages count once.",
            "pss: growth of the proportional set size (smaps_rollup) up to an update, mean over ranks; with buffers.",
            "1 thread a rank, AdamW, float32.",
        ),
    )


def _figures(num_ranks: int, stage: int, turns: list[list[Any]]) -> list[Figure]:
    num_parameters = turns[0][0].num_parameters
    expected = formula_bytes(num_parameters, num_ranks, stage)
    held = [sum(sum(each.peak_bytes_by_slot.values()) for each in ranks) / num_ranks for ranks in turns]
    pss = [sum(each.pss_bytes for each in ranks) / num_ranks for ranks in turns]
    section = f"{num_ranks} rank{'s' * (num_ranks > 1)}, {num_parameters / 1e6:.1f} million parameters"
    return [
        Figure(
            section,
            f"zero={stage} held / formula",
            "ratio",
            tuple(value / expected for value in held),
            _WITHIN_5_PERCENT,
            note=f"{held[-1] / 2**20:,.1f} of {expected / 2**20:,.1f} MiB, {turns[-1][0].transport}",
        ),
        Figure(
            section,
            f"zero={stage} pss / formula",
            "ratio",
            tuple(value / expected for value in pss),
            note=f"{(max(pss) - expected) / 2**20:+,.1f} MiB at most",
        ),
    ]
