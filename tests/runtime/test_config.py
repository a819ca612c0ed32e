from datetime import datetime
from functools import partial

import pytest
import torch
from torch import nn

from outgrow import Callback, Memory
from outgrow.runtime.config import Job, RuntimeConfig, TrainConfig, check_batch_size


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"batch_size": 2.0}, "batch_size"),
        ({"micro_batches": 0}, "micro_batches"),
        ({"steps": -3}, "steps must be an integer >= 1, got -3"),
        ({"steps": True}, "steps"),
        ({"steps": None}, "steps=None needs epochs="),
        ({"epochs": 0}, "epochs"),
        ({"steps": 5, "epochs": 2}, "steps=5 and epochs=2 both say when to stop"),
        ({"steps": 1000, "epochs": 2}, "both say when to stop"),
        ({"clip_grad_norm": 0}, "clip_grad_norm must be a number > 0"),
        ({"clip_grad_norm": float("nan")}, "clip_grad_norm"),
        ({"precision": "float16"}, "precision must be one of .*bf16.*, got 'float16'"),
        ({"zero": 4}, "zero must be 0, 1, 2, 3 or None"),
        ({"zero": True}, "zero"),
        ({"shuffle": 1}, "shuffle"),
        ({"seed": -1}, "seed"),
        ({"weights": 3}, "weights must be a path or None, got 3"),
        ({"weights": ""}, "weights must be a path"),
        ({"weights": b"folder"}, "weights must be a path"),
        ({"weights": "s3://bucket/model"}, r"that every worker can open, got 's3://bucket/model'"),
    ],
)
def test_train_config_refuses(arguments, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**arguments)


def test_weights_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert TrainConfig(weights="my folder/w").weights == str(tmp_path / "my folder" / "w")
    assert TrainConfig(weights=tmp_path).to_json()["weights"] == str(tmp_path)
    assert TrainConfig().weights is None


def test_train_config_defaults_and_json():
    config = TrainConfig()
    assert (config.steps, config.epochs, config.batch_size) == (1000, None, 32)
    assert not config.batch_size_given
    assert TrainConfig(batch_size=32).batch_size_given
    assert TrainConfig(epochs=2).steps is None
    assert TrainConfig(precision="bfloat16").precision == "bf16"
    json = TrainConfig(steps=7).to_json()
    assert json["steps"] == 7
    assert type(TrainConfig().to_json()["batch_size"]) is int
    assert "batch_size_given" not in json


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"workers": -1}, "workers must be an integer >= 0"),
        ({"workers": 1, "memory": "2GiB"}, "memory must be outgrow.Memory"),
        ({"workers": 1, "address": 7}, "address"),
        ({"workers": 0, "address": "auto"}, "workers=0 trains in this process"),
        ({"workers": 0, "resources_per_worker": {"CPU": 1}}, "workers=0 trains in this process"),
        ({"workers": 1, "placement_strategy": "TIGHT"}, "PACK, SPREAD"),
        ({"workers": 1, "resources_per_worker": {"CPU": -1}}, "amounts >= 0"),
        ({"workers": 1, "name": "a/b"}, "without slashes"),
        ({"workers": 1, "name": ".."}, "name"),
        ({"workers": 1, "name": ""}, "name"),
    ],
)
def test_runtime_config_refuses(arguments, words):
    with pytest.raises(ValueError, match=words):
        RuntimeConfig(**arguments)


def test_run_name_is_the_given_one_or_the_time():
    now = datetime(2026, 1, 2, 3, 4, 5, 678900)
    assert RuntimeConfig(workers=0, name="mine").run_name(now) == "mine"
    assert RuntimeConfig(workers=0).run_name(now) == "2026-01-02_03-04-05_678"


def test_runtime_config_takes_a_memory():
    assert RuntimeConfig(workers=1, memory=Memory(host="2GiB")).memory == Memory(host="2GiB")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": nn.ReLU()}, "ReLU has no trainable parameter"),
        ({"model": nn.Linear(2, 2).requires_grad_(False)}, "2 parameters is frozen"),
        ({"model": nn.Linear}, "must be an nn.Module, or a function"),
        ({"model": 3}, "must be an nn.Module, or a function"),
        ({"loss": "mse"}, "loss must be a function or None"),
        ({"optimizer": torch.optim.SGD(nn.Linear(1, 1).parameters())}, "optimizer must be a function"),
        ({"callbacks": (print,)}, "outgrow.Callback objects"),
        ({"init": "normal"}, "init must be a function or None, got 'normal'"),
        ({"init": print, "config": TrainConfig(weights="w")}, "init= and weights= both say"),
    ],
)
def test_job_refuses(arguments, words):
    with pytest.raises(ValueError, match=words):
        Job(**({"config": TrainConfig(), "model": nn.Linear(2, 2), "data": []} | arguments))


def test_job_takes_functions():
    job = Job(TrainConfig(), partial(nn.Linear, 2, 2), [], optimizer=torch.optim.SGD, callbacks=(Callback(),))
    assert job.optimizer is torch.optim.SGD


def test_batch_size_names_its_neighbours():
    check_batch_size(32, 4, 2)
    with pytest.raises(ValueError, match=r"batch_size=30 .* 4 ranks x 2 micro-batches = 8; .* 24 or 32"):
        check_batch_size(30, 4, 2)
    with pytest.raises(ValueError, match="the nearest that do: 8 "):
        check_batch_size(3, 4, 2)
