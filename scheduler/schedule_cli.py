"""The commands `outgrow schedule NAME` and `outgrow schedule table`.

Owns `app`, a group with one command per schedule name; `runtime/cli.py` mounts it. Loads neither torch nor ray.

    outgrow schedule zb-v --stages 4 --micro-batches 8 --svg zb-v.svg
    outgrow schedule interleaved --stages 4 --micro-batches 8 --chunks 4 --times 1 1.2 0.8
    outgrow schedule auto --stages 8 --micro-batches 32 --memory-limit 5 --json
    outgrow schedule table
    outgrow schedule frontier --stages 8 --micro-batches 32 --out frontier.png
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .pipeline_check import Limits, validate
from .pipeline_data import StageCosts
from .pipeline_draw import grid, summary, svg
from .pipeline_export import as_json
from .pipeline_table import as_table, entries
from .pipeline_timing import simulate
from .pipelines import NAMES, schedule

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Pipeline schedules: draw one, or compare all with what is published.")


def _command(name: str) -> Callable[..., None]:
    def draw(
        stages: Annotated[
            int, typer.Option(help="Pipeline ranks; a loop has this times --chunks stages, a vee twice.")
        ],
        micro_batches: Annotated[int, typer.Option(help="Micro-batches of a step.")],
        chunks: Annotated[int | None, typer.Option(help="Stages on each rank, for schedules on a loop.")] = None,
        times: Annotated[
            tuple[float, float, float] | None,
            typer.Option(help="Seconds of F, I and W for the part of the model on one rank.", metavar="F I W"),
        ] = None,
        comm: Annotated[float, typer.Option(help="Seconds from one rank to the next.")] = 0.0,
        copy: Annotated[
            float | None, typer.Option(help="Seconds to copy the activations of one rank's part away, one way.")
        ] = None,
        memory_limit: Annotated[
            float | None, typer.Option(help="Most activations of a rank, in micro-batches of one rank's part.")
        ] = None,
        barrier: Annotated[bool, typer.Option(help="Steps end at a barrier; matters to auto.")] = False,
        svg_file: Annotated[Path | None, typer.Option("--svg", help="Write a picture there.")] = None,
        as_data: Annotated[bool, typer.Option("--json", help="Print the schedule as JSON and nothing else.")] = False,
    ) -> None:
        try:
            costs = StageCosts.equal(max(stages, 1), *(times or (1.0, 1.0, 1.0)), comm_s=comm, copy_s=copy)
            plan = schedule(name, stages, micro_batches, costs, memory_limit, chunks, barrier)
            timing = simulate(plan, costs)
            validate(plan, Limits(memory_limit, costs))
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        if svg_file is not None:
            svg_file.write_text(svg(timing), encoding="utf-8")
        if as_data:
            typer.echo(json.dumps(as_json(timing)))
            return
        console = Console()
        console.print(grid(timing, console.width))
        console.print(summary(timing))
        if svg_file is not None:
            console.print(f"written: {svg_file}")

    draw.__doc__ = f"Draw {name}."
    return draw


for _name in NAMES:
    app.command(_name)(_command(_name))


@app.command("table")
def _table(
    stages: Annotated[list[int] | None, typer.Option(help="Numbers of ranks; 2, 4, 8 and 16 unless given.")] = None,
    chunks: Annotated[int, typer.Option(help="Chunks of schedules on a loop.")] = 2,
) -> None:
    """Bubble and peak of every schedule, beside what is published; leaves with 1 if one is worse."""
    rows = list(entries(stages or (2, 4, 8, 16), num_chunks=chunks))
    Console(width=160).print(as_table(rows))
    if not all(row.is_as_published for row in rows):
        raise typer.Exit(1)


@app.command("frontier")
def _frontier(
    out: Annotated[Path, typer.Option(help="Where the figure goes, .png or .svg.")],
    stages: Annotated[int, typer.Option(help="Pipeline ranks.")] = 8,
    micro_batches: Annotated[int, typer.Option(help="Micro-batches of a step.")] = 32,
    times: Annotated[
        tuple[float, float, float],
        typer.Option(help="Seconds of F, I and W for the part of the model on one rank.", metavar="F I W"),
    ] = (1.0, 1.0, 1.0),
    copy: Annotated[float, typer.Option(help="Seconds to copy one rank's activations away, one way.")] = 0.75,
) -> None:
    """Step time over activation memory: all schedules, kept, recomputed and offloaded, and auto at every limit."""
    from .pipeline_frontier import draw_frontier, points_of

    costs = StageCosts.equal(max(stages, 1), *times, copy_s=copy)
    limits = [stages * share for share in (1 / 4, 1 / 3, 1 / 2, 3 / 4, 1, 1.5, 2)]
    points = points_of(stages, micro_batches, costs, limits)
    draw_frontier(points, out, f"{stages} ranks, {micro_batches} micro-batches")
    for point in sorted(points, key=lambda each: (each.peak_activations, each.step_s)):
        typer.echo(f"{point.peak_activations:8.2f} {point.step_s:10.2f} s  {point.name}, {point.policy}")
    typer.echo(f"written: {out}")
