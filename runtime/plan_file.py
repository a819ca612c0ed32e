"""`outgrow plan FILE.py:NAME`: choose a plan, show why, write it down.

Owns that order. Does not own the choice (`planning.py`) nor its picture (`plan_report.py`).
"""

from pathlib import Path

from rich.console import Console

from ..memory.errors import OutgrowError
from .api import Runtime
from .plan_report import print_planning
from .probing import cache_folder
from .train_file import arguments_of

__all__ = ["plan_file"]


def plan_file(
    target: str,
    out: Path,
    workers: int | None = None,
    memory: str | None = None,
    disk: str | None = None,
    fresh: bool = False,
    console: Console | None = None,
) -> None:
    """Plan what `FILE.py:NAME` says, and write `out`. Options that are not None override the function's.

    Args:
        fresh: forget what was measured of this machine earlier.

    Raises:
        ValueError: no such file or function, arguments that nobody knows, or that cannot be; `out` cannot be written.
        DoesNotFit: no plan fits.
    """
    if out.exists() and out.is_dir():
        raise ValueError(f"{out} is a folder: give the plan's file, e.g. --out {out / 'plan.json'}")
    if not out.resolve().parent.is_dir():
        raise ValueError(f"there is no folder {out.resolve().parent} to write the plan to")
    for_runtime, for_train = arguments_of(target, disk, workers=workers, memory=memory)
    if fresh:
        for path in cache_folder().glob("*.json"):
            path.unlink(missing_ok=True)
    found = Runtime(**for_runtime).plan_for(**for_train)
    console = console or Console()
    print_planning(found, console)
    try:
        out.write_text(found.plan.to_json(), encoding="utf-8")
    except OSError as error:
        raise OutgrowError(f"the plan could not be written to {out}: {error.strerror}") from error
    console.print(
        f"written to {out}: Runtime(plan={str(out)!r}) runs it", markup=False, highlight=False, soft_wrap=True
    )
