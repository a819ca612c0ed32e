"""Capacity: what each worker asks of Ray, and whether the cluster can ever hold the workers.

Decides only; knows nothing of Ray. What is there is passed in (`cluster.py` reads it off the machine or off Ray).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from .config import RuntimeConfig

__all__ = ["Resources", "check_capacity", "choose_resources"]


@dataclass(frozen=True)
class Resources:
    """What each worker asks of Ray, and the threads that it computes with."""

    per_worker: Mapping[str, float]
    num_threads: int

    @property
    def uses_gpu(self) -> bool:
        return self.per_worker.get("GPU", 0) > 0


def choose_resources(config: RuntimeConfig, cores: int | None, gpus: int, num_spare_cores: int) -> Resources:
    """What each worker gets. `cores` None: a cluster, where a worker asks for one CPU unless told otherwise.

    On this machine the workers share all cores, less `num_spare_cores` that Ray Data needs; each has a GPU where there
    are any.
    """
    if config.resources_per_worker is not None:
        per_worker = dict(config.resources_per_worker)
        return Resources({"CPU": 1} | per_worker, max(1, int(per_worker.get("CPU", 1))))
    share = 1 if cores is None else max(1, (cores - num_spare_cores) // config.workers)
    return Resources({"CPU": share} | ({"GPU": 1} if gpus else {}), share)


def check_capacity(
    config: RuntimeConfig, resources: Resources, there: Mapping[str, float], num_spare_cores: int
) -> None:
    """Raise ValueError where the cluster can never hold the workers: what is asked, what is there, what to change."""
    for resource, each in resources.per_worker.items():
        spare = num_spare_cores if resource == "CPU" else 0
        asked, has = config.workers * each + spare, there.get(resource, 0)
        if asked <= has:
            continue
        fitting = int((has - spare) // each) if each else 0
        changes = [f"workers={fitting}"] if fitting >= 1 else []
        if resource == "CPU":
            changes.append(f'resources_per_worker={{"CPU": {max(has - spare, 0) / config.workers:.2g}}} to share cores')
        elif resource == "GPU":
            changes.append('resources_per_worker={"CPU": 1, "GPU": 0} to train on CPUs')
        else:
            changes.append(f"fewer {resource!r} in resources_per_worker")
        changes.append("a larger cluster by address=")
        raise ValueError(
            f"workers={config.workers} with {each:g} {resource} each"
            + (f" and {spare} {resource} for Ray Data" if spare else "")
            + f" ask for {asked:g} {resource}, and the cluster has {has:g}; change one of: {'; '.join(changes)}"
        )
