"""An engine that is planned and never runs: nothing is moved, nothing is written.

Owns leaving out what would follow a plan. Does not own the plan (`planning.py`) nor showing it (`plan_report.py`).
"""

from typing import Any

from .engine import Engine

__all__ = ["PlannedEngine"]


class PlannedEngine(Engine):
    """What `Engine` would do with these arguments and `example`: `plan`, `program`, `prediction`. It cannot step."""

    _explores = True

    def _open_state(self, make: Any = None) -> None:
        """The model stays as it is."""

    def _carry_out(self) -> None:
        """So does the disk."""

    def _carry_out_stages(self, pipeline: Any) -> None:
        """And the ranks of a pipeline."""

    def step(self, batch: Any) -> Any:
        raise ValueError("this engine was made to be planned alone: use Engine to train")
