"""Runs on Ray: one that the run starts for itself, the others on a Ray that this file starts once.

Ray is told of four cores, so that two workers leave some for Ray Data.
"""

import json
import logging
import os
import signal
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from outgrow import Callback, Runtime
from outgrow.memory.errors import WorkerError
from outgrow.memory.worker_environment import asks_for_huge_pages
from outgrow.runtime.cluster import interpreter_options

pytestmark = pytest.mark.ray
SGD = partial(torch.optim.SGD, lr=0.1)


@pytest.fixture(scope="module", autouse=True)
def _travels_by_value():
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def shared_ray():
    import ray

    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    ray.init(address="local", num_cpus=4, **options, **interpreter_options())
    yield ray
    ray.shutdown()


def inputs():
    return torch.randn(20, 5, generator=torch.Generator().manual_seed(0))


def regression():
    return TensorDataset(inputs(), inputs().sum(1, keepdim=True))


def layers():
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))


class FailsOnRank1(nn.Module):
    """Linear; on rank 1, in the third step, it does what `how` says."""

    def __init__(self, how):
        super().__init__()
        self.layer, self.how, self.num_calls = nn.Linear(5, 1), how, 0

    def forward(self, rows):
        self.num_calls += torch.is_grad_enabled() and rows.device.type != "meta"
        if torch.distributed.get_rank() == 1 and self.num_calls == 3:
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyError("boom")
        return self.layer(rows)


class WritesWhere(Callback):
    """Writes the rank and process that it runs in, its threads and how its tensors are allocated."""

    def __init__(self, path):
        self.path = path

    def on_end(self, engine, step):
        words = engine.rank, os.getpid(), torch.get_num_threads(), asks_for_huge_pages(), len(os.sched_getaffinity(0))
        self.path.write_text(" ".join(map(str, words)))


def test_a_killed_worker_ends_the_run_with_its_rank_and_nothing_on_the_console(tmp_path, capfd):
    """On a Ray of the run's own, which is gone afterwards."""
    import ray

    assert not ray.is_initialized()
    runtime = Runtime(
        workers=2, resources_per_worker={"CPU": 0.5}, storage_path=tmp_path / "a b", name="run", progress=False
    )
    with pytest.raises(WorkerError, match="rank 1 of 2 ended without a word after step 2") as caught:
        runtime.train(partial(FailsOnRank1, "kill"), regression(), nn.functional.mse_loss, batch_size=4)
    assert caught.value.rank == 1
    assert not ray.is_initialized()
    assert capfd.readouterr() == ("", "")
    folder = tmp_path / "a b" / "run"
    assert json.loads((folder / "result.json").read_text())["status"] == "failed"
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert list((folder / "logs").glob("worker-*.out"))


def test_two_ranks_train_as_one(tmp_path, shared_ray, capfd):
    place = tmp_path / "where"
    arguments = {"loss": nn.functional.mse_loss, "optimizer": SGD, "batch_size": 8, "steps": 5, "shuffle": True}
    alone = Runtime(workers=0, storage_path=tmp_path, progress=False).train(layers, regression(), **arguments)
    both = Runtime(workers=2, storage_path=tmp_path, name="both", progress=False).train(
        layers, regression, callbacks=[WritesWhere(place)], **arguments
    )
    assert both.plan.world_size == 2
    assert [row["num_samples"] for row in both.metrics] == [8, 8, 4, 8, 8]
    losses = [[row["loss"] for row in result.metrics] for result in (alone, both)]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]))
    for name, weight in alone.state_dict().items():
        torch.testing.assert_close(both.state_dict()[name], weight)
    rank, process, threads, in_huge_pages, cores = place.read_text().split()
    assert (rank, threads, in_huge_pages) == ("0", "1", "True")
    cores_here = len(os.sched_getaffinity(0))
    assert int(cores) == (cores_here // 2 if cores_here % 2 == 0 else cores_here), "its share of the cores"
    assert int(process) != os.getpid()
    assert set(both.summary["peak_bytes"]) == set(both.summary["state_bytes"]) == {"0", "1"}
    jsons = {"plan.json", "prediction.json", "result.json", "timeline.json"}
    expected = {"logs", "metrics.jsonl", "model.safetensors"} | jsons
    assert {path.name for path in (tmp_path / "both").iterdir()} == expected
    assert capfd.readouterr() == ("", "")


def test_a_workers_exception_reaches_the_caller_once(tmp_path, shared_ray):
    runtime = Runtime(workers=2, storage_path=tmp_path, name="run", progress=False)
    with pytest.raises(WorkerError, match=r"rank 1, step 3.* \(of 2 ranks\): KeyError: 'boom'") as caught:
        runtime.train(partial(FailsOnRank1, "raise"), regression(), nn.functional.mse_loss, batch_size=4)
    assert (caught.value.rank, caught.value.step) == (1, 3)
    assert isinstance(caught.value.__cause__, KeyError)
    assert str(caught.value).count("Traceback (most recent call last)") == 1
    assert 'raise KeyError("boom")' in str(caught.value)
    assert "WorkerError" in json.loads((tmp_path / "run" / "result.json").read_text())["error"]


def test_ray_data_gives_every_rank_its_rows(tmp_path, shared_ray):
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    data = ray.data.from_numpy(inputs().numpy())
    arguments = {"forward": mean_square, "optimizer": SGD, "batch_size": 8, "steps": 4}
    one, two = (
        Runtime(workers=workers, storage_path=tmp_path, progress=False).train(seeded_linear, data, **arguments)
        for workers in (0, 2)
    )
    torch.testing.assert_close(
        torch.tensor([row["loss"] for row in two.metrics]), torch.tensor([row["loss"] for row in one.metrics])
    )
    assert [row["num_samples"] for row in two.metrics] == [8, 8, 4, 8]


def test_more_workers_than_cores_are_refused_before_a_folder_is_made(tmp_path, shared_ray):
    with pytest.raises(ValueError, match=r"ask for 5 CPU, and the cluster has 4; .*workers=4"):
        Runtime(workers=5, storage_path=tmp_path, progress=False).train(layers(), regression(), batch_size=10)
    assert list(tmp_path.iterdir()) == []


def mean_square(model, batch):
    return model(batch["data"]).square().mean()


def seeded_linear():
    return nn.Linear(5, 3)
