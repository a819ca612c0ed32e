import torch

from outgrow.runtime.demo import run_demo
from outgrow.runtime.demo_model import ByteGPT, StdlibText, byte_loss, generate, warm_then_cool


def test_the_text_is_the_standard_library_cut_into_windows():
    text = StdlibText(context=16)
    assert text.num_files > 300
    assert len(text) * 16 < text.num_bytes <= (len(text) + 1) * 16
    inputs, targets = text[len(text) - 1]
    assert torch.equal(inputs[1:], targets[:-1])
    assert torch.equal(text[5][1][-1:], text[6][0][:1])
    assert b"import" in bytes(text[0][0].tolist()) + b"".join(bytes(text[i][0].tolist()) for i in range(200))


def test_the_model_sees_no_future_byte():
    model = ByteGPT(num_blocks=2, width=16, num_heads=2, context=8)
    tokens = torch.arange(8)[None]
    changed = tokens.clone()
    changed[0, -1] = 99
    torch.testing.assert_close(model(tokens)[0, :-1], model(changed)[0, :-1])
    assert abs(byte_loss(model(tokens), tokens).item() - 5.545) < 0.3  # log 256


def test_sampling_is_seeded():
    model = ByteGPT(num_blocks=1, width=16, num_heads=2, context=8)
    assert generate(model, "def ", 20) == generate(model, "def ", 20)
    assert generate(model, "def ", 20).startswith("def ")


def test_learning_rate_warms_then_cools():
    factors = [warm_then_cool(step, 100) for step in range(101)]
    assert factors[0] == 0.2
    assert max(factors) == factors[5] == 1
    assert abs(factors[100] - 0.1) < 1e-9


def test_the_demo_runs_here_in_two_steps(tmp_path, capsys):
    result = run_demo(steps=2, workers=0, storage_path=str(tmp_path))
    output = capsys.readouterr().out
    for words in ("loss at the start", "loss at the end", "tokens/s", "model state, worker 0", "def __init__(self"):
        assert words in output
    assert str(result.path) in output.replace("\n", "")
    assert len(result.metrics) == 2
