"""`Runtime(workers=0)`: the whole path in this process, with the real engine."""

import json
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

from outgrow import Callback, Memory, Runtime
from outgrow.memory.errors import DoesNotFit, NotFinite
from outgrow.memory.timeline import Span, Timeline
from outgrow.runtime.data import DataError
from outgrow.runtime.result import Metrics, Result
from outgrow.scheduler.plan import Plan
from outgrow.scheduler.prediction import Prediction, TierPrediction

SGD = partial(torch.optim.SGD, lr=0.1)


class Tied(nn.Module):
    """An embedding whose weights are also the output's, and a buffer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.inner = nn.Linear(4, 4)
        self.output = nn.Linear(4, 10, bias=False)
        self.output.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, tokens):
        return self.output(self.inner(self.embedding(tokens)) * self.scale)


def regression(num_samples=24):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(num_samples, 5, generator=generator)
    return TensorDataset(inputs, inputs.sum(1, keepdim=True))


def runtime(tmp_path, **arguments):
    return Runtime(workers=0, storage_path=tmp_path / "my runs", progress=False, **arguments)


@pytest.mark.parametrize("offload", [None, "none", "host", "all"])
def test_a_device_apart_from_the_host_trains_to_the_same_weights(tmp_path, offload):
    loss, arguments = nn.functional.mse_loss, {"batch_size": 12, "steps": 3, "micro_batches": 2}
    wanted = runtime(tmp_path, name="one").train(layers(), regression(), loss, SGD, **arguments)
    memory = Memory(device="64MiB", host="64GiB", disk=tmp_path, unified=False)
    place = runtime(tmp_path, name="apart", memory=memory)
    result = place.train(layers, regression(), loss, SGD, offload=offload, **arguments)
    assert [row["loss"] for row in result.metrics] == [row["loss"] for row in wanted.metrics]
    for name, weight in wanted.state_dict().items():
        assert torch.equal(result.state_dict()[name], weight)
    homes = {"none": "device", "host": "host", "all": "disk", None: "device"}
    plan = json.loads((result.path / "plan.json").read_text())
    assert {chunk["parameter_home"] for chunk in plan["chunks"]} == {homes[offload]}
    assert not plan["unified"]


def layers():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))


def test_trains_like_a_plain_loop_and_leaves_a_whole_run_folder(tmp_path):
    plain, model = layers(), layers()
    optimizer, losses = SGD(plain.parameters()), []
    for step in range(5):
        rows = slice(step % 2 * 12, step % 2 * 12 + 12)
        inputs, targets = (tensor[rows] for tensor in regression().tensors)
        loss = nn.functional.mse_loss(plain(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    loss, place = nn.functional.mse_loss, runtime(tmp_path, name="one", memory=Memory(host="64GiB"))
    result = place.train(model, regression(), loss, SGD, batch_size=12, steps=5)

    assert [row["loss"] for row in result.metrics] == losses
    assert [row["epoch"] for row in result.metrics] == [0, 0, 1, 1, 2]
    weights = result.state_dict()
    for name, weight in plain.state_dict().items():
        assert torch.equal(weights[name], weight)
        assert torch.equal(model.state_dict()[name], weight)  # in place
    assert result.path == tmp_path / "my runs" / "one"
    names = sorted(path.name for path in result.path.iterdir())
    assert names == [
        "metrics.jsonl",
        "model.safetensors",
        "plan.json",
        "prediction.json",
        "result.json",
        "timeline.json",
    ]
    lines = (result.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == list(result.metrics)
    assert Plan.from_json((result.path / "plan.json").read_text()) == result.plan
    assert json.loads((result.path / "timeline.json").read_text())["traceEvents"]
    summary = json.loads((result.path / "result.json").read_text())
    assert summary == result.summary
    assert (summary["status"], summary["loss_first"], summary["loss_last"]) == ("finished", losses[0], losses[-1])
    assert summary["arguments"]["batch_size"] == 12
    assert summary["state_bytes"]["0"]["param"] > 0
    assert 0 < summary["base_bytes"]["0"] <= summary["peak_bytes"]["0"]["host"]
    row = result.metrics[0]
    assert set(row) == {
        *("step", "epoch", "loss", "tokens_per_s", "grad_norm", "lr", "num_samples", "num_tokens", "step_s"),
        "peak_host_bytes",
        "busy_compute_s",
    }
    frame = result.metrics.to_pandas()
    assert list(frame.index) == [1, 2, 3, 4, 5]
    assert list(frame["loss"]) == losses


def test_tied_weights_and_buffers_come_back_under_every_name(tmp_path):
    tokens = torch.randint(0, 10, (8, 3), generator=torch.Generator().manual_seed(0))
    model = Tied()
    result = runtime(tmp_path).train(
        model, TensorDataset(tokens, tokens), lambda output, target: output.logsumexp(-1).mean(), batch_size=4, steps=3
    )
    weights = result.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert weights["output.weight"].data_ptr() == weights["embedding.weight"].data_ptr()
    fresh = Tied()
    fresh.load_state_dict(weights)
    assert torch.equal(fresh.output.weight, model.output.weight)


def test_epochs_end_the_run_also_with_a_smaller_last_batch(tmp_path):
    result = runtime(tmp_path).train(layers(), regression(10), nn.functional.mse_loss, batch_size=4, epochs=2)
    assert [row["num_samples"] for row in result.metrics] == [4, 4, 2] * 2
    assert [row["epoch"] for row in result.metrics] == [0, 0, 0, 1, 1, 1]


def test_a_model_function_gives_the_same_weights_each_time(tmp_path):
    def train(seed):
        torch.manual_seed(torch.seed() % 1000)
        build = partial(nn.Linear, 5, 1)
        return runtime(tmp_path).train(build, regression(), nn.functional.mse_loss, SGD, steps=1, seed=seed).metrics

    assert train(1)[0]["loss"] == train(1)[0]["loss"] != train(2)[0]["loss"]


def tokens(num_samples=8):
    values = torch.randint(0, 10, (num_samples, 3), generator=torch.Generator().manual_seed(0))
    return TensorDataset(values, values)


def cross_entropy(output, target):
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


def normal(module):
    for parameter in module.parameters(recurse=False):
        nn.init.normal_(parameter)


def train_tied(tmp_path, model, steps=2, **arguments):
    return runtime(tmp_path).train(model, tokens(), cross_entropy, SGD, batch_size=4, steps=steps, **arguments)


def build_tied():
    return Tied()


def on_meta():
    with torch.device("meta"):
        model = Tied()
    model.scale = torch.tensor(2.0)
    return model


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_run_goes_on_from_the_weights_of_another(tmp_path, precision, monkeypatch):
    whole = train_tied(tmp_path, build_tied, steps=4, precision=precision)
    first = train_tied(tmp_path, build_tied, precision=precision)
    for model, fits in ((build_tied, True), (build_tied, False), (Tied(), True), (on_meta(), True)):
        monkeypatch.setattr("outgrow.runtime.worker.fits_beside", lambda *sizes, fits=fits: fits)
        result = train_tied(tmp_path, model, precision=precision, weights=first.path)
        assert [row["loss"] for row in result.metrics] == [row["loss"] for row in whole.metrics][2:]
        assert all(torch.equal(value, whole.state_dict()[name]) for name, value in result.state_dict().items())


def test_what_init_gives_does_not_depend_on_whether_the_model_fits(tmp_path, monkeypatch):
    results = []
    for model, fits in ((build_tied, True), (build_tied, False), (Tied(), True), (on_meta(), True)):
        monkeypatch.setattr("outgrow.runtime.worker.fits_beside", lambda *sizes, fits=fits: fits)
        results.append(train_tied(tmp_path, model, init=normal, seed=5))
    states = [result.state_dict() for result in results]
    assert all(torch.equal(state[name], value) for state in states for name, value in states[0].items())
    other = train_tied(tmp_path, build_tied, init=normal, seed=6)
    assert not torch.equal(other.state_dict()["inner.weight"], states[0]["inner.weight"])


def test_values_of_ones_own_are_never_replaced_in_silence(tmp_path, monkeypatch):
    monkeypatch.setattr("outgrow.runtime.worker.fits_beside", lambda *sizes: False)
    with pytest.raises(DoesNotFit, match=r"this Tied takes .* Give init=f\(module\)"):
        train_tied(tmp_path, build_tied)
    with pytest.raises(ValueError, match=r"init= left .*without values"):
        train_tied(tmp_path, build_tied, init=lambda module: None)


def test_weights_are_checked_before_a_folder_is_made(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"not those of this model.*Not in the model: weight"):
        train_tied(tmp_path, Tied(), weights=tmp_path)
    with pytest.raises(ValueError, match="no such file or folder"):
        train_tied(tmp_path, build_tied, weights=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="init= and weights= both"):
        train_tied(tmp_path, build_tied, weights=tmp_path, init=normal)
    assert not (tmp_path / "my runs").exists()
    with pytest.raises(ValueError, match="not those of this model"):
        train_tied(tmp_path, build_tied, weights=tmp_path)


def test_callbacks_see_the_run(tmp_path):
    class Recorder(Callback):
        def __init__(self):
            self.calls = []

        def on_start(self, engine):
            self.calls.append(f"start {engine.plan.world_size}")

        def on_step(self, engine, step):
            self.calls.append(step.step)

        def on_end(self, engine, step):
            self.calls.append(f"end {step.step}")

        def on_error(self, error):
            self.calls.append(f"error {error}")

    recorder = Recorder()
    runtime(tmp_path).train(layers(), regression(), nn.functional.mse_loss, steps=2, batch_size=4, callbacks=[recorder])
    assert recorder.calls == ["start 1", 1, 2, "end 2"]

    class Failing(Recorder):
        def on_step(self, engine, step):
            raise RuntimeError("enough")

    failing = Failing()
    with pytest.raises(RuntimeError, match="enough"):
        runtime(tmp_path).train(layers(), regression(), nn.functional.mse_loss, batch_size=4, callbacks=[failing])
    assert failing.calls == ["start 1", "error enough"]


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_it_whole(tmp_path):
    data = regression()
    data.tensors[1][9] = float("nan")
    with pytest.raises(NotFinite, match="step 3"):
        runtime(tmp_path, name="bad").train(layers(), data, nn.functional.mse_loss, batch_size=4)
    folder = tmp_path / "my runs" / "bad"
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    summary = json.loads((folder / "result.json").read_text())
    assert summary["status"] == "failed"
    assert summary["error"].startswith("NotFinite: step 3")
    assert summary["num_steps"] == 2
    assert (folder / "timeline.json").exists()
    assert (folder / "plan.json").exists()


def test_data_that_yields_nothing_is_named(tmp_path):
    class Nothing(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(DataError, match="not one sample came out"):
        runtime(tmp_path).train(layers(), Nothing(), nn.functional.mse_loss)

    once = iter([(torch.ones(5), torch.ones(1))] * 4)

    class Once(IterableDataset):
        def __iter__(self):
            return once

    with pytest.raises(DataError, match="nothing in epoch 1: it gave 2 batches"):
        runtime(tmp_path).train(layers(), Once(), nn.functional.mse_loss, batch_size=2, steps=9)


def test_mistakes_are_refused_before_a_folder_is_made(tmp_path):
    for arguments in ({"batch_size": 0}, {"micro_batches": 5}, {"zero": 9}, {"precision": "int8"}):
        with pytest.raises(ValueError, match=r"batch_size|zero|precision"):
            runtime(tmp_path).train(layers(), regression(), nn.functional.mse_loss, **arguments)
    with pytest.raises(TypeError, match="learning_rate"):
        runtime(tmp_path).train(layers(), regression(), learning_rate=1)
    far_too_many = Runtime(workers=4096, storage_path=tmp_path / "my runs")
    with pytest.raises(ValueError, match="ask for 4096 CPU"):
        far_too_many.train(layers(), regression(), batch_size=4096)
    assert not (tmp_path / "my runs").exists()


def test_a_far_storage_gets_the_whole_folder(tmp_path):
    place = Runtime(workers=0, storage_path=(tmp_path / "far").as_uri(), name="run", progress=False)
    result = place.train(layers(), regression(), nn.functional.mse_loss, steps=2)
    assert result.path == (tmp_path / "far" / "run").as_uri()
    assert {path.name for path in (tmp_path / "far" / "run").iterdir()} >= {"result.json", "model.safetensors"}
    assert result.state_dict().keys() == layers().state_dict().keys()


def test_result_expands_aliases_and_says_where_it_is(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors", {"aliases": json.dumps({"b": "a"})})
    result = Result(tmp_path, Metrics(), Plan(1, 0, 1, "float32", False, 1, ()), {"loss_first": 2.0, "loss_last": 1.0})
    assert result.state_dict()["b"].tolist() == [1, 1]
    assert "loss 2.0 -> 1.0" in repr(result)
    assert len(Metrics().to_pandas()) == 0


def test_a_run_that_does_not_go_as_predicted_says_so_while_it_runs_and_in_its_report(tmp_path, caplog):
    tiers = (TierPrediction("host", 1000, None, ((0.0, 1000),)),)
    prediction = Prediction(Timeline((Span("compute", "F0.0", 0.0, 1e-7),)), {}, tiers, ("0",))

    class Predicted(Callback):
        said = ()

        def on_start(self, engine):
            engine.prediction = prediction

        def on_step(self, engine, step):
            Predicted.said = (*Predicted.said, len(caplog.records))

    result = runtime(tmp_path, name="one").train(
        layers(), regression(), nn.functional.mse_loss, SGD, batch_size=12, steps=12, callbacks=[Predicted()]
    )
    overrun, drift = result.summary["drifts"]
    assert (overrun["step"], overrun["tier"], overrun["predicted_bytes"]) == (1, "host", 1000)
    assert (drift["step"], drift["since_step"], drift["lane"]) == (9, 2, "compute")
    assert Predicted.said == (1,) * 8 + (2,) * 4, "once each, in the step that makes it sure"
    assert "since step 2 computation takes" in caplog.text
    assert result.report().drifts[1].startswith("Since step 2 computation takes")
