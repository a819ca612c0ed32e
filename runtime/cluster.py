"""Ray for the time of a run: starting it or finding it, its settings, whether the workers fit, its logs.

Does not own the training on it (`trainer.py`), nor the arithmetic of what fits (`capacity.py`).
"""

import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .capacity import Resources, check_capacity, choose_resources
from .config import Job, RuntimeConfig
from .machine import num_cores, num_gpus
from .recorder import Recorder
from .run_folder import RunFolder
from .trainer import fit, is_ray_data

__all__ = ["check_here", "interpreter_options", "session", "train_on_cluster"]

_LOG_TAIL_BYTES = 1 << 20
# How Ray behaves while a run goes on, in its own words. Health checks: how soon an end or a failure is seen. Workers
# that share busy cores may take more than Ray's minute to load torch.
_RAY_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# On a Ray that lives as long as the run does there is no watch for nodes that are taken away.
_RAY_SETTINGS_ALONE = _RAY_SETTINGS | {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


@contextmanager
def session(config: RuntimeConfig, cores: int, gpus: int) -> Iterator[Path | None]:
    """Ray for the time of the block, quiet: the one that this process has already, else one that is shut down after.

    Yields the folder of Ray's logs on this machine, or None.
    """
    import ray

    owned = not ray.is_initialized()
    with _silence(owned), _settings(_RAY_SETTINGS_ALONE if owned and config.address is None else _RAY_SETTINGS):
        if owned:
            local: dict[str, Any] = (
                {} if config.address else {"num_cpus": cores, "num_gpus": gpus} | interpreter_options()
            )
            ray.init(
                address=config.address or "local",
                include_dashboard=None if config.address else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **({} if config.address else local),
            )
        # The public API knows no folder of logs of a Ray that runs already.
        node = ray._private.worker._global_node  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield Path(node.get_logs_dir_path()) if node is not None else None
        finally:
            if owned:
                ray.shutdown()


def interpreter_options() -> dict[str, Any]:
    """Options of `ray.init`. Ray hands the interpreter's path to a shell as it is: one with spaces must be quoted."""
    quoted = shlex.quote(sys.executable)
    return {} if quoted == sys.executable else {"runtime_env": {"py_executable": quoted}}


def _check_interpreter() -> None:
    """A Ray that this process started itself must know of spaces in the path, or its workers never come up."""
    import ray

    options = interpreter_options()
    if options and not ray.get_runtime_context().runtime_env.get("py_executable"):
        raise ValueError(
            f"the Ray of this process cannot start workers: its interpreter's path has characters that need quoting "
            f"({sys.executable}), and Ray hands it to a shell as it is; start it with ray.init(runtime_env="
            f"{options['runtime_env']!r}), or leave ray.init out and let the run start Ray"
        )


def check_here(job: Job, config: RuntimeConfig) -> None:
    """Raise ValueError where this machine, or the Ray that this process has, cannot hold the workers.

    A cluster that is yet to be connected to (`address=`) is checked then.
    """
    import ray

    if ray.is_initialized():
        _check_interpreter()
        _cluster_resources(job, config)
    elif config.address is None:
        _local_resources(job, config)


def train_on_cluster(job: Job, config: RuntimeConfig, folder: RunFolder, recorder: Recorder) -> None:
    """Train on `config.workers` ranks. Raises ValueError up front, later the run's one error (`failures.py`)."""
    import ray

    starts_ray = config.address is None and not ray.is_initialized()
    with session(config, num_cores(), num_gpus()) as logs:
        resources = _local_resources(job, config) if starts_ray else _cluster_resources(job, config)
        started_s = time.time()
        try:
            fit(job, config, resources, folder, recorder, alone=starts_ray)
        finally:
            if logs is not None:
                _copy_logs(logs, folder.local / "logs", started_s)


def _local_resources(job: Job, config: RuntimeConfig) -> Resources:
    cores, gpus, spare = num_cores(), num_gpus(), int(is_ray_data(job))
    resources = choose_resources(config, cores, gpus, spare)
    check_capacity(config, resources, {"CPU": cores, "GPU": gpus}, spare)
    return resources


def _cluster_resources(job: Job, config: RuntimeConfig) -> Resources:
    import ray

    there, spare = ray.cluster_resources(), int(is_ray_data(job))
    resources = choose_resources(config, None, int(there.get("GPU", 0)), spare)
    check_capacity(config, resources, there, spare)
    return resources


@contextmanager
def _silence(quiet: bool) -> Iterator[None]:
    """Keep what Ray prints of dead workers off the console: the error that is raised says it, and the logs do."""
    from ray._private import worker

    before = worker._worker_logs_enabled
    worker._worker_logs_enabled = before and not quiet
    try:
        yield
    finally:
        worker._worker_logs_enabled = before


@contextmanager
def _settings(settings: Mapping[str, str]) -> Iterator[None]:
    """Ray takes some of its settings from the environment alone: set those that the user has not, for a while."""
    added = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _copy_logs(logs: Path, target: Path, since_s: float) -> None:
    """Copy what Ray wrote on this machine since `since_s`, the last MiB of each file."""
    for source in sorted(path for path in logs.rglob("*") if path.is_file()):
        try:
            status = source.stat()
            if status.st_mtime < since_s - 1 or status.st_size == 0:
                continue
            copy = target / source.relative_to(logs)
            copy.parent.mkdir(parents=True, exist_ok=True)
            with source.open("rb") as reader, copy.open("wb") as writer:
                reader.seek(max(0, status.st_size - _LOG_TAIL_BYTES))
                shutil.copyfileobj(reader, writer)
        except FileNotFoundError:  # Ray rotates and removes logs as it likes
            continue
