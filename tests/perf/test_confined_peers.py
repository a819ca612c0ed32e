"""Plain PyTorch with checkpointed blocks, and what DeepSpeed is told; it is run itself only where it is installed."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from outgrow.perf.confined import Job, run_confined
from outgrow.perf.confined_peers import zero_config
from outgrow.perf.models import CONFIGS
from outgrow.perf.peers import EXTENSIONS

TINY = {"num_blocks": 2, "width": 16, "num_heads": 2, "num_tokens": 32, "length": 8, "batch_size": 4}


def test_checkpointed_blocks_give_the_same_losses() -> None:
    jobs = [Job("plain", TINY, num_steps=2, activations=activations) for activations in (None, "recompute")]
    kept, recomputed = map(run_confined, jobs)
    assert (kept.end, recomputed.end) == ("trained", "trained"), (kept.message, recomputed.message)
    assert len(kept.losses) == 2
    # Weights are not seeded: both only start near the logarithm of the number of tokens.
    assert abs(kept.losses[0] - recomputed.losses[0]) < 0.5


def test_deepspeed_keeps_nothing_in_memory_that_it_need_not() -> None:
    config = CONFIGS["3B"]
    zero = zero_config(config, "/nvme")["zero_optimization"]
    assert zero["stage"] == 3
    assert {zero[name]["device"] for name in ("offload_param", "offload_optimizer")} == {"nvme"}
    assert zero["offload_param"]["max_in_cpu"] == 0
    assert zero["offload_param"]["buffer_size"] == config.num_tokens * config.width, "room for the embedding"
    assert zero_config(config, "/nvme")["gradient_clipping"] == 0.0, "it would clip at 1.0 by itself"


@pytest.mark.skipif(
    find_spec("deepspeed") is None or not (EXTENSIONS / "async_io" / "async_io.so").exists(),
    reason="DeepSpeed is optional: make peers",
)
def test_deepspeed_trains_with_its_state_on_disk(tmp_path: Path) -> None:
    model = {**TINY, "width": 256, "num_tokens": 512}
    outcome = run_confined(Job("deepspeed", model, num_steps=2, folder=str(tmp_path), activations="recompute"))
    assert outcome.end == "trained", outcome.message
    assert abs(outcome.losses[0] - 6.24) < 0.5, "the logarithm of 512"
    assert list(tmp_path.rglob("float32params")), "parameters on disk, in float32"
    assert list(tmp_path.rglob("*optimizer*"))
