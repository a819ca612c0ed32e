"""Pipelines on real ranks: every schedule gives the weights of the unsplit model, with all that might change them:
tied weights, dropout, a last smaller micro-batch and a last batch with fewer of them, over several steps; with state
and activations on disk, too. And a rank keeps for its backward passes what the schedule's table says.

All that two ranks, or four, are asked is asked in one launch."""

import functools
import tempfile
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import DROPPING, GPT, Case
from ranks import run_outcomes, run_ranks
from torch import nn

from outgrow import Engine, Memory
from outgrow.memory.errors import DoesNotFit, NotFinite
from outgrow.parallel.actions import Kind
from outgrow.parallel.mail import MailError
from outgrow.scheduler.pipeline_timing import simulate
from outgrow.scheduler.pipelines import NAMES
from outgrow.scheduler.stage_choice import schedule_of

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
SIZES = (8, 7, 3)
"""Of global batches in 4 micro-batches: equal ones, a smaller one last, three only."""
DEEP = replace(DROPPING["gpt-tied"], build=lambda: GPT(tied=True, layers=5, dropout=0.2))
"""Of 8 units: two stages on each of four ranks."""
TIED_VEE: dict[str, Any] = {"pipeline": 2, "schedule": "zb-v", "stages": ["blocks.1", "blocks.2", "ln"]}
"""A vee adds the parts of a tied weight in an order that depends on where it is cut, and that on what was measured."""
VEES = ("zb-v", "v-half", "v-min", "dualpipe-v")


def train(case: Case, data: int = 1, place: int = 0, **arguments: Any) -> Any:
    """Losses, gradient norms and weights after the steps."""
    engine = Engine(case.model(), loss=case.loss, optimizer=SGD, micro_batches=4, **arguments)
    try:
        results = []
        for step, samples in enumerate(SIZES):
            batch = tuple(tensor.tensor_split(data)[place] for tensor in case.batch(step, samples))
            results.append(engine.step(batch))
        return [r.loss for r in results], [r.grad_norm for r in results], engine.state_dict()
    finally:
        engine.close()


@functools.cache
def alone(name: str, **arguments: Any) -> Any:
    """The unsplit model on one thread, as each rank has it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return train(DEEP if name == "deep" else DROPPING[name], **arguments)
    finally:
        torch.set_num_threads(threads)


def assert_close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(expected[1]), rtol=1e-6, atol=0)
    assert found[2].keys() == expected[2].keys()
    for name, value in expected[2].items():
        scale = value.abs().max().item() if value.is_floating_point() else 0.0
        torch.testing.assert_close(found[2][name], value, rtol=1e-6, atol=1e-6 * scale, msg=name)


def assert_same(found: Any, expected: Any) -> None:
    """Bit for bit, but for the norm, which is summed over ranks."""
    assert found[0] == expected[0]
    assert found[1] == pytest.approx(expected[1], rel=1e-12)
    assert found[2].keys() == expected[2].keys()
    assert [name for name, value in expected[2].items() if not torch.equal(found[2][name], value)] == []


# ---- two ranks


ON_DISK: dict[str, dict[str, Any]] = {
    "optimizer": {**TIED_VEE, "offload": "optimizer"},
    "parameters": {"schedule": "zb-h1", "offload": "all"},
    "clipped": {"schedule": "1f1b", "offload": "all", "clip_grad_norm": 0.5},
    "bf16": {"schedule": "interleaved", "offload": "optimizer", "precision": "bf16"},
    "activations": {"schedule": "1f1b", "activations": "offload:disk"},
    "copies": {"schedule": "pipeoffload-full"},
}
"""What lies on disk inside stages, and how it is asked for."""


def train_two(rank: int, folder: str) -> dict[str, Any]:
    gpt, tied = DROPPING["gpt"], DROPPING["gpt-tied"]
    found = {name: train(gpt, pipeline=2, schedule=name) for name in NAMES}
    found |= {f"tied {name}": train(tied, pipeline=2, schedule=name) for name in ("1f1b", "interleaved")}
    found["tied zb-v"] = train(tied, **TIED_VEE)
    for name in ("conv", "lstm", "encoder-decoder", "tied-frozen"):
        found[name] = train(DROPPING[name], pipeline=2, schedule="zb-h1")
    found["clip"] = train(gpt, pipeline=2, schedule="zb-v", clip_grad_norm=0.5)
    found["gloo"] = train(gpt, pipeline=2, schedule="interleaved", transport="gloo")
    found["bf16"] = train(gpt, pipeline=2, schedule="zb-v", precision="bf16")
    found["recompute"] = train(gpt, pipeline=2, schedule="zb-v", activations="recompute")
    found["early"] = train(tied, pipeline=2, schedule="zb-h1", update="backward")
    for name, words in ON_DISK.items():
        case = gpt if name == "bf16" else tied  # of which alone adds both parts of a tied gradient in bfloat16
        found[f"disk {name}"] = train(case, **{"pipeline": 2, **words}, memory=Memory(disk=folder))
    found["budget"] = train(gpt, pipeline=2, schedule="auto", memory=Memory(host="16GiB", disk=folder))
    found["beside"] = train(tied, 2, rank)
    found["foreseen"] = foresee(gpt, schedule="zb-v")
    found["foreseen on disk"] = foresee(gpt, schedule="1f1b", offload="optimizer", memory=Memory(disk=folder))
    found["levels"] = levels(rank, folder)
    found["infinity"] = meet_infinity(rank)
    found["refused"] = refuse(rank)
    return found


@functools.cache
def two() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        return run_ranks(train_two, 2, folder)


def test_every_schedule_on_two_ranks_is_the_unsplit_model():
    first, second = two()
    for name in (*NAMES, "tied 1f1b", "tied interleaved", "tied zb-v"):
        assert_same(first[name], second[name])
        assert_close(first[name], alone("gpt-tied" if name.startswith("tied") else "gpt"))
    for name in NAMES:
        assert_same(first[name], first["gpipe"])
    assert_same(first["tied interleaved"], first["tied 1f1b"])  # a vee adds the parts of a tied weight otherwise


@pytest.mark.parametrize("name", ["conv", "lstm", "encoder-decoder", "tied-frozen"])
def test_other_models_on_two_ranks(name: str):
    assert_close(two()[0][name], alone(name))


def test_other_words_on_two_ranks():
    found = two()[0]
    assert_close(found["clip"], alone("gpt", clip_grad_norm=0.5))
    assert_close(found["bf16"], alone("gpt", precision="bf16"))
    for name in ("gloo", "recompute", "budget"):
        assert_same(found[name], found["gpipe"])
    assert_same(found["early"], found["tied 1f1b"])


@pytest.mark.parametrize("name", ON_DISK)
def test_what_lies_on_disk_inside_stages_changes_nothing(name: str):
    found, words = two()[0], ON_DISK[name]
    precise = {key: words[key] for key in ("precision", "clip_grad_norm") if key in words}
    assert_close(found[f"disk {name}"], alone("gpt" if name == "bf16" else "gpt-tied", **precise))
    if not precise:
        assert_same(found[f"disk {name}"], found["tied zb-v" if words["schedule"] == "zb-v" else "tied 1f1b"])


def foresee(case: Case, **words: Any) -> Any:
    """As `train`, and of each step what was foreseen of it and what was run."""
    engine = Engine(case.model(), loss=case.loss, optimizer=SGD, micro_batches=4, pipeline=2, **words)
    results, timelines = [], []
    try:
        for step, samples in enumerate(SIZES):
            foreseen = engine.predict_step(case.batch(step, samples))
            results.append(engine.step(case.batch(step, samples)))
            timelines.append((foreseen, engine.timeline))
        return ([r.loss for r in results], [r.grad_norm for r in results], engine.state_dict()), timelines
    finally:
        engine.close()


def test_a_step_is_foreseen_as_the_program_that_is_run_and_nothing_is_changed_by_it():
    trained, (first, *others) = two()[0]["foreseen"]
    assert_same(trained, two()[0]["zb-v"])
    assert first[0] is None
    for pair in others:
        foreseen, run = ([span.action for span in each.spans if span.lane == "compute"] for each in pair)
        assert foreseen == run
    assert all(foreseen is None for foreseen, _ in two()[0]["foreseen on disk"][1])  # transfers are not timed


# ---- activations


class Even(nn.Module):
    """A unit that keeps much for its input's gradient alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = self.up(self.norm(x))
        for _ in range(3):
            wide = torch.tanh(nn.functional.gelu(wide))
        return x + self.down(wide)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Even() for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


TABLED = ("gpipe", "1f1b", "zb-h1", "zb-v", "v-half", "gis", "pipeoffload-full")


def levels(rank: int, folder: str) -> dict[str, Any]:
    """Schedule -> what a step says it kept at most, the table's peak, and what was kept behind each action."""
    found = {}
    for name in (*TABLED, "on disk"):
        schedule = "pipeoffload-full" if name == "on disk" else name
        chunks = {"chunks": 4} if schedule == "pipeoffload-full" else {}
        num_stages = 2 * (4 if chunks else 1 if schedule in ("gpipe", "1f1b", "zb-h1") else 2)
        starts = [f"layers.{8 // num_stages * stage}" for stage in range(num_stages)]
        memory = Memory(disk=folder) if name == "on disk" else None
        words = {"schedule": schedule, "stages": starts, "memory": memory, **chunks}
        engine = Engine(Chain(), optimizer=SGD, micro_batches=8, pipeline=2, **words)
        result = [engine.step(torch.ones(16, 32, 16)) for _ in range(2)][1]
        assert engine.plan.pipeline is not None
        peak = simulate(schedule_of(engine.plan.pipeline, 8)).peak_activations[rank]
        found[name] = result.saved_bytes, peak, engine.saved_levels
        engine.close()
    return found


def test_a_rank_keeps_what_the_table_says():
    for rank, found in enumerate(each["levels"] for each in two()):
        unit = found["1f1b"][2][0][1]  # behind the first forward of a stage of half the model
        for name in ("gpipe", "1f1b"):
            saved_bytes, peak, _ = found[name]
            # The last stage keeps its last output for the loss, and what it was given last is a part of that.
            assert abs(saved_bytes - peak * unit) <= (0.06 * peak * unit if rank else 0), name
        for name in TABLED[2:]:
            saved_bytes, peak, _ = found[name]
            copies = 0.75 if name == "pipeoffload-full" else 0  # these are not made where there is no disk
            assert 0.75 * peak * unit < saved_bytes < (1.06 * peak + copies) * unit, name


def test_input_gradients_free_a_part_and_weight_gradients_the_rest():
    for found in (each["levels"] for each in two()):
        for name in ("zb-h1", "zb-v", "v-half", "gis"):
            before, held = 0, {}
            for action, now in found[name][2]:
                place = action.index, action.micro_batch
                match action.kind:
                    case Kind.F:
                        held[place] = now - before
                    case Kind.I:
                        assert 0.3 * held[place] < before - now < 0.7 * held[place], (name, str(action))
                        held[place] -= before - now
                    case _:
                        assert before - now == held.pop(place), (name, str(action))
                before = now
            assert not held
            assert before == 0


def test_copies_to_disk_leave_memory():
    for found in (each["levels"] for each in two()):
        unit, stage = found["1f1b"][2][0][1], found["1f1b"][2][0][1] / 4
        saved_bytes, peak, behind = found["on disk"]
        assert saved_bytes < found["pipeoffload-full"][0]
        assert saved_bytes < 1.06 * (peak * unit + 2 * stage)  # two forwards may be ahead of the disk
        assert behind[-1][1] == 0


# ---- four ranks


def train_four(rank: int, folder: str, names: tuple[str, ...] = NAMES) -> dict[str, Any]:
    found = {name: train(DEEP, pipeline=4, schedule=name) for name in names}
    tied, place = DROPPING["gpt-tied"], rank % 2
    found["2x2"] = train(tied, 2, place, **TIED_VEE)
    return found | {
        f"2x2 {offload}": train(tied, 2, place, offload=offload, memory=Memory(disk=folder), **TIED_VEE)
        for offload in ("optimizer", "all")
    }


@functools.cache
def four() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        return run_ranks(train_four, 4, folder)


def test_every_schedule_on_four_ranks_is_the_unsplit_model():
    outcomes = four()
    for name in NAMES:
        for outcome in outcomes[1:]:
            assert_same(outcome[name], outcomes[0][name])
        assert_close(outcomes[0][name], alone("deep"))
        if name not in (*VEES, "auto"):  # a vee adds the parts of a tied weight otherwise
            assert_same(outcomes[0][name], outcomes[0]["gpipe"])


def test_two_pipelines_with_shared_state():
    outcomes = four()
    for outcome in outcomes:
        assert_close(outcome["2x2"], two()[0]["beside"])
        for offload in ("optimizer", "all"):
            assert_same(outcome[f"2x2 {offload}"], outcome["2x2"])


# ---- failures


class Spoiled(nn.Module):
    """Infinite at the second step."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).sum()


def meet_infinity(rank: int) -> Any:
    engine = Engine(Spoiled(), optimizer=SGD, micro_batches=2, pipeline=2)
    try:
        losses = [engine.step(torch.ones(4, 4)).loss]
        try:
            engine.step(torch.full((4, 4), torch.inf))
        except (NotFinite, MailError) as error:
            losses.append(str(error))
        return [*losses, engine.step(torch.ones(4, 4)).loss]
    finally:
        engine.close()


def test_a_step_that_fails_on_one_rank_fails_on_all_and_can_be_done_again():
    first, last = (found["infinity"] for found in two())
    assert "rank 1 of the pipeline gave the step up: NotFinite: step 2" in first[1]
    assert "the loss is" in last[1]
    assert first[2] == last[2] < first[0]


class Skipping(nn.Module):
    """The last unit reads what the first one made."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle, self.up = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.down(x)
        return (self.up(self.middle(first)) + first).sum()


def refuse(rank: int) -> list[str]:
    messages = []
    batch = torch.ones(4, 4)
    for model, words in (
        (Skipping(), {"stages": ["down", "middle", "up"], "schedule": "gis"}),
        (Skipping(), {"stages": ["down", "up"]}),
        (Spoiled(), {"schedule": "interleaved", "chunks": 3}),
        (Spoiled(), {"stages": ["layers.0", "layers.7"]}),
    ):
        engine = Engine(model, optimizer=SGD, micro_batches=2, pipeline=2, **words)
        with pytest.raises(ValueError) as error:
            engine.step(batch)
        messages.append(str(error.value))
        engine.close()
    engine = Engine(Spoiled(), optimizer=SGD, pipeline=2, memory=Memory(host="1MiB"))
    with pytest.raises(DoesNotFit) as missing:
        engine.step(batch)
    engine.close()
    with pytest.raises(ValueError) as error:
        Engine(Spoiled(), pipeline=3)
    return [*messages, str(missing.value), str(error.value)]


def test_what_cannot_be_is_refused_with_names():
    few, skip, many, unknown, missing, ranks = two()[0]["refused"]
    assert "3 stages are given, and the schedule has 4" in few
    assert "the model's output in stage 1 uses the output of down in stage 0" in skip
    assert "6 stages need at least so many units, and the model runs 4" in many
    assert "no plan of this pipeline fits into 1.00 MiB a rank" in missing
    assert "give a disk (Memory(disk='/a/folder'))" in missing
    assert "'layers.7' is no unit that this model runs" in unknown
    assert "pipeline=3" in ranks
    assert "there are 2" in ranks


def leave(rank: int) -> float:
    engine = Engine(Spoiled(), optimizer=SGD, micro_batches=2, pipeline=2)
    engine.step(torch.ones(4, 4))
    if rank == 1:
        raise RuntimeError("gone")
    return engine.step(torch.ones(4, 4)).loss


def test_a_rank_that_ends_is_noticed_at_once():
    first, _ = run_outcomes(leave, 2, timeout_s=60)
    assert isinstance(first, MailError)
    assert "has ended" in str(first) or "has left" in str(first)
