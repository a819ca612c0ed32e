"""The case `predict`: steps and peaks as they were predicted, against what they then were.

Owns which plans are tried (of every model, on one and two ranks, a draw from the whole reduced space, bad ones among
them, each within one of three budgets), and the verdict. Rounds are measured steps of each plan; the first step of each
is thrown away. Nothing is fitted to whole steps: the figures of units and machine are taken before the first one.
"""

import random
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

from ..memory.worker_environment import worker_environment
from .case_disk import disk_folder
from .contestants import Contestant, Group
from .figures import Figure, Target
from .member_plans import Outlook, Space
from .suite import Findings, Options

__all__ = ["run"]

_MODELS = ("gpt", "wide vocabulary", "mlp", "convolutions")
_SHARES = (1.05, 1.3, None)  # of a plan's own peak, for its budget; None: ample
_PLANS_OF_EACH = 6  # of every model, on each number of ranks
_MEDIAN, _HIGH = Target(high=0.10), Target(high=0.25)
_NEVER, _CLOSE = Target(high=0.0), Target(high=0.10)


@dataclass(frozen=True, slots=True)
class _Tried:
    """A plan that ran."""

    model: str
    num_ranks: int
    share: float | None
    outlook: Outlook
    seconds: tuple[float, ...]
    peak_bytes: int

    @property
    def measured_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def error(self) -> float:
        """Of the predicted seconds, relative to the measured ones."""
        assert self.outlook.seconds is not None
        return abs(self.outlook.seconds / self.measured_s - 1)


def run(options: Options, say: Callable[[str], None]) -> Findings:
    """Try every plan in processes of its own, one after the other.

    Raises:
        ContestantFailed: one of them failed; its name and traceback are in the message.
        ValueError: a folder that does not lie on a disk.
    """
    tried: list[_Tried] = []
    with tempfile.TemporaryDirectory(prefix="outgrow-predict-", dir=disk_folder(options.folder)) as folder:
        for num_ranks in (1, 2):
            for model in _MODELS:
                found = _ask(_contestant("space", model, num_ranks, folder, builder="space"), "space", say)[0]
                assert isinstance(found, Space)
                dice = random.Random(f"{model} {num_ranks}")
                plans = list(zip(found.plans, found.peaks_bytes, strict=True))
                for number, (plan, peak_bytes) in enumerate(dice.sample(plans, _PLANS_OF_EACH)):
                    share = _SHARES[number % len(_SHARES)]
                    say(f"{model} on {num_ranks} ranks, plan {number + 1}")
                    tried.append(_try(model, num_ranks, plan, peak_bytes, share, folder, options))
                    say(_line(tried[-1]))
    return Findings(_figures(tried), tuple(_line(each) for each in tried))


def _contestant(name: str, model: str, num_ranks: int, folder: str, builder: str, **arguments: object) -> Contestant:
    given = {"model": model, "folder": folder, **arguments}
    environment = worker_environment()  # as workers of a run have them
    return Contestant(name, f".member_plans:{builder}", num_ranks, 2 // num_ranks, given, environment=environment)


def _ask(contestant: Contestant, method: str, say: Callable[[str], None]) -> list[object]:
    with Group([contestant], say=say) as group:
        return group.ask(contestant.name, method)


def _try(
    model: str, num_ranks: int, plan: str, peak_bytes: int, share: float | None, folder: str, options: Options
) -> _Tried:
    budget = None if share is None else int(share * peak_bytes)
    contestant = _contestant("plan", model, num_ranks, folder, builder="engine", plan=plan, budget_bytes=budget)
    with Group([contestant]) as group:
        outlooks = group.ask("plan", "outlook")
        steps = [group.ask("plan", "step", index) for index in range(options.num_warmup + options.num_rounds)]
    measured = steps[options.num_warmup :]
    peak = max(rank.peak_bytes for step in steps for rank in step)
    seconds = tuple(max(rank.seconds for rank in step) for step in measured)
    return _Tried(model, num_ranks, share, outlooks[0], seconds, peak)


def _figures(tried: list[_Tried]) -> tuple[Figure, ...]:
    timed = [each for each in tried if each.outlook.seconds is not None]
    errors = sorted(each.error for each in timed)
    high = errors[min(len(errors) - 1, round(0.95 * (len(errors) - 1)))] if errors else 1.0
    group = f"{len(tried)} plans of {len(_MODELS)} models"
    over = [each.peak_bytes / each.outlook.peak_bytes for each in tried]
    slack = tuple(each.outlook.peak_bytes / each.peak_bytes - 1 for each in tried)
    figures = [
        Figure(group, "plans whose seconds were predicted", "", (float(len(timed)),), Target(low=40.0)),
        Figure(group, "error of the step's seconds, median", "ratio", (statistics.median(errors or [1.0]),), _MEDIAN),
        Figure(group, "error of the step's seconds, 95th percentile", "ratio", (high,), _HIGH),
        Figure(group, "peaks above the predicted one", "", (float(sum(each > 1 for each in over)),), _NEVER),
        Figure(group, "predicted peak above the measured one, median", "ratio", (statistics.median(slack),), _CLOSE),
        Figure(group, "predicted peak above the measured one, most", "ratio", (max(slack),), _CLOSE),
    ]
    for num_ranks in (1, 2):
        of_ranks = [each.error for each in timed if each.num_ranks == num_ranks]
        if of_ranks:
            name = f"error of the step's seconds, median, {num_ranks} ranks"
            figures.append(Figure(group, name, "ratio", (statistics.median(of_ranks),)))
    return tuple(figures)


def _line(each: _Tried) -> str:
    budget = "ample" if each.share is None else f"{each.share:g} of its peak"
    spread = (max(each.seconds) - min(each.seconds)) / each.measured_s
    predicted = "not predicted" if each.outlook.seconds is None else f"predicted {each.outlook.seconds:.3f} s"
    return (
        f"{each.model}, {each.num_ranks} ranks, budget {budget}, {each.outlook.words}: {predicted}, measured "
        f"{each.measured_s:.3f} s ({spread:.0%}); {each.outlook.peak_bytes >> 20} and {each.peak_bytes >> 20} MiB"
    )
