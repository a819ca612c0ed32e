"""Pipelines on real ranks: every schedule gives the weights of the unsplit model, with all that might change them:
tied weights, dropout, a last smaller micro-batch and a last batch with fewer of them, over several steps."""

import functools
from typing import Any

import pytest
import torch
from models import DROPPING, Case
from ranks import run_outcomes, run_ranks
from torch import nn

from outgrow import Engine
from outgrow.memory.errors import NotFinite
from outgrow.parallel.mail import MailError
from outgrow.scheduler.pipelines import NAMES

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
SIZES = (8, 7, 3)
"""Of global batches in 4 micro-batches: equal ones, a smaller one last, three only."""


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


def alone(name: str, **arguments: Any) -> Any:
    """The unsplit model on one thread, as each rank has it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return train(DROPPING[name], **arguments)
    finally:
        torch.set_num_threads(threads)


def train_all(
    rank: int, names: tuple[str, ...], schedules: tuple[str, ...], num_pipeline: int, **arguments: Any
) -> Any:
    return {
        (name, schedule): train(DROPPING[name], pipeline=num_pipeline, schedule=schedule, **arguments)
        for name in names
        for schedule in schedules
    }


def assert_close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(expected[1]), rtol=1e-6, atol=0)
    assert found[2].keys() == expected[2].keys()
    for name, value in expected[2].items():
        scale = value.abs().max().item() if value.is_floating_point() else 0.0
        torch.testing.assert_close(found[2][name], value, rtol=1e-6, atol=1e-6 * scale, msg=name)


def train_both(rank: int) -> Any:
    tied = train_all(rank, ("gpt-tied",), ("1f1b", "interleaved", "zb-v"), 2)
    return train_all(rank, ("gpt",), NAMES, 2) | tied


def test_every_schedule_on_two_ranks_is_the_unsplit_model():
    outcomes = run_ranks(train_both, 2)
    expected = {name: alone(name) for name in ("gpt", "gpt-tied")}
    for name, schedule in outcomes[0]:
        first, second = (outcome[name, schedule] for outcome in outcomes)
        assert first[:2] == second[:2]
        assert all(torch.equal(first[2][key], second[2][key]) for key in first[2])
        assert_close(first, expected[name])
    for name, plain in (("gpt", "gpipe"), ("gpt-tied", "1f1b")):
        first = outcomes[0][name, plain][2]
        for schedule in NAMES if name == "gpt" else ("interleaved",):  # a vee adds the parts of a tied weight otherwise
            assert all(torch.equal(first[key], value) for key, value in outcomes[1][name, schedule][2].items()), (
                schedule
            )


def train_more(rank: int) -> Any:
    others = train_all(rank, ("conv", "lstm", "encoder-decoder", "tied-frozen"), ("1f1b", "zb-h1"), 2)
    others |= {("gpt", "clip"): train(DROPPING["gpt"], pipeline=2, schedule="zb-v", clip_grad_norm=0.5)}
    others |= {("gpt", "gloo"): train(DROPPING["gpt"], pipeline=2, schedule="interleaved", transport="gloo")}
    others |= {("gpt", "bf16"): train(DROPPING["gpt"], pipeline=2, schedule="zb-v", precision="bf16")}
    return others | {("gpt", "recompute"): train(DROPPING["gpt"], pipeline=2, schedule="zb-v", activations="recompute")}


def test_other_models_and_words_on_two_ranks():
    outcome = run_ranks(train_more, 2)[0]
    words = {"clip": {"clip_grad_norm": 0.5}, "bf16": {"precision": "bf16"}, "recompute": {"activations": "recompute"}}
    for (name, key), found in outcome.items():
        assert_close(found, alone(name, **words.get(key, {})))


def train_four(rank: int) -> Any:
    found = {name: train(DROPPING["gpt-tied"], pipeline=4, schedule=name) for name in ("1f1b", "zb-h1")}
    return found | {"2x2": train(DROPPING["gpt-tied"], 2, rank % 2, pipeline=2, schedule="zb-v")}


def train_beside(rank: int) -> Any:
    return train(DROPPING["gpt-tied"], 2, rank)


def test_four_ranks_as_one_pipeline_and_as_two_with_shared_state():
    outcomes = run_ranks(train_four, 4)
    expected = alone("gpt-tied")
    assert_close(outcomes[3]["1f1b"], expected)
    assert_close(outcomes[0]["zb-h1"], expected)
    for found in (outcome["2x2"] for outcome in outcomes):
        assert_close(found, run_ranks_once())


@functools.cache
def run_ranks_once() -> Any:
    return run_ranks(train_beside, 2)[0]


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
    first, last = run_ranks(meet_infinity, 2)
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
    with pytest.raises(ValueError) as error:
        Engine(Spoiled(), pipeline=3)
    return [*messages, str(error.value)]


def test_what_cannot_be_is_refused_with_names():
    few, skip, many, unknown, ranks = run_ranks(refuse, 2)[0]
    assert "3 stages are given, and the schedule has 4" in few
    assert "the model's output in stage 1 uses the output of down in stage 0" in skip
    assert "6 stages need at least so many units, and the model runs 4" in many
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
