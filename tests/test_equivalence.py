"""Invariant 1 on one rank: every weight and every loss is bit-identical to a plain PyTorch loop's."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import CASES, Case

from outgrow import Engine

ADAMW = functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)


def plain_loop(
    case: Case,
    optimizer: Callable[..., torch.optim.Optimizer],
    steps: int,
    samples: int,
    micro_batches: int = 1,
    clip: float | None = None,
) -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    """The loop that a user would write: weights, losses and (with clipping) gradient norms."""
    model = case.model()
    opt = optimizer(model.parameters())
    losses, norms = [], []
    for step in range(steps):
        parts = [tensor.tensor_split(micro_batches) for tensor in case.batch(step, samples)]
        total = 0.0
        for part in zip(*parts, strict=True):
            loss = case.loss(model(*part[:-1]), part[-1])
            (loss / micro_batches).backward()
            total += loss.item() / micro_batches
        if clip is not None:
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        opt.step()
        opt.zero_grad(set_to_none=True)
        losses.append(total)
    return model.state_dict(), losses, norms


def engine_loop(case: Case, steps: int, samples: int, **arguments: Any) -> tuple[dict[str, torch.Tensor], list[Any]]:
    engine = Engine(case.model(), loss=case.loss, **arguments)
    try:
        results = [engine.step(case.batch(step, samples)) for step in range(steps)]
        return engine.state_dict(), results
    finally:
        engine.close()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("optimizer", [ADAMW, SGD, functools.partial(torch.optim.AdamW, fused=True)])
@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_have_the_bits_of_the_plain_loop(name: str, optimizer: Any) -> None:
    case = CASES[name]
    weights, losses, _ = plain_loop(case, optimizer, 20, 6)
    state, results = engine_loop(case, 20, 6, optimizer=optimizer)
    assert [result.loss for result in results] == losses
    assert list(state) == list(weights)
    assert [key for key in weights if not torch.equal(weights[key], state[key])] == []


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", CASES)
def test_micro_batches_and_clipping_have_the_bits_of_the_plain_loop(name: str) -> None:
    case = CASES[name]
    weights, losses, norms = plain_loop(case, ADAMW, 6, 6, micro_batches=3, clip=0.5)
    state, results = engine_loop(case, 6, 6, optimizer=ADAMW, micro_batches=3, clip_grad_norm=0.5)
    assert [result.loss for result in results] == losses
    assert [result.grad_norm for result in results] == norms
    assert [key for key in weights if not torch.equal(weights[key], state[key])] == []


def test_the_default_optimizer_is_fused_adamw() -> None:
    case = CASES["gpt"]
    weights, _, _ = plain_loop(case, functools.partial(torch.optim.AdamW, fused=True), 3, 4)
    state, _ = engine_loop(case, 3, 4)
    assert all(torch.equal(weights[key], state[key]) for key in weights)


def test_a_learning_rate_schedule_has_the_bits_of_the_plain_loop() -> None:
    case = CASES["gpt"]
    schedule = functools.partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 / (1 + step))
    model = case.model()
    optimizer = ADAMW(model.parameters())
    scheduler = schedule(optimizer)
    rates = []
    for step in range(4):
        tokens, target = case.batch(step, 4)
        case.loss(model(tokens), target).backward()
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    state, results = engine_loop(case, 4, 4, optimizer=ADAMW, lr_scheduler=schedule)
    assert [result.lr for result in results] == rates
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_last_smaller_batch_counts_every_sample_once() -> None:
    """5 samples in 2 micro-batches of 3 and 2: the loss is the mean over the 5, not the mean of two means."""
    case = CASES["conv"]
    model = case.model().eval()  # batch statistics would differ between one batch of 5 and two
    images, target = case.batch(0, 5)
    loss = case.loss(model(images), target)
    loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    engine = Engine(
        case.model().eval(), loss=case.loss, micro_batches=2, optimizer=functools.partial(torch.optim.SGD, lr=1.0)
    )
    before = engine.state_dict()
    result = engine.step((images, target))
    after = engine.state_dict()
    engine.close()
    assert result.num_samples == 5
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(before[name] - after[name], gradient, rtol=1e-4, atol=1e-6)
