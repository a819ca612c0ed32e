"""The command line. Owns commands and options; each command's work is in a file of its own, imported when it runs, so
that `--help` loads neither torch nor ray.
"""

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["app", "main"]

app = typer.Typer(
    name="outgrow",
    help="Train models that have outgrown your memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_PASSED_ON: Any = {"ignore_unknown_options": True, "allow_extra_args": True}


def main() -> None:
    """The entry point `outgrow`."""
    app(prog_name="outgrow")


def _print_version(asked: bool) -> None:
    if asked:
        from .. import __version__

        typer.echo(f"outgrow {__version__}")
        raise typer.Exit


@app.callback()
def outgrow(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Train models that have outgrown your memory."""


@app.command()
def demo(
    steps: Annotated[int, typer.Option(min=1, help="Updates.")] = 200,
    workers: Annotated[int, typer.Option(min=0, help="Ranks; 0 trains in this process, without Ray.")] = 2,
) -> None:
    """Train a byte-level GPT on the source of Python's standard library, sharded over workers."""
    from .demo import run_demo

    _fail_clearly(run_demo, steps=steps, workers=workers)


@app.command()
def train(
    target: Annotated[str, typer.Argument(metavar="FILE.py:NAME", help="A function that returns train's arguments.")],
    workers: Annotated[int | None, typer.Option(min=0, help="Ranks; overrides the function's.")] = None,
    memory: Annotated[str | None, typer.Option(help='Host memory of each worker, e.g. "2GiB".')] = None,
    name: Annotated[str | None, typer.Option(help="The run folder's name.")] = None,
    disk: Annotated[str | None, typer.Option(help="A folder on a disk for what does not fit into memory.")] = None,
) -> None:
    """Train what the function NAME in FILE.py says.

    It returns a dict of the arguments of Runtime.train, and may add those of Runtime: workers, memory, name, ...
    """
    from .train_file import run_file

    _fail_clearly(run_file, target, workers=workers, memory=memory, name=name, disk=disk)


@app.command()
def plan(
    target: Annotated[str, typer.Argument(metavar="FILE.py:NAME", help="A function that returns train's arguments.")],
    workers: Annotated[int | None, typer.Option(min=0, help="Ranks; overrides the function's.")] = None,
    memory: Annotated[str | None, typer.Option(help='Host memory of each worker, e.g. "2GiB".')] = None,
    disk: Annotated[str | None, typer.Option(help="A folder on a disk for what does not fit into memory.")] = None,
    out: Annotated[Path, typer.Option(help="Where the plan is written, for Runtime(plan=).")] = Path("plan.json"),
    fresh: Annotated[bool, typer.Option(help="Measure this machine anew, whatever is known of it.")] = False,
) -> None:
    """Choose a plan for what the function NAME in FILE.py would train, say why, and train nothing."""
    from .plan_file import plan_file

    _fail_clearly(plan_file, target, out, workers=workers, memory=memory, disk=disk, fresh=fresh)


@app.command()
def doctor(
    folder: Annotated[Path, typer.Option(help="Where run folders and chunks would go.")] = Path("runs"),
) -> None:
    """Say what this machine offers, and what is wrong with it."""
    from rich.console import Console

    from .doctor import examine, print_findings

    if not print_findings(examine(folder), Console()):
        raise typer.Exit(1)


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="A run folder, or its URI.")],
    html: Annotated[Path | None, typer.Option(help="Also write a page with pictures to this file.")] = None,
) -> None:
    """Say what was predicted of a run and what was measured, by lane and by unit."""
    from .report import print_report

    _fail_clearly(print_report, run, html=html)


@app.command(add_help_option=False, context_settings=_PASSED_ON)
def perf(context: typer.Context) -> None:
    """Measure: benchmarks against targets and peers (`outgrow perf --list`)."""
    _pass_on("outgrow.perf.cli", context)


@app.command(add_help_option=False, context_settings=_PASSED_ON)
def schedule(context: typer.Context) -> None:
    """Print a pipeline schedule, its bubbles and its memory."""
    _pass_on("outgrow.scheduler.schedule_cli", context)


def _pass_on(module_name: str, context: typer.Context) -> None:
    """Run a command whose home is another folder, found by name: layers point down only."""
    import_module(module_name).app(context.args, prog_name=context.command_path)


def _fail_clearly(work: Any, *arguments: Any, **options: Any) -> None:
    """Errors that are made for users end the command with their message alone; others keep their traceback."""
    from rich.console import Console

    from ..memory.errors import OutgrowError

    try:
        work(*arguments, **options)
    except (ValueError, OutgrowError) as error:
        console = Console(stderr=True)
        console.print(f"[bold red]{type(error).__name__}:[/] ", end="")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


if __name__ == "__main__":
    main()
