"""Profiles of micro-batches whose bytes can be counted by hand."""

import pytest
import torch
import torch.nn.functional as F
from models import CASES, Block
from torch import nn
from torch.utils.checkpoint import checkpoint

from outgrow.parallel.units import find_units
from outgrow.scheduler.memory_profile import MemoryProfile, measure_memory

SAMPLES, DIM = 64, 32
X = SAMPLES * DIM * 4  # bytes of an activation
W, BIAS = DIM * DIM * 4, DIM * 4


def forward(model: nn.Module, batch: object) -> object:
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def total(output: torch.Tensor, _batch: object) -> torch.Tensor:
    return output.sum()


def measured(model: nn.Module, batch: object = None, given: list[str] | None = None, **options) -> MemoryProfile:
    batch = torch.zeros(SAMPLES, DIM) if batch is None else batch
    return measure_memory(model, find_units(model, given), forward, total, batch, **options)


class Sine(nn.Module):
    """Saves its input and makes an output of the same size."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(DIM))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x)


def test_a_chain_of_units_that_save_their_inputs():
    profile = measured(nn.Sequential(nn.Linear(DIM, DIM), Sine(), Sine()), given=["0", "1", "2"])
    first, second, third = profile.units
    assert profile.how == "fake"
    assert (first.forward.peak_bytes, first.forward.left_bytes, first.output_bytes) == (X, X, X)
    assert (first.saved_bytes, first.input_bytes) == (0, 0), "the batch is not counted"
    for unit in (second, third):
        assert (unit.saved_bytes, unit.saved_input_bytes, unit.input_bytes, unit.output_bytes) == (X, X, X, X)
        assert unit.forward.peak_bytes == unit.forward.left_bytes == unit.forward.unsaved_peak_bytes == X
    assert (
        profile.peak_bytes >= 4 * X
    )  # two inputs saved, cos, its product, and the gradient that is an expanded scalar
    assert first.backward.gradient_bytes == W + BIAS
    assert first.backward.peak_bytes == 0
    assert first.backward.summing_peak_bytes == first.backward.collecting_peak_bytes == W + BIAS
    assert profile.order == (
        ("before", 0), ("F", 0), ("F", 1), ("F", 2), ("loss", 0), ("loss", 1), ("B", 2), ("B", 1), ("B", 0),
    )  # fmt: skip


def test_what_comes_and_goes_inside_a_unit_is_in_its_peak_alone():
    class Wide(Sine):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, x, x], dim=1).sum(dim=1, keepdim=True) + x.detach()  # nothing is saved

    (unit,) = measured(Wide()).units
    assert unit.saved_bytes == 0
    assert unit.forward.peak_bytes == 3 * X + X // DIM
    assert unit.output_bytes == X


def test_a_storage_saved_twice_or_by_two_units_is_counted_once():
    class Twice(Sine):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sin(x) + torch.cos(x) + x.view(-1).exp().view_as(x).detach()

    profile = measured(nn.Sequential(nn.Linear(DIM, DIM), Twice()), given=["0", "1"])
    assert profile.units[1].saved_bytes == X

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.left, self.right = nn.Linear(DIM, DIM), Sine(), Sine()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.base(x)
            return self.left(x) + self.right(x)

    profile = measured(Branches())
    _, left, right = profile.units
    assert (left.saved_bytes, right.saved_bytes) == (X, 0)
    assert (left.input_bytes, right.input_bytes) == (X, X)
    (shared,) = (life for life in profile.storages if life.saved_by)
    assert (shared.saved_by, shared.passed_to) == ((1, 2), (1, 2))
    assert shared.made_in == ("F", 0)
    assert shared.released_in == ("B", 1), "the one whose backward comes last"


def test_dropout_keeps_its_mask():
    profile = measured(nn.Sequential(nn.Linear(DIM, DIM), nn.Sequential(Sine(), nn.Dropout(0.5))), given=["0", "1"])
    unit = profile.units[1]
    masks = unit.saved_bytes - X  # beside the input that sin saves
    assert masks in (X, X // 4), "a mask of booleans or of numbers"
    assert unit.saved_input_bytes == X


def test_operations_in_place_make_nothing():
    profile = measured(nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU(inplace=True)), given=["0", "1"])
    first, second = profile.units
    assert first.forward.left_bytes == X
    assert second.forward.peak_bytes == second.output_bytes == 0
    assert second.saved_bytes == second.saved_input_bytes == X, "its result, which lies in its input's bytes"


def test_attention_saves_what_the_cpu_kernel_saves():
    dim, heads, samples, length = 32, 4, 2, 16
    block = Block(dim, heads, 0.0)
    profile = measured(nn.Sequential(nn.Linear(dim, dim), block), torch.zeros(samples, length, dim), ["0", "1"])
    tokens = samples * length
    h = tokens * dim * 4
    norms = 4 * tokens * 4  # mean and inverse deviation of two
    log_sums = tokens * heads * 4
    # input, ln1, qkv (3), heads, x, ln2, fc (4), gelu (4): no matrix of scores
    assert profile.units[1].saved_bytes == 16 * h + norms + log_sums
    assert profile.units[1].saved_input_bytes == h


def test_a_checkpoint_inside_a_unit_saves_its_input_only():
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh(), nn.Linear(DIM, DIM), nn.Tanh())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.inner, x, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore

    profile = measured(nn.Sequential(nn.Linear(DIM, DIM), Checkpointed()), given=["0", "1"])
    unit = profile.units[1]
    assert profile.how == "fake"
    assert unit.forward.left_bytes == X, "its output: its input was there"
    assert unit.backward.peak_bytes >= 3 * X, "everything inside comes back"
    assert profile.order.count(("F", 1)) == 1


def test_the_head_of_a_language_model_sets_the_peak():
    vocab, dim, tokens = 512, 16, 64
    model = nn.Sequential(nn.Embedding(vocab, dim), nn.Linear(dim, vocab, bias=False))
    batch = (torch.zeros(tokens, dtype=torch.int64), torch.zeros(tokens, dtype=torch.int64))
    profile = measure_memory(
        model, find_units(model), lambda m, b: m(b[0]), lambda out, b: F.cross_entropy(out, b[1]), batch
    )
    logits = vocab * tokens * 4
    assert profile.units[1].forward.peak_bytes == logits
    assert profile.loss.peak_bytes >= logits, "their log-softmax"
    assert profile.loss_backward.peak_bytes == 2 * logits, "the gradients of log-softmax and of logits"
    assert profile.units[1].backward.gradient_bytes == vocab * dim * 4
    assert profile.library_bytes > 0


def test_live_bytes_at_every_phase_follow_from_the_lives_of_storages():
    for name in ("gpt", "encoder-decoder", "gpt-tied"):
        case = CASES[name]
        model, batch = case.model(), case.batch(0, 2)
        profile = measure_memory(
            model, find_units(model), lambda m, b: m(*b[:-1]), lambda out, b, case=case: case.loss(out, b[-1]), batch
        )
        place = {phase: position for position, phase in enumerate(profile.order)}
        far = len(place)
        level = 0
        for position, phase in enumerate(profile.order):
            expected = sum(
                life.num_bytes
                for life in profile.storages
                if place[life.made_in] < position
                and (
                    (place[life.dropped_in] if life.dropped_in else far) >= position
                    or (place[life.released_in] if life.released_in else -1) >= position
                )
            )
            assert level == expected, f"{name} at the begin of {phase}"
            memory = {("before", 0): profile.before, ("loss", 0): profile.loss, ("loss", 1): profile.loss_backward}
            kind, run = phase
            unit = profile.units[run] if kind in "FB" else None
            phase_memory = (unit.forward if kind == "F" else unit.backward) if unit else memory[phase]
            assert phase_memory.peak_bytes >= max(phase_memory.left_bytes, 0)
            level += phase_memory.left_bytes


def test_placeholders_have_the_shapes_that_are_given():
    model = nn.Sequential(nn.Linear(DIM, DIM), nn.Linear(DIM, DIM))
    expected = measured(model, given=["0", "1"])
    shapes = {name: (tuple(p.shape), p.dtype) for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    assert measured(model, given=["0", "1"], shapes=shapes) == expected
    assert all(parameter.numel() == 0 and parameter.grad is None for parameter in model.parameters())


def test_inputs_of_units_are_cast_as_asked_for():
    model = nn.Sequential(nn.Linear(DIM, DIM), nn.Linear(DIM, DIM))
    shapes = {name: (tuple(p.shape), torch.bfloat16) for name, p in model.named_parameters()}
    profile = measured(model, given=["0", "1"], shapes=shapes, input_dtype=lambda module: module.weight.dtype)
    assert profile.how == "fake"
    assert profile.units[0].output_bytes == profile.units[1].output_bytes == X // 2
    assert profile.units[0].saved_bytes == X // 2, "the batch, cast"


def test_hooks_of_the_model_run_on_its_copy():
    model = nn.Sequential(nn.Linear(DIM, DIM).bfloat16(), nn.Linear(DIM, DIM).bfloat16())
    model[0].register_forward_pre_hook(lambda _module, args: (args[0].bfloat16(),))
    profile = measured(model, given=["0", "1"])
    assert profile.how == "fake"
    assert profile.units[0].saved_bytes == X // 2


def test_a_model_that_looks_at_values_is_measured_for_real_and_left_as_it_was():
    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count += 1
            x = F.dropout(x, 0.5)
            return self.left(x) if x.sum().item() > 1e6 else self.right(x)

    model = Choosing()
    before, random_state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    profile = measured(model)
    assert profile.how == "real"
    assert [unit.name for unit in profile.units] == ["right"]
    assert profile.units[0].output_bytes == X
    assert profile.units[0].backward.gradient_bytes == W + BIAS
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None and not parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_a_models_own_error_is_the_users_to_see():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        measured(nn.Linear(DIM, DIM), torch.zeros(4, DIM + 1))
