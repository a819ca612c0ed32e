"""What a rank tells the run: started, rows of metrics, memory held, drifted, finished, failed.

Owns the records and the `Sink` protocol through which a rank sends them. In this process the sink is the recorder
itself; on Ray it is `monitor.MonitorSink`. All records survive pickling, whatever the user's exception is made of.
"""

import pickle
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ..memory.errors import OutgrowError
from ..scheduler.drift import Drift, Overrun

__all__ = ["Drifted", "Event", "Failure", "Finished", "MemoryHeld", "Rows", "Sink", "Started"]

# What torch.distributed and sockets say when a peer is gone: never the cause, always an echo of it.
_ECHOES = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "gloo",
    "nccl",
    "timed out waiting",
)


@dataclass(frozen=True)
class Started:
    """A rank is ready for its first step.

    Attributes:
        num_steps: of the whole run; None: the data's end will tell.
        budget_bytes: per tier.
        base_bytes: what the process held before the data and the model: Python, torch, Ray.
        plan: what will run.
        prediction: of a step, as `Prediction.to_json` writes it, of rank 0; None where nothing was predicted.
        note: why not, where it should have been.
    """

    rank: int
    num_ranks: int
    num_steps: int | None
    budget_bytes: Mapping[str, int]
    base_bytes: int
    plan: Any
    prediction: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Rows:
    """Finished steps of rank 0, one dict each (see `worker.metrics_row`)."""

    rows: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class MemoryHeld:
    """The most bytes that a rank held on each tier so far in the run."""

    rank: int
    step: int
    peak_bytes: Mapping[str, int]


@dataclass(frozen=True)
class Drifted:
    """A rank does not go as it was predicted to, and that lasts."""

    rank: int
    finding: Drift | Overrun


@dataclass(frozen=True)
class Finished:
    """A rank is done: the trace of a typical step in Chrome's format (rank 0 only, else None; `otherData` says which
    step, its seconds and the names of the unit runs), and the bytes of model state per slot at the last step's fullest
    moment."""

    rank: int
    trace: Mapping[str, Any] | None
    state_bytes: Mapping[str, int]


@dataclass(frozen=True)
class Failure:
    """A rank failed.

    Attributes:
        step: the step it was in, counted from 1; 0 is before the first.
        unit: the model's unit, where the error knows it.
        kind: the exception's type name; `message` its text; `trace_text` its traceback as Python prints it.
        pickled: the exception itself, or None where it does not survive pickling.
        ours: raised by this project on purpose, so that it may reach the caller as what it is.
        echo: the error only says that another rank went away.
    """

    rank: int
    step: int
    unit: str | None
    kind: str
    message: str
    trace_text: str
    pickled: bytes | None
    ours: bool
    echo: bool

    @classmethod
    def of(cls, error: BaseException, rank: int, step: int) -> "Failure":
        """Describe `error`, raised on `rank` in step `step` unless the error itself says otherwise."""
        message = str(error)
        return cls(
            rank=rank,
            step=getattr(error, "outgrow_step", None) or step,
            unit=getattr(error, "outgrow_unit", None),
            kind=type(error).__name__,
            message=message,
            trace_text="".join(traceback.format_exception(error)).rstrip(),
            pickled=_pickled(error),
            ours=isinstance(error, OutgrowError) or getattr(error, "outgrow_argument", False),
            echo=_is_echo(error, message),
        )

    def error(self) -> BaseException | None:
        """The exception itself, where it survived."""
        return pickle.loads(self.pickled) if self.pickled is not None else None

    @property
    def place(self) -> str:
        """Where it happened, in words."""
        unit = f", unit {self.unit}" if self.unit else ""
        return f"rank {self.rank}, {f'step {self.step}' if self.step else 'before step 1'}{unit}"


Event = Started | Rows | MemoryHeld | Drifted | Finished | Failure


class Sink(Protocol):
    """Where a rank sends its events."""

    def send(self, event: Event) -> None:
        """Send without waiting; may be late by a fraction of a second."""
        ...

    def flush(self) -> None:
        """Return when all that was sent has arrived."""
        ...


def _pickled(error: BaseException) -> bytes | None:
    from ray import cloudpickle

    try:
        data = cloudpickle.dumps(error)
        pickle.loads(data)
    except Exception:  # whatever a user's exception does in its __reduce__ or __init__
        return None
    return data


def _is_echo(error: BaseException, message: str) -> bool:
    from torch import distributed

    if isinstance(error, distributed.DistError):
        return True
    if type(error).__name__ == "LaneTimeout":
        return True
    return type(error) is RuntimeError and any(word in message.lower() for word in _ECHOES)
