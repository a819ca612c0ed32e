"""A run that ends with its plan: what would be done, where, and how long it would take.

Owns asking the ranks for their plan. Does not own the plan (`planning.py`), nor what is shown of it (`plan_report.py`).
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from ..memory.errors import OutgrowError
from ..scheduler.plan import Plan
from ..scheduler.prediction import Prediction
from .config import Job, RuntimeConfig
from .events import Event, Started
from .recorder import Recorder
from .run_folder import RunFolder

__all__ = ["Planning", "plan_run"]


@dataclass(frozen=True)
class Planning:
    """What `Runtime.plan_for` returns.

    Attributes:
        plan: what would be run.
        prediction: of a step of rank 0; None where seconds could not be measured.
        note: why not.
        budget_bytes: tier -> what there is.
    """

    plan: Plan
    prediction: Prediction | None
    note: str
    budget_bytes: Mapping[str, int]


class _Ear:
    """Keeps what rank 0 says of its plan."""

    def __init__(self) -> None:
        self.started: Started | None = None

    def show(self, event: Event) -> None:
        if isinstance(event, Started) and event.rank == 0:
            self.started = event

    def close(self) -> None:
        """Nothing is shown."""


def plan_run(job: Job, config: RuntimeConfig) -> Planning:
    """Plan `job` on the ranks that would train it; raises what training would raise before its first step."""
    from . import cluster
    from .api import check_job
    from .worker import Place, train_rank

    check_job(job, config)
    ear: Any = _Ear()
    with tempfile.TemporaryDirectory(prefix="outgrow-plan-") as storage:
        config = replace(config, storage_path=storage, name=config.run_name(datetime.now()))
        folder = RunFolder(storage, config.name or "plan")
        recorder = Recorder(folder, config, job.config, ear)
        if config.workers == 0:
            train_rank(job, Place(), recorder, str(folder.local))
        else:
            cluster.train_on_cluster(job, config, folder, recorder)
        recorder.finish("finished")
    if ear.started is None:
        raise OutgrowError("the ranks ended without a plan; the run's logs say why")
    started = ear.started
    text = started.prediction
    prediction = None if text is None else Prediction.from_json(text)
    return Planning(started.plan, prediction, started.note, dict(started.budget_bytes))
