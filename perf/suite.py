"""The registry of benchmark cases, and what a run of one leaves behind: a report, its table, its JSON.

Owns `Case`, `Options`, `Report` and the registry. It does not own how contestants are stepped (`contestants.py`), what
a case measures (`case_*.py`) nor the command line (`cli.py`). Importing it loads neither torch nor a case: a case is
imported when it is run.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .environment import Environment, ProcessorTime
from .figures import Figure, Target

__all__ = ["CASES", "Case", "Findings", "Options", "Report", "find_case", "render", "run_case"]


_LOST = "that was asked for meanwhile went to other machines of the host: figures of a run that lost much are noise"


@dataclass(frozen=True, slots=True)
class Options:
    """What a run of a case may vary.

    Attributes:
        num_rounds: measured rounds; in each, every contestant has one turn. At least 1; 5 or more to quote.
        num_warmup: rounds before them that are thrown away.
        configs: model configurations, for the cases that train one.
        with_extras: also the contestants that no target names.
        folder: for the cases that measure a disk; None: one is found.
        budget: of host memory, e.g. "8GiB", for the case that trains within one; None: the case's own.
        num_blocks: of the model, for the case that varies it; None: as many as its configuration has.
        largest: search the largest model that fits instead of training a given one.

    Raises:
        ValueError: no rounds, a negative warm-up, or no configuration.
    """

    num_rounds: int = 5
    num_warmup: int = 2
    configs: tuple[str, ...] = ("S", "M")
    with_extras: bool = True
    folder: str | None = None
    budget: str | None = None
    num_blocks: int | None = None
    largest: bool = False

    def __post_init__(self) -> None:
        if self.num_rounds < 1 or self.num_warmup < 0:
            raise ValueError(
                f"a run needs at least 1 round and no fewer than 0 warm-up rounds, got {self.num_rounds} and "
                f"{self.num_warmup}"
            )
        if not self.configs:
            raise ValueError("a run needs at least one configuration, e.g. S")


@dataclass(frozen=True, slots=True)
class Findings:
    """What a case hands back: its figures, and remarks on how they were taken."""

    figures: tuple[Figure, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Case:
    """A benchmark that can be run by name.

    Attributes:
        name: as on the command line.
        summary: one line.
        module: which defines `run(options, say) -> Findings`; relative to this package.
        default: options where none are given.
    """

    name: str
    summary: str
    module: str
    default: Options = field(default_factory=Options)

    def run(self, options: Options, say: Callable[[str], None]) -> Findings:
        """Measure. `say` is given one short line whenever the work moves on."""
        return import_module(self.module, __package__).run(options, say)


CASES: tuple[Case, ...] = (
    Case("step", "training steps a second against plain PyTorch, DDP and FSDP2 on a GPT", ".case_step"),
    Case(
        "memory",
        "bytes of model state a rank, zero=0..3 on 1, 2 and 4 ranks, against the formulas",
        ".case_memory",
        Options(num_rounds=3, num_warmup=1),
    ),
    Case(
        "collectives",
        "gather and reduce, 1 to 64 MiB: the transports against raw gloo and a memory copy",
        ".case_collectives",
        Options(num_rounds=7, num_warmup=2),
    ),
    Case(
        "disk",
        "the disk lanes alone against fio: 1 to 16 MiB, 1 to 8 in flight, reads, writes and both",
        ".case_disk",
        Options(num_rounds=3, num_warmup=0),
    ),
    Case(
        "offload",
        "everything on disk against everything in memory, against the disk's bound, and in a cgroup of the budget",
        ".case_offload",
        Options(configs=("M",)),
    ),
    Case(
        "budgets",
        "random models, budgets and policies, each in a cgroup of the budget: never killed, never over",
        ".case_budgets",
        Options(num_rounds=30, num_warmup=0),
    ),
    Case(
        "pipelines",
        "pipelines of two ranks against torch.distributed.pipelining's same schedules, and against the simulator",
        ".case_pipelines",
        Options(configs=("S",)),
    ),
    Case(
        "predict",
        "predicted seconds and peaks of 48 plans of 4 models, on 1 and 2 ranks, against measured ones",
        ".case_predict",
        Options(num_rounds=3, num_warmup=1),
    ),
    Case(
        "choose",
        "the chosen plan against every plan of a reduced space, all measured, 3 cases",
        ".case_choose",
        Options(num_rounds=5, num_warmup=1),
    ),
    Case(
        "scale",
        "a GPT of 3 billion parameters in 8 GiB: seconds, bytes, share of the bound; or the largest in 4 GiB",
        ".case_scale",
        Options(num_rounds=2, num_warmup=0, configs=("3B",)),
    ),
)


def find_case(name: str) -> Case:
    """The case of that name.

    Raises:
        ValueError: there is none; lists those that exist.
    """
    for case in CASES:
        if case.name == name:
            return case
    raise ValueError(f"no case {name!r}; there are {', '.join(case.name for case in CASES)}")


@dataclass(frozen=True, slots=True)
class Report:
    """One run of one case, complete enough to be compared with another."""

    case: str
    options: Options
    environment: Environment
    figures: tuple[Figure, ...]
    notes: tuple[str, ...] = ()

    @property
    def num_missed(self) -> int:
        """How many targets were not met."""
        return sum(figure.is_met is False for figure in self.figures)

    def to_json(self) -> str:
        """Everything, with the derived values (median, spread, met) spelled out for readers that are not this class."""
        document = asdict(self)
        for row, figure in zip(document["figures"], self.figures, strict=True):
            derived = {"median": figure.median, "spread": figure.spread}
            row.update({name: None if math.isnan(value) else value for name, value in derived.items()})
            row["is_met"] = figure.is_met
        return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """The inverse of `to_json`; derived values are derived again, not read."""
        document = json.loads(text)
        options = document["options"]
        return cls(
            case=document["case"],
            options=Options(**{**options, "configs": tuple(options["configs"])}),
            environment=Environment(**document["environment"]),
            figures=tuple(
                Figure(
                    group=row["group"],
                    name=row["name"],
                    unit=row["unit"],
                    samples=tuple(row["samples"]),
                    target=None if row["target"] is None else Target(**row["target"]),
                    note=row["note"],
                )
                for row in document["figures"]
            ),
            notes=tuple(document["notes"]),
        )

    def write(self, path: Path) -> None:
        """Store the JSON, making the folder where it does not exist."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json())


def run_case(case: Case, options: Options, say: Callable[[str], None] = lambda line: None) -> Report:
    """Run a case and report it together with where and when it was run."""
    environment, before = Environment.detect(), ProcessorTime.now()
    findings = case.run(options, say)
    notes = (*findings.notes, f"{ProcessorTime.now().lost_since(before):.0%} of the processor time {_LOST}")
    return Report(case.name, options, environment, findings.figures, notes)


def render(report: Report) -> RenderableType:
    """The report for a terminal: environment, then a table of target, measured, spread, met or not, then the notes."""
    table = Table(
        title=f"{report.case}: medians of {report.options.num_rounds} rounds; spread = (max - min) / median",
        title_justify="left",
    )
    table.add_column("")
    for heading in ("target", "measured", "spread"):
        table.add_column(heading, justify="right")
    table.add_column("")
    has_remarks = any(figure.note for figure in report.figures)
    if has_remarks:
        table.add_column("remark", overflow="fold")
    group = None
    for figure in report.figures:
        if figure.group != group:
            if group is not None:
                table.add_section()
            table.add_row(Text(figure.group, style="bold"))
            group = figure.group
        table.add_row(
            f"  {figure.name}",
            "" if figure.target is None else str(figure.target),
            _quantity(figure.median, figure.unit),
            "" if len(figure.samples) < 2 else f"{100 * figure.spread:.1f}%",
            _verdict(figure),
            *([figure.note] if has_remarks else []),
        )
    return Group(Text(str(report.environment), style="dim"), table, *_lines(report.notes))


def _lines(notes: Sequence[str]) -> list[Text]:
    return [Text(note, style="dim") for note in notes]


def _verdict(figure: Figure) -> Text:
    if not figure.samples:
        return Text("not measured", style="yellow")
    if figure.is_met is None:
        return Text("")
    return Text("met", style="green") if figure.is_met else Text("NOT MET", style="bold red")


def _quantity(value: float, unit: str) -> str:
    if math.isnan(value):
        return "-"
    if unit == "ratio":
        return f"{value:.3f}"
    if unit == "bytes":
        return f"{value / 2**20:,.1f} MiB"
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
