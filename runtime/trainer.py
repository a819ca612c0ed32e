"""One training on Ray Train: the trainer, its thread, the poll of the monitor, the end of it all.

Owns everything between a running Ray (`cluster.py`) and the function that each worker runs (`worker.py`). What becomes
of the ranks' events is `recorder.py`'s, which failure counts is `failures.py`'s.
"""

import dataclasses
import threading
from collections.abc import Mapping
from typing import Any

from ..memory.worker_environment import worker_environment
from .capacity import Resources
from .config import Job, RuntimeConfig
from .failures import raise_failure
from .monitor import Monitor
from .recorder import Recorder
from .run_folder import RunFolder

__all__ = ["fit", "is_ray_data"]

_POLL_S = 0.2
_NOT_NEEDED_ALONE = ("DatasetsCallback", "PlacementGroupCleanerCallback")


def is_ray_data(job: Job) -> bool:
    """Whether Ray Data reads the data; it needs a core of its own to do so."""
    return type(job.data).__module__.startswith("ray.data")


def fit(
    job: Job, config: RuntimeConfig, resources: Resources, folder: RunFolder, recorder: Recorder, alone: bool
) -> None:
    """Train on Ray, in a thread of its own, and hand what the ranks tell to `recorder`, in this thread.

    Args:
        alone: Ray was started for this run and ends with it.

    Raises:
        WorkerError, OutgrowError, ValueError: the run's one error (see `failures.raise_failure`).
        KeyboardInterrupt: after the ranks were ended.
    """
    import ray

    monitor: Any = ray.remote(num_cpus=0)(Monitor).remote()
    trainer = _trainer(job, config, resources, folder, monitor, alone)
    errors: list[BaseException] = []

    def train() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # carried over to the thread that waits
            errors.append(error)

    thread = threading.Thread(target=train, name="outgrow-trainer", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(_POLL_S)
            for event in ray.get(monitor.drain.remote()):
                recorder.send(event)
        for event in ray.get(monitor.drain.remote()):
            recorder.send(event)
    except KeyboardInterrupt:
        for actor in ray.get(monitor.cancel.remote()):
            ray.kill(actor)
        raise
    finally:
        if not thread.is_alive():
            ray.kill(monitor)
    if errors:
        raise_failure(errors[0], recorder.failures, config.workers, len(recorder.metrics))


def _trainer(
    job: Job, config: RuntimeConfig, resources: Resources, folder: RunFolder, monitor: Any, alone: bool
) -> Any:
    import ray
    from ray.train import DataConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    dataset_arguments: dict[str, Any] = {}
    data_in_ray = is_ray_data(job)
    if data_in_ray:
        options = ray.data.ExecutionOptions(preserve_order=True)
        dataset_arguments = {"datasets": {"train": job.data}, "dataset_config": DataConfig([], options)}
        job = dataclasses.replace(job, data=None)
    trainer = _lean_trainer() if alone and not data_in_ray else TorchTrainer
    return trainer(
        _train_function,
        train_loop_config={
            "job": [ray.put(job)],
            "monitor": monitor,
            "run_path": str(folder.path),
            "num_threads": resources.num_threads,
            "data_in_ray": data_in_ray,
        },
        torch_config=TorchConfig(backend="nccl" if resources.uses_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            use_gpu=resources.uses_gpu,
            resources_per_worker=dict(resources.per_worker),
            placement_strategy=config.placement_strategy,
        ),
        run_config=RunConfig(
            name=folder.name,
            storage_path=folder.storage_path,
            worker_runtime_env={"env_vars": worker_environment()},
        ),
        **dataset_arguments,
    )


def _lean_trainer() -> Any:
    """TorchTrainer without two helpers of Ray Train's: the one that feeds Ray Data, and the one that cleans up after a
    controller that died, which a Ray that ends with the run does not need. Each is a process that loads Ray Train for
    2.5 s of a core at the start, and the second fills the logs with warnings.
    """
    from ray.train.torch import TorchTrainer

    class LeanTrainer(TorchTrainer):
        def _create_default_callbacks(self) -> Any:
            callbacks = super()._create_default_callbacks()
            return [callback for callback in callbacks if type(callback).__name__ not in _NOT_NEEDED_ALONE]

    return LeanTrainer


def _train_function(config: Mapping[str, Any]) -> None:
    """Imported on the worker only, so that the driver and Ray's controller do without the engine."""
    from .worker import train_on_ray

    train_on_ray(config)
