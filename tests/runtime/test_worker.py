import pickle
from functools import partial

import pytest
import safetensors.torch
import torch
from models import GPT
from torch import nn

from outgrow import Memory
from outgrow.memory.errors import DoesNotFit
from outgrow.memory.process import read_process_memory
from outgrow.runtime import worker
from outgrow.runtime.building import is_placeholder
from outgrow.runtime.config import Job, TrainConfig
from outgrow.runtime.data import DataError, Share
from outgrow.runtime.filling import InitFiller, WeightsFiller
from outgrow.runtime.worker import num_steps, shares


class Epochs:
    """A source whose epochs hold so many batches."""

    def __init__(self, *sizes, num_batches=None):
        self.sizes, self.num_batches = sizes, num_batches

    def epoch(self, epoch):
        return (Share(None, 1, epoch) for _ in range(self.sizes[min(epoch, len(self.sizes) - 1)]))


def epochs_of(source, **arguments):
    return [share.epoch for share in shares(source, TrainConfig(**arguments))]


def test_steps_go_on_over_epochs_and_epochs_end_on_their_own():
    assert epochs_of(Epochs(2), steps=5) == [0, 0, 1, 1, 2]
    assert epochs_of(Epochs(2), steps=2) == [0, 0]
    assert epochs_of(Epochs(2), epochs=2) == [0, 0, 1, 1]


def test_an_epoch_without_batches_is_an_error_not_an_endless_loop():
    with pytest.raises(DataError, match="not one sample"):
        epochs_of(Epochs(0), steps=5)
    with pytest.raises(DataError, match="nothing in epoch 1: it gave 2 batches before"):
        epochs_of(Epochs(2, 0), steps=5)
    with pytest.raises(DataError, match="not one sample"):
        epochs_of(Epochs(0), epochs=3)


def test_number_of_steps_where_it_can_be_known():
    assert num_steps(Epochs(2), TrainConfig(steps=5)) == 5
    assert num_steps(Epochs(2, num_batches=2), TrainConfig(epochs=3)) == 6
    assert num_steps(Epochs(2), TrainConfig(epochs=3)) is None


# ---- the model that an engine gets


class Engine:
    """Keeps what it was given."""

    def __init__(self, model, *, filler=None, **arguments):
        self.model, self.filler = model, filler


@pytest.fixture
def engine(monkeypatch):
    """engine(model, ...): what the worker gives to its engine, within a budget of so many bytes beside the process."""
    monkeypatch.setattr(worker, "Engine", Engine)

    def make(model, num_bytes=1 << 30, init=None, **arguments):
        memory = Memory(host=read_process_memory().resident_bytes + num_bytes)
        return worker._engine(Job(TrainConfig(**arguments), model, [], init=init), memory, "demo")

    return make


def wide():
    return nn.Sequential(nn.Linear(4096, 4096), nn.Linear(4096, 4096))  # 128 MiB


def on_meta():
    with torch.device("meta"):
        return GPT()


def test_a_model_that_fits_keeps_its_own_values(engine):
    torch.manual_seed(3)
    expected = GPT()
    given = engine(partial(GPT), seed=3)
    assert given.filler is None
    assert all(torch.equal(value, given.model.state_dict()[name]) for name, value in expected.state_dict().items())
    model = GPT()
    assert engine(model).model is model


def test_a_model_that_does_not_fit_needs_values_from_elsewhere(engine):
    with pytest.raises(DoesNotFit, match=r"takes 128\.03 MiB as .* host budget of .* Give init=f\(module\)") as caught:
        engine(wide, num_bytes=150 << 20)  # the model alone would fit, but not while a unit of it is moved
    assert caught.value.outgrow_argument
    given = engine(wide, num_bytes=150 << 20, init=print)
    assert all(is_placeholder(parameter) for parameter in given.model.parameters())
    assert isinstance(given.filler, InitFiller)
    assert not any(is_placeholder(parameter) for parameter in engine(wide, init=print).model.parameters())


def test_weights_are_for_models_of_any_size_and_fill_buffers_at_once(engine, tmp_path):
    build = partial(nn.BatchNorm1d, 4)
    state = build().state_dict() | {"running_var": torch.full((4,), 5.0)}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    with torch.device("meta"):
        meta = build()
    for model, num_bytes in ((build, 1 << 30), (build, 1), (meta, 1)):
        given = engine(model, num_bytes, weights=tmp_path)
        assert isinstance(given.filler, WeightsFiller)
        assert given.model.running_var.tolist() == [5.0] * 4


def test_a_model_on_meta_needs_values_and_real_buffers(engine):
    with pytest.raises(ValueError, match=r"parameters of this GPT are on torch's meta device.* give init=") as caught:
        engine(on_meta())
    assert caught.value.outgrow_argument
    with pytest.raises(ValueError, match="parameters of this GPT are on torch's meta"):
        engine(pickle.loads(pickle.dumps(on_meta())))
    given = engine(on_meta(), init=print)
    assert all(is_placeholder(parameter) for parameter in given.model.parameters())
    with torch.device("meta"):
        model = nn.BatchNorm1d(4)
    with pytest.raises(ValueError, match=r"buffers of this BatchNorm1d are .*: running_mean, running_var, num_batches"):
        engine(model, init=print)


def test_what_is_no_model_is_an_argument_that_was_refused(engine):
    with pytest.raises(ValueError, match=r"must return an nn\.Module, got int") as caught:
        engine(lambda: 3)
    assert caught.value.outgrow_argument
    with pytest.raises(ValueError, match="the model ReLU has no trainable parameter"):
        engine(lambda: nn.ReLU())
