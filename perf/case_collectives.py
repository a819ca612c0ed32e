"""The case `collectives`: gathering parameters and reducing gradients between two ranks of one thread.

Owns who is compared and how the rate is counted: bytes of the whole float32 tensor, once, over seconds of the slower
rank; alike for a copy of that tensor, which both ranks make at the same time. All of them run in the same two
processes, in an order that rotates from round to round.

- *gather*: from the ranks' shards to the whole tensor, and one read of it by each rank. The read is part of it because
  it is all there is to gathering what lies in shared memory.
- *reduce*: from each rank's gradient tensor, copied into the buffer that is sent or shared, to the sum of one's shard.
  The transports also form the sum of squares for the gradient norm and merge a flag for every parameter; raw gloo does
  neither.
"""

from collections.abc import Callable

from .contestants import Contestant, Group
from .figures import Figure, Target, paired_ratios
from .suite import Findings, Options

__all__ = ["COPY", "OPERATIONS", "SIZES_MIB", "WAYS", "run"]

SIZES_MIB = (1, 4, 16, 64)
COPY = "memory copy"
WAYS = ("raw gloo", "our gloo", "shared memory")
OPERATIONS = (COPY, *(f"{verb}, {way}" for verb in ("gather", "reduce") for way in WAYS))
_NUM_RANKS = 2


def run(options: Options, say: Callable[[str], None]) -> Findings:
    """Measure every operation at every size, in turns.

    Raises:
        ContestantFailed: a rank failed, also where the ranks cannot share memory.
    """
    ranks = Contestant("collectives", ".member_collectives:build", _NUM_RANKS, arguments={"sizes_mib": SIZES_MIB})
    with Group([ranks], say=say) as group:
        group.rounds(options.num_warmup, "turn")
        turns = group.rounds(options.num_rounds, "turn", first=options.num_warmup)[ranks.name]
    figures: list[Figure] = []
    for size_mib in SIZES_MIB:
        seconds = {name: [max(each[name, size_mib] for each in turn) for turn in turns] for name in OPERATIONS}
        figures += _figures(f"{size_mib} MiB", size_mib * 2**20, seconds)
    return Findings(
        tuple(figures),
        (
            f"{_NUM_RANKS} ranks of 1 thread; GB/s: bytes of the whole float32 tensor over seconds of the slower rank.",
            "gather includes one read of the result, reduce one copy of the gradients into the buffer.",
        ),
    )


def _figures(section: str, num_bytes: int, seconds: dict[str, list[float]]) -> list[Figure]:
    figures = [
        Figure(section, name, "GB/s", tuple(num_bytes / each / 1e9 for each in times))
        for name, times in seconds.items()
    ]
    for verb in ("gather", "reduce"):
        raw, _, shared = (f"{verb}, {way}" for way in WAYS)
        for theirs, target in ((raw, Target(low=1.0)), (COPY, None)):
            ratios = paired_ratios(seconds[theirs], seconds[shared])
            figures.append(Figure(section, f"{shared} / {theirs.removeprefix(f'{verb}, ')}", "ratio", ratios, target))
    return figures
