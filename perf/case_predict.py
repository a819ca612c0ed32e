"""The case `predict`: steps and peaks as they were predicted, against what they then were.

Owns which plans are tried (of every model, on one and two ranks, a draw from the whole reduced space, bad ones among
them, each within one of three budgets), and the verdict. Rounds are forecasts of each plan; its first steps are thrown
away. Nothing is fitted to whole steps: the figures of units and machine are taken before each.

This machine changes its speed by a third and more from one quarter of a minute to the next (its host moves it about).
A step is therefore foretold between steps, by a planner of its own in a process of its own, and held against the
seconds of those right before and right behind it: what is left is the planner's error. A step before which none came
for seconds finds less of its memory in place than others do (the host takes back what was free), so one that is not
timed goes before those that are; and these are a few, since what one of them meets says little. The peak is that which
the engine said before its first step.
"""

import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..memory.worker_environment import worker_environment
from .case_disk import disk_folder
from .contestants import Contestant, Group
from .figures import Figure, Target, paired_ratios
from .member_plans import Outlook, Space
from .suite import Findings, Options

__all__ = ["run"]

_MODELS = ("gpt", "wide vocabulary", "mlp", "convolutions")
_STEPS_OF_EACH = 2  # before and behind a forecast; the median of all counts
_SHARES = (1.05, 1.3, None)  # of a plan's own peak, for its budget; None: ample
_PLANS_OF_EACH = 6  # of every model, on each number of ranks
_MEDIAN, _HIGH = Target(high=0.10), Target(high=0.25)
_NEVER, _CLOSE = Target(high=0.0), Target(high=0.10)


@dataclass(frozen=True, slots=True)
class _Tried:
    """A plan that ran.

    Attributes:
        share: of its own peak, for its budget; None: ample.
        outlook: what the engine said before its first step.
        foretold_s: between measured steps; empty where seconds could not be predicted.
        seconds: measured around each forecast.
        peak_bytes: of all steps.
    """

    model: str
    num_ranks: int
    share: float | None
    outlook: Outlook
    foretold_s: tuple[float, ...]
    seconds: tuple[float, ...]
    peak_bytes: int

    @property
    def ratio(self) -> float:
        """Foretold seconds over measured ones, step by step."""
        return statistics.median(paired_ratios(self.foretold_s, self.seconds))

    @property
    def error(self) -> float:
        return abs(self.ratio - 1)


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
    given = {"plan": plan, "budget_bytes": budget}
    runs = _contestant("plan", model, num_ranks, folder, builder="engine", **given)
    foretells = _contestant("forecast", model, num_ranks, folder, builder="forecaster", **given)
    with Group([runs, foretells]) as group:
        outlook = group.ask("plan", "outlook")[0]
        assert isinstance(outlook, Outlook)
        foretold: list[float] = []
        measured: list[float] = []
        peak_bytes = 0

        def step(index: int) -> float:
            nonlocal peak_bytes
            ranks = group.ask("plan", "step", index)
            peak_bytes = max(peak_bytes, *(rank.peak_bytes for rank in ranks))
            return max(rank.seconds for rank in ranks)

        def timed(index: int) -> list[float]:
            step(index)
            return [step(index) for _ in range(_STEPS_OF_EACH)]

        for index in range(options.num_warmup):
            step(index)
        before = timed(options.num_warmup)
        for index in range(options.num_warmup + 1, options.num_warmup + 1 + options.num_rounds):
            if outlook.seconds is not None:
                seconds = group.ask("forecast", "outlook")[0].seconds
                if seconds is not None:
                    foretold.append(seconds)
            behind = timed(index)
            measured.append(statistics.median(before + behind))
            before = behind
    whole = tuple(foretold) if len(foretold) == len(measured) else ()
    return _Tried(model, num_ranks, share, outlook, whole, tuple(measured), peak_bytes)


def _figures(tried: list[_Tried]) -> tuple[Figure, ...]:
    timed = [each for each in tried if each.foretold_s]
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
    once = [abs(each.outlook.seconds / statistics.median(each.seconds) - 1) for each in timed if each.outlook.seconds]
    name = "likewise, foretold once before the first step, median"
    figures.append(Figure(group, name, "ratio", (statistics.median(once or [1.0]),)))
    for num_ranks in (1, 2):
        of_ranks = [each.error for each in timed if each.num_ranks == num_ranks]
        if of_ranks:
            name = f"error of the step's seconds, median, {num_ranks} ranks"
            figures.append(Figure(group, name, "ratio", (statistics.median(of_ranks),)))
    return tuple(figures)


def _line(each: _Tried) -> str:
    budget = "ample" if each.share is None else f"{each.share:g} of its peak"
    seconds = f"measured {_several(each.seconds)}"
    if each.foretold_s:
        seconds = f"predicted {_several(each.foretold_s)}, {seconds}, {each.ratio:.2f} of it"
    return (
        f"{each.model}, {each.num_ranks} ranks, budget {budget}, {each.outlook.words}: {seconds}; "
        f"{each.outlook.peak_bytes >> 20} and {each.peak_bytes >> 20} MiB"
    )


def _several(seconds: Sequence[float]) -> str:
    middle = statistics.median(seconds)
    return f"{middle:.3f} s ({(max(seconds) - min(seconds)) / middle:.0%})"
