import pytest
import torch

from outgrow.perf.models import (
    CONFIGS,
    GPTConfig,
    build_gpt,
    library_text,
    random_batches,
    text_batches,
    token_loss,
)

TINY = CONFIGS["tiny"]


def test_every_build_has_the_same_weights_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, second = build_gpt(TINY), build_gpt(TINY)
    assert torch.equal(torch.rand(3), expected)
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert first.head.logits.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("config", ["tiny", "bytes"])
def test_the_number_of_parameters_is_that_of_the_model(config: str) -> None:
    counted = sum(parameter.numel() for parameter in build_gpt(CONFIGS[config]).parameters())
    assert CONFIGS[config].num_parameters == counted


def test_the_measured_configurations_are_those_of_the_peers_figures() -> None:
    assert [CONFIGS[name].tokens_per_step for name in "SM"] == [2048, 2048]
    assert CONFIGS["M"].num_parameters == 134_404_608


def test_batches_depend_on_the_step_alone_and_targets_are_the_next_tokens() -> None:
    batches = random_batches(TINY)
    inputs, targets = batches(3)
    assert inputs.shape == targets.shape == (TINY.batch_size, TINY.length)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(random_batches(TINY)(3)[0], inputs)
    assert not torch.equal(batches(4)[0], inputs)


def test_text_batches_are_windows_of_the_text() -> None:
    config = GPTConfig(num_blocks=1, width=8, num_heads=1, num_tokens=256, length=16, batch_size=3)
    text = library_text(10_000)
    inputs, targets = text_batches(config, text)(0)
    for sample, following in zip(inputs, targets, strict=True):
        window = bytes(sample.tolist()) + bytes(following[-1:].tolist())
        assert window in text
        assert torch.equal(sample[1:], following[:-1])


def test_bytes_need_room_for_bytes_and_for_a_window() -> None:
    with pytest.raises(ValueError, match="vocabulary of 256"):
        text_batches(TINY, b"x" * 100)
    with pytest.raises(ValueError, match="longer than a window"):
        text_batches(CONFIGS["bytes"], b"x" * 10)


def test_the_library_is_real_text_of_the_size_asked_for() -> None:
    text = library_text(100_000)
    assert len(text) == 100_000
    assert b"import" in text


def test_the_model_sees_only_the_past() -> None:
    model = build_gpt(TINY)
    tokens = random_batches(TINY)(0)[0]
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % TINY.num_tokens
    assert torch.equal(model(tokens)[:, :-1], model(changed)[:, :-1])
    assert not torch.equal(model(tokens)[:, -1], model(changed)[:, -1])


def test_the_loss_starts_at_that_of_a_guess() -> None:
    inputs, targets = random_batches(TINY)(0)
    guess = torch.log(torch.tensor(float(TINY.num_tokens))).item()
    assert token_loss(build_gpt(TINY)(inputs), targets).item() == pytest.approx(guess, rel=0.02)


def test_widths_that_the_heads_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="width 10 is not a multiple of num_heads 3"):
        GPTConfig(num_blocks=1, width=10, num_heads=3, num_tokens=4, length=2, batch_size=1)
