"""The engine in one process: conventions, errors, precision, random numbers, units used in unusual ways."""

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import CASES, GPT
from torch import nn
from torch.utils.checkpoint import checkpoint

from outgrow import Engine, Memory
from outgrow.memory.errors import DoesNotFit, NotFinite, OutOfOrder
from outgrow.parallel.actions import Action

SGD = functools.partial(torch.optim.SGD, lr=0.1)


def weights_after(model: nn.Module, batches: list[Any], **arguments: Any) -> dict[str, torch.Tensor]:
    engine = Engine(model, optimizer=arguments.pop("optimizer", SGD), **arguments)
    try:
        for batch in batches:
            engine.step(batch)
        return engine.state_dict()
    finally:
        engine.close()


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


class Chain(nn.Module):
    def __init__(self, dim: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(dim, dim), nn.Dropout(dropout)) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def mse(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(output, target)


X, Y = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)), torch.ones(6, 8)


# ---- how batches go in


def test_a_dict_goes_in_by_name_and_the_loss_gets_the_whole_batch() -> None:
    class Named(Chain):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    reference = weights_after(Chain(), [(X, Y)], loss=mse)
    assert equal(reference, weights_after(Named(), [{"x": X, "y": Y}], loss=lambda out, batch: mse(out, batch["y"])))


def test_without_a_loss_the_output_is_the_loss_or_has_one() -> None:
    class Scalar(Chain):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
            return mse(super().forward(x), y)

    class Attribute(Chain):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
            return SimpleNamespace(loss=mse(super().forward(x), y), logits=None)

    reference = weights_after(Chain(), [(X, Y)], loss=mse)
    assert equal(reference, weights_after(Scalar(), [(X, Y)]))
    assert equal(reference, weights_after(Attribute(), [{"x": X, "y": Y}]))


def test_a_tensor_goes_in_alone_and_a_forward_of_ones_own_overrides() -> None:
    reference = weights_after(Chain(), [(X, X)], loss=mse)
    assert equal(reference, weights_after(Chain(), [X], loss=mse))
    own = weights_after(
        Chain(), [(X, X)], loss=lambda out, _: out, forward=lambda model, batch: mse(model(batch[0]), X)
    )
    assert equal(reference, own)


def test_a_loss_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="the loss must be one number"):
        weights_after(Chain(), [X])


# ---- errors


def test_a_loss_that_is_not_finite_names_the_step_and_the_unit_and_keeps_the_weights() -> None:
    class Poisoned(nn.Linear):
        factor = 1.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.factor

    model = Chain()
    model.layers[1].append(Poisoned(8, 8))
    engine = Engine(model, loss=mse, optimizer=SGD)
    engine.step((X, Y))
    before = engine.state_dict()
    model.layers[1][2].factor = float("inf")
    with pytest.raises(NotFinite, match=r"step 2, rank 0.*layers\.1"):
        engine.step((X, Y))
    model.layers[1][2].factor = 1.0
    assert equal(before, engine.state_dict())
    engine.step((X, Y))  # and the engine goes on
    engine.close()


def test_a_models_own_error_says_where_it_happened() -> None:
    model = Chain()
    engine = Engine(model, loss=mse, optimizer=SGD)
    engine.step((X, Y))

    def fail(*_: Any) -> None:
        raise KeyError("mine")

    model.layers[2][0].register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="mine") as caught:
        engine.step((X, Y))
    assert "rank 0, step 2 in unit layers.2 (F2.0)" in "\n".join(caught.value.__notes__)
    assert caught.value.outgrow_unit == "layers.2"
    engine.close()


def test_another_order_of_units_is_an_error_that_names_both() -> None:
    class Moody(Chain):
        flipped = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in reversed(self.layers) if self.flipped else self.layers:
                x = x + layer(x)
            return x

    model = Moody()
    engine = Engine(model, loss=mse, optimizer=SGD)
    engine.step((X, Y))
    model.flipped = True
    with pytest.raises(OutOfOrder, match=r"Recorded: layers\.0.*Now: layers\.2"):
        engine.step((X, Y))
    model.flipped = False
    engine.step((X, Y))
    engine.close()


def test_a_unit_left_out_is_an_error() -> None:
    class Short(Chain):
        short = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers[:2] if self.short else self.layers:
                x = x + layer(x)
            return x

    model = Short()
    engine = Engine(model, loss=mse, optimizer=SGD)
    engine.step((X, Y))
    model.short = True
    with pytest.raises(OutOfOrder, match="the end of the forward pass"):
        engine.step((X, Y))
    engine.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"micro_batches": 0}, "micro_batches=0"),
        ({"clip_grad_norm": -1.0}, "clip_grad_norm=-1.0"),
        ({"precision": "fp8"}, "precision='fp8'"),
        ({"zero": 4}, "zero=4"),
        ({"units": ["nowhere"]}, "'nowhere' is no module"),
        ({"optimizer": lambda params: None}, "must return a torch.optim.Optimizer"),
    ],
)
def test_arguments_that_cannot_be_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(Chain(), loss=mse, **arguments)


def test_a_model_without_anything_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        Engine(Chain().requires_grad_(False), loss=mse)


def test_state_that_exceeds_the_budget_is_refused_with_the_missing_bytes() -> None:
    with pytest.raises(DoesNotFit, match=r"needs .* MiB on each rank.*are missing"):
        Engine(nn.Linear(2000, 2000), loss=mse, memory=Memory(host="100MiB"))


def test_sparse_gradients_are_refused_or_trained_right() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4, sparse=True), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(x))

    engine = Engine(Sparse(), loss=lambda out, _: out.square().mean(), optimizer=SGD)
    with pytest.raises(ValueError, match="sparse=False"):
        engine.step(torch.zeros(2, 3, dtype=torch.long))
    engine.close()


# ---- what models may do


def test_a_unit_that_runs_twice_has_the_bits_of_the_plain_loop() -> None:
    class Twice(Chain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(super().forward(x))

    plain = Twice()
    optimizer = SGD(plain.parameters())
    for _ in range(3):
        mse(plain(X), Y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert equal(plain.state_dict(), weights_after(Twice(), [(X, Y)] * 3, loss=mse))


def test_units_with_several_inputs_and_outputs() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, *, y: torch.Tensor) -> dict[str, Any]:
            return {"x": self.a(x) + y, "rest": [self.b(y), None, 3]}

    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.blocks = nn.ModuleList([Pair() for _ in range(3)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x
            for block in self.blocks:
                out = block(x, y=y)
                x, y = out["x"], out["rest"][0]
            return x + y

    plain = Pairs()
    optimizer = SGD(plain.parameters())
    for _ in range(3):
        mse(plain(X), Y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert equal(plain.state_dict(), weights_after(Pairs(), [(X, Y)] * 3, loss=mse))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_model_that_checkpoints_its_own_blocks(reentrant: bool) -> None:
    class Checkpointed(Chain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = x + checkpoint(layer, x, use_reentrant=reentrant)
            return x

    inputs = X.clone().requires_grad_(reentrant)  # reentrant checkpoints need an input with a gradient
    reference = weights_after(Chain(dropout=0.5), [(inputs, Y)] * 3, loss=mse)
    assert equal(reference, weights_after(Checkpointed(dropout=0.5), [(inputs, Y)] * 3, loss=mse))


def test_the_model_can_be_used_between_steps() -> None:
    model = Chain()
    engine = Engine(model, loss=mse, optimizer=SGD)
    engine.step((X, Y))
    with engine.gathered() as gathered, torch.no_grad():
        first = gathered(X)
    engine.step((X, Y))
    assert not torch.equal(first, model(X))
    engine.close()


def test_a_model_that_never_calls_its_modules_has_the_bits_of_the_plain_loop() -> None:
    class Functional(Chain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = x + F.linear(x, layer[0].weight, layer[0].bias)
            return x

    plain = Functional()
    optimizer = SGD(plain.parameters())
    for _ in range(3):
        mse(plain(X), Y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert equal(plain.state_dict(), weights_after(Functional(), [(X, Y)] * 3, loss=mse))


def test_a_step_is_a_program() -> None:
    engine = Engine(Chain(), loss=mse, optimizer=SGD, micro_batches=2)
    assert engine.program is None
    result = engine.step((X, Y))
    expected = ["F0.0", "F1.0", "F2.0", "B2.0", "B1.0", "B0.0", "F0.1", "F1.1", "F2.1", "B2.1", "B1.1", "B0.1", "NORM"]
    expected += ["STEP c0", "STEP c1", "STEP c2"]
    assert engine.program is not None
    assert [str(action) for action in engine.program.actions()] == expected
    assert [span.action for span in result.timeline.spans] == expected
    assert all(Action.parse(span.action) for span in result.timeline.spans)
    engine.close()


# ---- random numbers


def test_dropout_depends_on_seed_and_step_and_leaves_the_users_random_numbers_alone() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one = weights_after(Chain(dropout=0.5), [(X, Y)] * 2, loss=mse, seed=1)
    torch.manual_seed(4)
    torch.rand(7)
    assert equal(one, weights_after(Chain(dropout=0.5), [(X, Y)] * 2, loss=mse, seed=1))
    assert not equal(one, weights_after(Chain(dropout=0.5), [(X, Y)] * 2, loss=mse, seed=2))
    torch.set_rng_state(state)
    model = Chain(dropout=0.5)
    engine = Engine(model, loss=mse, optimizer=SGD)
    torch.set_rng_state(state)
    expected = torch.rand(3)
    torch.set_rng_state(state)
    engine.step((X, Y))
    assert torch.equal(torch.rand(3), expected)
    engine.close()


# ---- bf16


def test_bf16_keeps_float32_masters_and_moves_by_less_than_bf16_can_show() -> None:
    case = CASES["gpt"]
    tiny = functools.partial(torch.optim.SGD, lr=1e-6)
    before = case.model().state_dict()
    after = weights_after(
        case.model(), [case.batch(step, 4) for step in range(2)], loss=case.loss, precision="bf16", optimizer=tiny
    )
    assert all(value.dtype is torch.float32 for value in after.values())
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(moved) > len(before) / 2
    assert all(torch.equal(before[key].bfloat16(), after[key].bfloat16()) for key in ("tok.weight", "head.weight"))


@pytest.mark.parametrize("name", ["gpt", "gpt-tied", "conv", "lstm", "encoder-decoder", "tied-frozen"])
def test_bf16_follows_a_plain_loop_with_masters(name: str) -> None:
    """The reference: a bf16 copy computes, its gradients (as float32) update the float32 model."""
    case = CASES[name]
    master, worker = case.model(), case.model()
    statistics = {id(p) for m in worker.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    optimizer = SGD(master.parameters())
    losses = []
    for step in range(4):
        batch = case.batch(step, 6)
        for mine, theirs in zip(worker.parameters(), master.parameters(), strict=True):
            mine.data = theirs.detach().to(torch.float32 if id(mine) in statistics else torch.bfloat16, copy=True)
        cast = [t.bfloat16() if t.is_floating_point() else t for t in batch]
        loss = case.loss(worker(*cast[:-1]).float(), cast[-1])
        loss.backward()
        losses.append(loss.item())
        for mine, theirs in zip(worker.parameters(), master.parameters(), strict=True):
            theirs.grad = None if mine.grad is None else mine.grad.float()
            mine.grad = None
        optimizer.step()
    engine = Engine(case.model(), loss=case.loss, optimizer=SGD, precision="bf16")
    results = [engine.step(case.batch(step, 6)) for step in range(4)]
    state = engine.state_dict()
    engine.close()
    assert [result.loss for result in results] == losses
    assert [n for n, p in master.named_parameters() if not torch.equal(p, state[n])] == []
    for key, value in worker.state_dict().items():
        if "running" in key:
            assert torch.equal(value, state[key]), key
            assert value.dtype is torch.float32


def test_frozen_parameters_get_neither_gradients_nor_slots() -> None:
    model = GPT()
    model.blocks.requires_grad_(False)
    engine = Engine(model, loss=CASES["gpt"].loss, optimizer=torch.optim.AdamW)
    engine.step(CASES["gpt"].batch(0, 4))
    statistics = engine.statistics()
    trainable_bytes = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert statistics.bytes_by_slot["exp_avg"] == trainable_bytes
    assert statistics.peak_bytes_by_slot["grad"] == trainable_bytes
    engine.close()
