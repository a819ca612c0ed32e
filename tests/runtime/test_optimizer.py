"""Optimizers on pieces: the bits of the uncut update, groups as they were meant, and a no to what cannot be cut."""

from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch
from torch import nn, optim

from outgrow.runtime.optimizer import PiecewiseOptimizer, default_optimizer

ELEMENT_WISE = {
    "sgd": partial(optim.SGD, lr=0.1),
    "sgd momentum": partial(optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": partial(optim.Adam, lr=0.01, amsgrad=True),
    "adamw": partial(optim.AdamW, lr=0.01, foreach=False, fused=False),
    "adamw foreach": partial(optim.AdamW, lr=0.01, foreach=True),
    "adamw fused": partial(optim.AdamW, lr=0.01, fused=True),
    "default": default_optimizer,
    "rmsprop": partial(optim.RMSprop, lr=0.01, momentum=0.5, centered=True),
    "adagrad": partial(optim.Adagrad, lr=0.1, initial_accumulator_value=0.1),
    "adamax": partial(optim.Adamax, lr=0.01),
    "nadam": partial(optim.NAdam, lr=0.01),
    "radam": partial(optim.RAdam, lr=0.01),
    "adadelta": partial(optim.Adadelta, lr=1.0),
    "asgd": partial(optim.ASGD, lr=0.01),
    "rprop": partial(optim.Rprop, lr=0.01),
}
SHAPES = {"embed.weight": (17, 5), "norm.weight": (21,), "fc.weight": (11, 5), "fc.bias": (19,)}
CUTS = {"embed.weight": 48, "norm.weight": 16, "fc.weight": 16, "fc.bias": 16}  # where chunks cut: every 64 bytes


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(5)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def gradients(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


class Pieces:
    """Every parameter in two pieces, cut in the middle of a row, in two chunks: all but the last in chunk 0."""

    def __init__(self, factory: Callable[..., optim.Optimizer] | None) -> None:
        self.originals = parameters()
        self.optimizer = PiecewiseOptimizer(factory, self.originals)
        self.flat = {name: value.detach().reshape(-1).clone() for name, value in self.originals.items()}
        self.chunk_of = {name: int(name == "fc.bias") for name in self.flat}
        self.pieces: dict[str, list[torch.Tensor]] = {}
        for name, flat in self.flat.items():
            self.pieces[name] = [flat[: CUTS[name]], flat[CUTS[name] :]]
        self.optimizer.place(
            {name: [(self.chunk_of[name], piece) for piece in pieces] for name, pieces in self.pieces.items()}
        )

    def step(self, given: dict[str, torch.Tensor]) -> None:
        for name, gradient in given.items():
            flat, cut = gradient.reshape(-1).clone(), CUTS[name]
            self.pieces[name][0].grad, self.pieces[name][1].grad = flat[:cut], flat[cut:]
        for chunk in (1, 0):
            self.optimizer.step(chunk)

    def values(self) -> dict[str, torch.Tensor]:
        return {name: flat.view(SHAPES[name]) for name, flat in self.flat.items()}


def plain(factory: Callable[..., optim.Optimizer], steps: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    whole = parameters()
    optimizer = factory(list(whole.values()))
    for given in steps:
        for name, parameter in whole.items():
            parameter.grad = given[name].clone() if name in given else None
        optimizer.step()
    return {name: parameter.detach() for name, parameter in whole.items()}


@pytest.mark.parametrize("factory", ELEMENT_WISE.values(), ids=ELEMENT_WISE.keys())
def test_element_wise_optimizers_give_the_bits_of_the_uncut_update(factory):
    steps = [gradients(step) for step in range(4)]
    pieces = Pieces(factory)
    for given in steps:
        pieces.step(given)
    expected = plain(factory, steps)
    for name, value in pieces.values().items():
        assert torch.equal(value, expected[name]), name
        assert not torch.equal(value, parameters()[name])


@pytest.mark.parametrize("name", ["sgd momentum", "adamw fused", "adamw foreach", "adagrad", "nadam"])
def test_a_parameter_without_gradient_is_left_out_step_counts_and_decay_included(name):
    factory = ELEMENT_WISE[name]
    steps = [gradients(step) for step in range(4)]
    del steps[1]["fc.weight"], steps[0]["norm.weight"], steps[1]["norm.weight"], steps[2]["fc.bias"]
    pieces = Pieces(factory)
    for given in steps:
        pieces.step(given)
    expected = plain(factory, steps)
    assert all(torch.equal(value, expected[name]) for name, value in pieces.values().items())


def test_a_step_without_any_gradient_does_nothing():
    pieces = Pieces(partial(optim.AdamW, lr=0.1, weight_decay=1.0))
    pieces.step({})
    assert all(torch.equal(value, parameters()[name]) for name, value in pieces.values().items())
    assert not pieces.optimizer.optimizer.state


def test_gradients_are_let_go_of_and_only_the_chunk_s_own_are_used():
    pieces = Pieces(ELEMENT_WISE["sgd"])
    for name, (first, second) in pieces.pieces.items():
        first.grad, second.grad = torch.ones_like(first), torch.ones_like(second)
        assert name in SHAPES
    pieces.optimizer.step(1)
    changed = {n for n, value in pieces.values().items() if not torch.equal(value, parameters()[n])}
    assert changed == {"fc.bias"}
    assert all(piece.grad is None for piece in pieces.pieces["fc.bias"])
    assert all(piece.grad is not None for piece in pieces.pieces["fc.weight"])


class GlobalNorm(optim.SGD):
    """Scales by the norm over all its parameters."""

    def step(self, closure=None):
        given = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.sqrt(sum((p.grad.square().sum() for p in given), torch.zeros(())))
        with torch.no_grad():
            for p in given:
                p.grad.div_(norm)
        return super().step(closure)


class RowNorm(optim.SGD):
    """Scales every row by its own norm: element-wise in nothing but its name."""

    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None and p.dim() > 1:
                        p.grad.div_(p.grad.norm(dim=1, keepdim=True))
        return super().step(closure)


@pytest.mark.parametrize(
    ("factory", "name"),
    [
        (partial(optim.LBFGS, lr=0.1), "LBFGS"),
        (lambda parameters: optim.Muon([p for p in parameters if p.dim() == 2], lr=0.1), "Muon"),
        (partial(optim.Adafactor, lr=0.1), "Adafactor"),
        (partial(GlobalNorm, lr=0.1), "GlobalNorm"),
        (partial(RowNorm, lr=0.1), "RowNorm"),
    ],
)
def test_what_depends_on_how_parameters_are_cut_is_refused_by_name(factory, name):
    with pytest.raises(ValueError, match=f"{name} is refused: its update of a parameter depends on"):
        PiecewiseOptimizer(factory, parameters())


def by_dimension(parameters: Iterable[nn.Parameter], kind: Callable[..., optim.Optimizer]) -> optim.Optimizer:
    """Decay for matrices alone, and another rate for vectors: as most training scripts do."""
    parameters = list(parameters)
    matrices = {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.5}
    vectors = {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0, "lr": 0.3}
    return kind([matrices, vectors], lr=0.1)


@pytest.mark.parametrize("kind", [optim.SGD, optim.AdamW, partial(optim.AdamW, fused=True), optim.Adagrad])
def test_groups_made_by_shape_are_kept_on_flat_pieces(kind):
    factory = partial(by_dimension, kind=kind)
    steps = [gradients(step) for step in range(3)]
    pieces = Pieces(factory)
    for given in steps:
        pieces.step(given)
    expected = plain(factory, steps)
    assert all(torch.equal(value, expected[name]) for name, value in pieces.values().items())
    sizes = [sum(p.numel() for p in group["params"]) for group in pieces.optimizer.optimizer.param_groups]
    assert sizes == [17 * 5 + 11 * 5, 21 + 19]
    assert pieces.optimizer.lr == 0.1


def test_parameters_that_the_factory_leaves_out_stay_as_they_are():
    pieces = Pieces(lambda given: optim.SGD([p for p in given if p.dim() == 2], lr=0.1))
    pieces.step(gradients(0))
    assert pieces.optimizer.names == {"embed.weight", "fc.weight"}
    changed = {name for name, value in pieces.values().items() if not torch.equal(value, parameters()[name])}
    assert changed == {"embed.weight", "fc.weight"}


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda _: None, r"must return a torch\.optim\.Optimizer, it returned NoneType"),
        (lambda _: optim.SGD, "it returned type"),
        (lambda _: optim.SGD([nn.Parameter(torch.ones(3, 4))], lr=1), r"not the model's, of shapes \[\(3, 4\)\]"),
    ],
)
def test_factories_that_give_something_else_are_refused(factory, message):
    with pytest.raises(ValueError, match=message):
        PiecewiseOptimizer(factory, parameters())


def test_the_model_is_left_alone_while_optimizers_are_tried_out():
    given = parameters()
    PiecewiseOptimizer(ELEMENT_WISE["adam"], given)
    assert all(torch.equal(value, parameters()[name]) and value.grad is None for name, value in given.items())


def test_a_scheduler_that_changes_the_rate_changes_the_update():
    pieces = Pieces(partial(optim.SGD, lr=1.0))
    scheduler = optim.lr_scheduler.StepLR(pieces.optimizer.optimizer, 1, gamma=0.5)
    ones = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    pieces.step(ones)
    scheduler.step()
    assert pieces.optimizer.lr == 0.5
    pieces.step(ones)
    expected = {name: value.detach() - 1.0 - 0.5 for name, value in parameters().items()}
    assert all(torch.equal(value, expected[name]) for name, value in pieces.values().items())


@pytest.mark.parametrize(
    ("name", "slots"),
    [("adamw fused", {"exp_avg", "exp_avg_sq"}), ("sgd momentum", {"momentum_buffer"}), ("sgd", set())],
)
def test_the_bytes_of_each_slot(name, slots):
    pieces = Pieces(ELEMENT_WISE[name])
    assert pieces.optimizer.slot_bytes() == {}
    pieces.step(gradients(0))
    num_elems = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    assert pieces.optimizer.slot_bytes() == dict.fromkeys(slots, 4 * num_elems)


def test_a_rank_that_owns_nothing_of_a_parameter_holds_no_state_of_it():
    optimizer = PiecewiseOptimizer(ELEMENT_WISE["adam"], parameters())
    piece = torch.ones(4)
    optimizer.place({"fc.weight": [(2, piece)]})
    piece.grad = torch.ones(4)
    optimizer.step(0)
    assert piece.tolist() == [1.0] * 4
    optimizer.step(2)
    assert len(optimizer.optimizer.state) == 1
    assert (piece < 1).all()
    PiecewiseOptimizer(ELEMENT_WISE["adagrad"], parameters()).place({})


# ---- slots at home on another tier

SLOTS = {
    "sgd": {},
    "sgd momentum": {"momentum_buffer"},
    "adam": {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
    "adamw fused": {"exp_avg", "exp_avg_sq"},
    "rmsprop": {"square_avg", "momentum_buffer", "grad_avg"},
    "adagrad": {"sum"},
}


@pytest.mark.parametrize("name", SLOTS)
def test_the_slots_are_found_before_there_is_any(name: str) -> None:
    optimizer = PiecewiseOptimizer(ELEMENT_WISE[name], parameters())
    assert optimizer.slots == dict.fromkeys(SLOTS[name], torch.float32)


@pytest.mark.parametrize("name", SLOTS)
def test_slots_that_move_after_every_update_give_the_bits_of_those_that_stay(name: str) -> None:
    moved = Pieces(ELEMENT_WISE[name])
    optimizer = moved.optimizer
    pieces = [piece for both in moved.pieces.values() for piece in both]
    far: dict[int, dict[str, torch.Tensor]] = {}
    for step in range(3):
        near = {id(p): {slot: torch.full_like(p, float("nan")) for slot in optimizer.slots} for p in pieces}
        for piece in pieces:
            if id(piece) not in far:
                optimizer.begin(piece, near[id(piece)])
                continue
            assert optimizer.has_slots(piece) is bool(optimizer.slots)
            for slot, value in far[id(piece)].items():
                near[id(piece)][slot].copy_(value)
            optimizer.attach(piece, near[id(piece)])
        given = gradients(step)
        for name_, gradient in given.items():
            flat, cut = gradient.reshape(-1).clone(), CUTS[name_]
            moved.pieces[name_][0].grad, moved.pieces[name_][1].grad = flat[:cut], flat[cut:]
        for piece in pieces:
            if step == 1:
                optimizer.step_piece(piece)
                assert piece.grad is None
        for chunk in (1, 0):
            optimizer.step(chunk)
        for piece in pieces:
            optimizer.move_into(piece, near[id(piece)])
            far[id(piece)] = {slot: value.clone() for slot, value in near[id(piece)].items()}
            optimizer.detach(piece)
            for value in near[id(piece)].values():
                value.fill_(float("nan"))
        assert not any(optimizer.slot_bytes().get(slot) for slot in optimizer.slots), "none is left in memory"
    expected = plain(ELEMENT_WISE[name], [gradients(step) for step in range(3)])
    assert [key for key, value in moved.values().items() if not torch.equal(value, expected[key])] == []


def test_a_slot_that_comes_later_than_planned_is_refused_by_name() -> None:
    class Late(optim.SGD):
        def step(self, closure: object = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            super().step()
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.numel() == 48:
                        self.state[parameter]["surprise"] = torch.zeros_like(parameter)

    pieces = Pieces(partial(Late, lr=0.1))
    pieces.step(gradients(0))
    with pytest.raises(ValueError, match=r"Late came to keep a slot 'surprise' that it had not on a small matrix"):
        pieces.optimizer.move_into(pieces.pieces["embed.weight"][0], {})
