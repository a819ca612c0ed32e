"""The case `choose`: the plan that the planner chooses against every plan of a reduced space, all of them measured.

Owns the cases (a model, a number of ranks and a budget that the leanest plans fit into and the richest do not), and the
verdict. All plans that fit stand ready at the same time and take turns, round by round.
"""

import statistics
import tempfile
from collections.abc import Callable, Sequence

from ..memory.worker_environment import worker_environment
from .case_disk import disk_folder
from .contestants import Contestant, Group
from .figures import Figure, Target
from .member_plans import Outlook, Space, StepOfPlan
from .suite import Findings, Options

__all__ = ["run"]

_CASES = (("gpt", 1, 0.5), ("mlp", 1, 0.3), ("gpt", 2, 0.5))  # model, ranks, place of the budget among the peaks
_CLOSE = Target(high=1.05)
_CHOSEN = "chosen"


def run(options: Options, say: Callable[[str], None]) -> Findings:
    """Measure all cases.

    Raises:
        ContestantFailed: one of them failed; its name and traceback are in the message.
        ValueError: a folder that does not lie on a disk.
    """
    figures: list[Figure] = []
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="outgrow-choose-", dir=disk_folder(options.folder)) as folder:
        for model, num_ranks, place in _CASES:
            found = _measure(model, num_ranks, place, folder, options, say)
            figures += found.figures
            notes += found.notes
    return Findings(tuple(figures), tuple(notes))


def _measure(
    model: str, num_ranks: int, place: float, folder: str, options: Options, say: Callable[[str], None]
) -> Findings:
    def contestant(name: str, builder: str, **arguments: object) -> Contestant:
        given = {"model": model, "folder": folder, **arguments}
        environment = worker_environment()  # as workers of a run have them
        return Contestant(name, f".member_plans:{builder}", num_ranks, 2 // num_ranks, given, environment=environment)

    with Group([contestant("space", "space")], say=say) as group:
        space = group.ask("space", "space")[0]
    assert isinstance(space, Space)
    peaks = sorted(space.peaks_bytes)
    budget = int(1.02 * peaks[int(place * (len(peaks) - 1))])
    fitting = [plan for plan, peak in zip(space.plans, space.peaks_bytes, strict=True) if peak * 1.01 <= budget]
    others = [
        contestant(str(number), "engine", plan=plan, budget_bytes=budget, predicts=False)
        for number, plan in enumerate(fitting)
    ]
    seconds: dict[str, list[float]] = {each.name: [] for each in others} | {_CHOSEN: []}
    # The chosen one first, alone: it measures before it chooses.
    with (
        Group([contestant(_CHOSEN, "engine", budget_bytes=budget)], say=say) as first,
        Group(others, say=say) as rest,
    ):
        outlooks = {name: (first if name == _CHOSEN else rest).ask(name, "outlook")[0] for name in seconds}
        names = list(seconds)
        for turn in range(options.num_warmup + options.num_rounds):
            say(f"{model} on {num_ranks} ranks, round {turn + 1}")
            for place in range(len(names)):
                name = names[(turn + place) % len(names)]
                ranks = (first if name == _CHOSEN else rest).ask(name, "step", turn)
                if turn >= options.num_warmup:
                    seconds[name].append(_slowest(ranks))
    return _verdict(f"{model}, {num_ranks} ranks", budget, len(space.plans), outlooks, seconds)


def _slowest(ranks: Sequence[StepOfPlan]) -> float:
    return max(rank.seconds for rank in ranks)


def _verdict(
    group: str, budget: int, num_plans: int, outlooks: dict[str, Outlook], seconds: dict[str, list[float]]
) -> Findings:
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    others = sorted((name for name in medians if name != _CHOSEN), key=lambda name: medians[name])
    best, worst = others[0], others[-1]
    ratios = tuple(a / b for a, b in zip(seconds[_CHOSEN], seconds[best], strict=True))
    figures = (
        Figure(group, "plans in the space", "", (float(num_plans),), Target(low=24.0)),
        Figure(group, "plans that fit", "", (float(len(others)),)),
        Figure(group, "step of the chosen plan / best of the space", "ratio", ratios, _CLOSE),
        Figure(group, "worst of the space / best", "ratio", (medians[worst] / medians[best],)),
    )
    notes = [
        f"{group}, budget {budget >> 20} MiB: chosen in {outlooks[_CHOSEN].plan_s:.1f} s: {outlooks[_CHOSEN].words}: "
        f"{medians[_CHOSEN]:.3f} s, {_predicted(outlooks[_CHOSEN])}"
    ]
    for name in (*others[:3], worst):
        notes.append(f"  {outlooks[name].words}: {medians[name]:.3f} s, {_predicted(outlooks[name])}")
    return Findings(figures, tuple(notes))


def _predicted(outlook: Outlook) -> str:
    return outlook.note or "not predicted" if outlook.seconds is None else f"predicted {outlook.seconds:.3f} s"
