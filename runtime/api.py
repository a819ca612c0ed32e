"""`Runtime`: the one class that most users need. Checks, runs, returns a `Result`.

Owns the order of a run: checks, run folder, ranks (here or on Ray), result. Each of these has a file of its own.
"""

import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from .callbacks import Callback
from .config import DEFAULT_BATCH_SIZE, DEFAULT_STEPS, Job, RuntimeConfig, TrainConfig
from .result import Result

if TYPE_CHECKING:
    import ray.data
    import torch
    from torch import nn
    from torch.optim.lr_scheduler import LRScheduler
    from torch.utils.data import DataLoader, Dataset

    from ..memory.budget import Memory
    from ..scheduler.plan import Plan
    from .planned_run import Planning

__all__ = ["Runtime", "check_job"]


class Runtime:
    """Where runs happen: in this process (`workers=0`, no Ray) or on `workers` ranks under Ray Train.

        runtime = Runtime(workers=2, memory=Memory(host="2GiB"))
        result = runtime.train(model, data, loss=torch.nn.functional.cross_entropy)

    Args:
        workers: ranks; 0 trains in this process, for debuggers and notebooks, with the same code.
        memory: the budget of each worker; None detects it from the machine or its cgroup.
        address: None starts Ray on this machine for the run (or uses the one that this process has already); "auto" or
            "ray://host:port" uses a cluster.
        resources_per_worker: as in Ray Train, e.g. `{"CPU": 4, "GPU": 1}`.
        placement_strategy: as in Ray Train.
        storage_path: where run folders go: a path, or a URI of any file system that pyarrow opens. None: `./runs`.
        name: the run folder's name; None makes one of the time.
        progress: show the run on the console.
        plan: what `outgrow plan` or an earlier run wrote to its plan.json: run as it stands. None: the fastest that
            fits, chosen before the first step.

    Raises:
        ValueError: an argument that cannot be, or a file that holds no plan.
    """

    def __init__(
        self,
        workers: int = 1,
        memory: "Memory | None" = None,
        address: str | None = None,
        resources_per_worker: Mapping[str, float] | None = None,
        placement_strategy: str = "PACK",
        storage_path: str | os.PathLike[str] | None = None,
        name: str | None = None,
        *,
        progress: bool = True,
        plan: "Plan | str | os.PathLike[str] | None" = None,
    ) -> None:
        self.config = RuntimeConfig(
            workers=workers,
            memory=memory,
            address=address,
            resources_per_worker=resources_per_worker,
            placement_strategy=placement_strategy,
            storage_path=os.fspath(storage_path) if storage_path is not None else None,
            name=name,
            progress=progress,
        )
        self.plan = None if plan is None else _read_plan(plan)

    def train(
        self,
        model: "nn.Module | Callable[[], nn.Module]",
        data: "Dataset[Any] | DataLoader[Any] | ray.data.Dataset | Sequence[Any] | Callable[[], Any]",
        loss: Callable[[Any, Any], Any] | None = None,
        optimizer: "Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer] | None" = None,
        lr_scheduler: "Callable[[torch.optim.Optimizer], LRScheduler] | None" = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        shuffle: bool = False,
        micro_batches: int | str = 1,
        steps: int = DEFAULT_STEPS,
        epochs: int | None = None,
        clip_grad_norm: float | None = None,
        precision: str = "float32",
        zero: int | None = None,
        callbacks: Sequence[Callback] = (),
        *,
        forward: "Callable[[nn.Module, Any], Any] | None" = None,
        seed: int = 0,
        units: Sequence[str] | None = None,
        init: "Callable[[nn.Module], Any] | None" = None,
        weights: str | os.PathLike[str] | None = None,
        offload: str | None = None,
        activations: str | Sequence[str] | None = None,
        order: str | None = None,
        pipeline: int | None = None,
        schedule: str | None = None,
        chunks: int | None = None,
        stages: Sequence[str] | None = None,
    ) -> Result:
        """Train `model` on `data`, and return what came out.

        A batch that is a dict goes in as `model(**batch)`, and `loss`, if given, gets `(output, batch)`; a tuple as
        `model(*batch[:-1])` with `loss(output, batch[-1])`, or whole where no loss is given; a tensor as `model(batch)`
        with `loss(output, batch)`.

        Args:
            model: trained in place where workers=0; a function is called on each worker. What it builds may be larger
                than memory, with `init` or `weights`: it is then called without memory for its parameters.
            data: a torch Dataset, IterableDataset or DataLoader, a function that returns one, or a ray.data.Dataset.
            loss: gives the mean over the samples it was given; None: the output itself, or its `.loss`.
            optimizer: `f(params)`, element-wise, e.g. `functools.partial(torch.optim.AdamW, lr=3e-4)`; None: AdamW.
            lr_scheduler: `f(optimizer)`, advanced after each step.
            batch_size: samples of a global batch, over all ranks and micro-batches.
            shuffle: seeded; the order is the same for any number of ranks.
            micro_batches: gradient accumulation, per rank; "auto": as many as is fastest within the budget.
            steps: updates; the data starts again when it ends.
            epochs: passes over the data, instead of `steps`.
            clip_grad_norm: the largest global gradient norm.
            precision: "float32", or "bf16" with float32 masters.
            zero: what is sharded: 0 nothing, 1 optimizer states, 2 gradients too, 3 parameters too; None: as planned.
            offload: what lies on the disk of `memory`: "none", "optimizer" (slots and masters), "all" (parameters
                too); "host": nothing, but all of it on the host of a device with memory of its own, where "none" leaves
                it on the device; None: what does not fit into the budgets.
            activations: "keep", "recompute", "recompute:selective" (all but matrix products and attention, whose
                outputs are kept), "offload:host" or "offload:disk", for all units or a word for each; None:
                kept where they fit.
            order: of micro-batches: "sequential" or "by-unit" (all of them through a unit before the next one, so that
                what lies on disk moves once a step); None: as it fits.
            pipeline: workers that the model is spread over, stage by stage; 1: each has all of it. `workers` divides by
                it: the others share the state of each stage, as `zero` says. None: pipelines are among the plans that
                are looked at, where there are several micro-batches, and run where one is faster than any other plan.
            schedule: of the pipeline, e.g. "1f1b", "zb-v", "auto" (`outgrow schedule` shows them); None: "1f1b".
            chunks: stages on each worker, for interleaved schedules.
            stages: names of the units that the stages begin with; None: cut by measured seconds.
            callbacks: run on rank 0, in the worker.
            forward: `f(model, batch)` instead of the ways to call the model above.
            seed: of the order of data, of a model that a function builds, and of dropout.
            units: names of the modules to schedule; None finds them.
            init: `f(module)`, called for every module as by `model.apply(f)`, one unit at a time: the values that the
                model starts with, the same on any number of workers and within any budget. Needed, or `weights`, for a
                model larger than memory, and for one on torch's meta device.
            weights: the values that the model starts with: a safetensors file, or a folder of them in the Hugging Face
                layout, such as an earlier run's; on every worker's machine. Read one tensor at a time.

        Raises:
            ValueError: before anything starts: an argument that cannot be, data that yields nothing, more workers than
                the cluster can hold. From the workers: data or a model behind a function that cannot be trained on.
            DoesNotFit: the model needs more than the budget, and neither `init` nor `weights` says which values it has.
            NotFinite: the loss became NaN or infinite.
            WorkerError: a worker failed; names rank, step and unit, and holds the worker's traceback.
        """
        arguments = {name: value for name, value in locals().items() if name != "self"}
        return _run(self._job(arguments), self.config)

    def plan_for(self, *arguments: Any, **words: Any) -> "Planning":
        """Choose a plan and train nothing: takes what `train` takes, and moves and writes nothing.

        Returns:
            The plan, and what is predicted of it. `result.plan.to_json()` is what `Runtime(plan=)` takes from a file.

        Raises:
            What `train` raises before its first step.
        """
        bound = inspect.signature(Runtime.train).bind(self, *arguments, **words)
        bound.apply_defaults()
        given = {name: value for name, value in bound.arguments.items() if name != "self"}
        job = replace(self._job(given), plans_only=True)
        from .planned_run import plan_run

        return plan_run(job, replace(self.config, progress=False))

    def _job(self, arguments: Mapping[str, Any]) -> Job:
        """What `train` was asked to do, checked."""
        of_config = [each.name for each in fields(TrainConfig) if each.init and each.name in arguments]
        words = {name: arguments[name] for name in of_config}
        for name in ("activations", "stages"):
            if words[name] is not None and not isinstance(words[name], str):
                words[name] = tuple(words[name])
        if isinstance(words["weights"], os.PathLike):
            words["weights"] = os.fspath(words["weights"])
        rest = {name: value for name, value in arguments.items() if name not in words}
        rest["callbacks"] = tuple(rest["callbacks"])
        return Job(config=TrainConfig(**words), memory=self.config.memory, plan=self.plan, **rest)


def _read_plan(plan: "Plan | str | os.PathLike[str]") -> "Plan":
    from .given_plan import read_plan

    return read_plan(plan)


def _run(job: Job, config: RuntimeConfig) -> Result:
    from . import cluster
    from .recorder import Recorder
    from .run_folder import RunFolder

    check_job(job, config)
    name = config.run_name(datetime.now())
    folder = RunFolder(config.storage_path, name)
    recorder = Recorder(folder, config, job.config, _display(config))
    try:
        if config.workers == 0:
            from .worker import Place, train_rank

            train_rank(job, Place(), recorder, str(folder.local))
        else:
            cluster.train_on_cluster(job, replace(config, name=name), folder, recorder)
    except KeyboardInterrupt:
        recorder.finish("interrupted")
        raise
    except BaseException as error:
        recorder.finish("failed", f"{type(error).__name__}: {error}")
        raise
    return Result(folder.path, recorder.metrics, recorder.plan, recorder.finish("finished"))


def check_job(job: Job, config: RuntimeConfig) -> None:
    """Raise ValueError for all that can be known to be wrong before anything starts."""
    from . import cluster
    from .data import check_data

    check_data(job.data, job.config, job.num_data(max(1, config.workers)))
    if config.workers == 0:
        _check_alone()
    else:
        cluster.check_here(job, config)
    if config.address is None:
        _check_weights(job)


def _check_weights(job: Job) -> None:
    """Raise ValueError where the weight files are not there, are broken, or are another model's; reads headers only."""
    if job.config.weights is None:
        return
    from torch import nn

    from .filling import WeightsFiller
    from .weight_files import open_weights

    if isinstance(job.model, nn.Module):
        WeightsFiller(job.config.weights, job.model)
    else:
        open_weights(job.config.weights)


def _display(config: RuntimeConfig) -> Any:
    if not config.progress:
        return None
    from .progress import LiveDisplay

    return LiveDisplay()


def _check_alone() -> None:
    from torch import distributed

    if distributed.is_initialized() and distributed.get_world_size() > 1:
        raise ValueError(
            f"workers=0 trains in this process alone, but it is one of {distributed.get_world_size()} in a "
            "torch.distributed group; use outgrow.Engine in a loop of your own, or workers=N from one process"
        )
