"""`outgrow perf`: the cases as commands.

Owns options and output. It does not own the cases. `--help` and `--list` load neither torch nor a case.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="perf",
    help="Measure Outgrow and its peers, in one run, taking turns.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

_FILE_WIDTH = 132  # columns of a table that goes to a file or a pipe

_Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also store the report as JSON.")]
_Rounds = Annotated[int | None, typer.Option("--rounds", min=1, help="Measured rounds; in each, everyone has a turn.")]
_Folder = Annotated[
    str | None, typer.Option("--folder", help="Where to write; by default the first usual one on a disk.")
]
_Warmup = Annotated[int | None, typer.Option("--warmup", min=0, help="Rounds before them that are thrown away.")]


def _list(is_asked: bool) -> None:
    if is_asked:
        from .suite import CASES

        for case in CASES:
            typer.echo(f"{case.name:<12} {case.summary}")
        raise typer.Exit


@app.callback()
def perf(
    list_: Annotated[bool, typer.Option("--list", callback=_list, is_eager=True, help="List the cases.")] = False,
) -> None:
    """Measure Outgrow and its peers, in one run, taking turns."""


def _run(
    name: str,
    json: Path | None,
    rounds: int | None,
    warmup: int | None,
    configs: tuple[str, ...] | None = None,
    with_extras: bool = True,
    folder: str | None = None,
    budget: str | None = None,
    num_blocks: int | None = None,
    largest: bool = False,
) -> None:
    from rich.console import Console

    from ..memory.errors import OutgrowError
    from .suite import find_case, render, run_case

    case = find_case(name)
    options = replace(
        case.default,
        num_rounds=case.default.num_rounds if rounds is None else rounds,
        num_warmup=case.default.num_warmup if warmup is None else warmup,
        configs=configs or case.default.configs,
        with_extras=with_extras,
        folder=folder,
        budget=budget,
        num_blocks=num_blocks,
        largest=largest,
    )
    errors = Console(stderr=True)
    try:
        with errors.status(f"{name}: starting") as status:
            report = run_case(case, options, lambda line: status.update(f"{name}: {line}"))
    except (OutgrowError, ValueError) as error:
        errors.print(f"{name}: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from None
    Console(width=None if sys.stdout.isatty() else _FILE_WIDTH).print(render(report))
    if json is not None:
        report.write(json)


@app.command()
def step(
    config: Annotated[
        list[str] | None, typer.Option("--config", help="S or M; give it twice for both, which is the default.")
    ] = None,
    extras: Annotated[bool, typer.Option(help="Also the contestants that no target names.")] = True,
    json: _Json = None,
    rounds: _Rounds = None,
    warmup: _Warmup = None,
) -> None:
    """Training steps a second against plain PyTorch, DDP and FSDP2."""
    _run("step", json, rounds, warmup, tuple(config) if config else None, extras)


@app.command()
def memory(json: _Json = None, rounds: _Rounds = None, warmup: _Warmup = None) -> None:
    """Bytes of model state a rank, zero=0..3, against the formulas."""
    _run("memory", json, rounds, warmup)


@app.command()
def collectives(json: _Json = None, rounds: _Rounds = None, warmup: _Warmup = None) -> None:
    """Gather and reduce: the transports against raw gloo and a memory copy."""
    _run("collectives", json, rounds, warmup)


@app.command()
def disk(
    folder: _Folder = None,
    json: _Json = None,
    rounds: _Rounds = None,
    warmup: _Warmup = None,
) -> None:
    """The disk lanes alone against fio, read, written and both at once."""
    _run("disk", json, rounds, warmup, folder=folder)


@app.command()
def offload(
    config: Annotated[list[str] | None, typer.Option("--config", help="M, the default, or S, which is quick.")] = None,
    extras: Annotated[bool, typer.Option(help="Also the runs within budgets in a memory cgroup.")] = True,
    folder: _Folder = None,
    json: _Json = None,
    rounds: _Rounds = None,
    warmup: _Warmup = None,
) -> None:
    """All state on disk: against memory, against the disk's bound, and within budgets that the kernel enforces."""
    _run("offload", json, rounds, warmup, tuple(config) if config else None, extras, folder=folder)


@app.command()
def budgets(folder: _Folder = None, json: _Json = None, rounds: _Rounds = None) -> None:
    """Random models within random budgets, enforced by the kernel; a round is one of them."""
    _run("budgets", json, rounds, 0, folder=folder)


@app.command()
def pipelines(
    extras: Annotated[bool, typer.Option(help="Also the schedules that torch does not have.")] = True,
    json: _Json = None,
    rounds: _Rounds = None,
    warmup: _Warmup = None,
) -> None:
    """Pipelines of two ranks against torch.distributed.pipelining and against the simulator."""
    _run("pipelines", json, rounds, warmup, None, extras)


@app.command()
def predict(folder: _Folder = None, json: _Json = None, rounds: _Rounds = None, warmup: _Warmup = None) -> None:
    """Predicted seconds and peaks of many plans, good and bad, against measured ones."""
    _run("predict", json, rounds, warmup, folder=folder)


@app.command()
def choose(folder: _Folder = None, json: _Json = None, rounds: _Rounds = None, warmup: _Warmup = None) -> None:
    """The chosen plan against every plan of a reduced space, all of them measured."""
    _run("choose", json, rounds, warmup, folder=folder)


@app.command()
def scale(
    blocks: Annotated[
        int | None, typer.Option("--blocks", min=1, help="Of the GPT, 3072 wide; 26 are 3.1 billion parameters.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="Of host memory; 8GiB, with --largest 4GiB, by default.")
    ] = None,
    largest: Annotated[
        bool, typer.Option("--largest", help="Search the largest GPT that trains within the budget, and its peers'.")
    ] = False,
    folder: _Folder = None,
    json: _Json = None,
    rounds: _Rounds = None,
) -> None:
    """A GPT of 3 billion parameters in 8 GiB; one round is one training step. Takes long, and 50 GB of disk."""
    _run("scale", json, rounds, None, folder=folder, budget=budget, num_blocks=blocks, largest=largest)


@app.command()
def curve(
    png: Annotated[Path, typer.Option("--png", metavar="FILE", help="Where the figure goes.")] = Path("docs/loss.png"),
    steps: Annotated[int, typer.Option("--steps", min=2, help="Training steps of both.")] = 400,
) -> None:
    """Draw the loss on real text: plain PyTorch and Outgrow on two ranks, on the same data."""
    from rich.console import Console

    from ..memory.errors import OutgrowError
    from .curve import draw, train_both

    errors = Console(stderr=True)
    try:
        with errors.status("curve: starting") as status:
            curves = train_both(steps, lambda line: status.update(f"curve: {line}"))
    except OutgrowError as error:
        errors.print(f"curve: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from None
    draw(curves, png)
    for name, losses in curves.items():
        typer.echo(f"{name}: loss {losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last")
    typer.echo(f"{png} is written")
