"""The loss curve on real text: a plain PyTorch loop and Outgrow, on the same data, in one figure.

Owns the two trainings (contestants like those of the cases) and the figure. The text is the source of Python's standard
library on this machine, a byte a token; the model is configuration `bytes` of `models.py`. Plain PyTorch runs in one
process, Outgrow shards everything over two.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .contestants import Contestant, Group

__all__ = ["CONTESTANTS", "draw", "train_both"]

PLAIN = "plain PyTorch, one process"
OUTGROW = "Outgrow, two ranks, zero=3"
CONTESTANTS = (
    Contestant(PLAIN, ".peers:plain", num_threads=2, arguments={"config": "bytes", "data": "text"}),
    Contestant(OUTGROW, ".ours:outgrow", num_ranks=2, arguments={"config": "bytes", "data": "text", "zero": 3}),
)
_STEPS_PER_TURN = 20


def train_both(
    num_steps: int,
    say: Callable[[str], None] = lambda line: None,
    contestants: Sequence[Contestant] = CONTESTANTS,
) -> dict[str, list[float]]:
    """Name of the contestant -> its loss at every step.

    Raises:
        ContestantFailed: one of them failed.
    """
    curves: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    with Group(contestants, say=say) as group:
        for first in range(0, num_steps, _STEPS_PER_TURN):
            for name, losses in curves.items():
                say(f"step {first} of {num_steps}: {name}")
                losses += group.ask(name, "steps", first, min(_STEPS_PER_TURN, num_steps - first))[0]
    return curves


def draw(curves: Mapping[str, Sequence[float]], png: Path) -> None:
    """Write the figure: both losses above, their difference below. The first curve is the reference.

    Raises:
        ValueError: other than two curves, or curves of different lengths.
    """
    if len(curves) != 2 or len({len(losses) for losses in curves.values()}) != 1:
        raise ValueError(f"the figure takes two curves of one length, got {[len(each) for each in curves.values()]}")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    (reference_name, reference), (name, losses) = curves.items()
    steps = range(len(reference))
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot(steps, reference, color="#9ecae1", linewidth=4, label=reference_name)
    above.plot(steps, losses, color="#08306b", linewidth=1, label=name)
    above.set_ylabel("loss (nats a byte)")
    above.set_title("A byte-level GPT on the source of Python's standard library", fontsize=11)
    above.legend(frameon=False)
    below.plot(steps, [b - a for a, b in zip(reference, losses, strict=True)], color="#08306b", linewidth=1)
    below.set_ylabel("difference")
    below.set_xlabel("step")
    below.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.5)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png)
