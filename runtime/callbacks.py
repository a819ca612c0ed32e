"""Callbacks: code of the user's that runs on rank 0, in the worker, while a run goes on.

Owns the base class. It does not own when the calls happen (`worker.py`). A callback that raises ends the run, as any
error on a worker does. Calls into the engine that are collective (`state_dict`, `export`) would hang here, because the
other ranks do not make them.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .engine import Engine, StepResult

__all__ = ["Callback"]


class Callback:
    """Base class: every method does nothing until it is overridden."""

    def on_start(self, engine: "Engine") -> None:
        """Once, before the first step; `engine.plan` is what will run."""

    def on_step(self, engine: "Engine", step: "StepResult") -> None:
        """After each step, with its loss, norm, learning rate, seconds, peak bytes and timeline."""

    def on_end(self, engine: "Engine", step: "StepResult") -> None:
        """Once, after the last step, before the weights are exported."""

    def on_error(self, error: BaseException) -> None:
        """Once, when this rank fails; the error is raised again afterwards."""
