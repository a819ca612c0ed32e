"""What a confined process does where it is not the engine: a GPT trained by plain PyTorch, or by DeepSpeed's ZeRO-3.

Owns the two, each a step at a time. It does not own the loop over steps (`confined_work.py`).

Nothing of what a peer's own documentation offers against running out of memory is held back from it: both can
checkpoint every block. DeepSpeed has parameters and optimizer on NVMe, builds the model under `zero.Init`, one module
at a time, and keeps no copy of parameters in memory (`max_in_cpu`, 10^9 elements by default). Its buckets have the
sizes that Hugging Face's "auto" gives them, and its optimizer works through small groups (`sub_group_size`): its
defaults are made for GPUs and take 2 GB for one bucket alone. With a configuration given to `zero.Init` it keeps
float32. What remains by its design is a gradient for every parameter in memory, and pools of buffers as large as the
largest parameter.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .bound import Moved
from .models import GPT, GPTConfig, token_loss
from .peers import adamw, load_deepspeed

__all__ = ["DeepSpeed", "Plain", "zero_config"]

_SUB_GROUP = 10_000_000


class Plain:
    """PyTorch as its tutorial accumulates: a backward for each micro-batch, then one step."""

    predicted_bytes: int | None = None
    plan: str = ""

    def __init__(
        self, config: GPTConfig, micro_batches: int, init: Callable[[nn.Module], None], checkpoint_blocks: bool
    ) -> None:
        self._model = GPT(config)
        with torch.no_grad():
            self._model.apply(init)
        if checkpoint_blocks:
            _checkpoint(self._model)
        self._optimizer = adamw(self._model.parameters())
        self._micro_batches = micro_batches

    def step(self, batch: tuple[Tensor, Tensor]) -> tuple[float, float, Moved]:
        started_s = time.perf_counter()
        parts = [tensor.chunk(self._micro_batches) for tensor in batch]
        total = 0.0
        for inputs, targets in zip(*parts, strict=True):
            loss = token_loss(self._model(inputs), targets) / self._micro_batches
            loss.backward()
            total += loss.item()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total, time.perf_counter() - started_s, Moved(0, 0, {})

    def close(self) -> None: ...


class DeepSpeed:
    """ZeRO-3 on one rank, parameters and optimizer in `folder`. Weights are as PyTorch's modules make them."""

    predicted_bytes: int | None = None
    plan: str = "ZeRO-3, parameters/optimizer on nvme"

    def __init__(self, config: GPTConfig, folder: str, checkpoint_blocks: bool) -> None:
        library: Any = load_deepspeed(0)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # it wants one for one rank too
        library.init_distributed("gloo")
        settings = zero_config(config, folder)
        with library.zero.Init(config_dict_or_path=settings):
            model = GPT(config)
        if checkpoint_blocks:
            _checkpoint(model)
        optimizer = library.ops.adam.DeepSpeedCPUAdam(model.parameters(), lr=3e-4, weight_decay=0.01)
        self._engine, *_ = library.initialize(model=model, optimizer=optimizer, config=settings)

    def step(self, batch: tuple[Tensor, Tensor]) -> tuple[float, float, Moved]:
        started_s = time.perf_counter()
        inputs, targets = batch
        loss = token_loss(self._engine(inputs), targets)
        self._engine.backward(loss)
        self._engine.step()
        return loss.item(), time.perf_counter() - started_s, Moved(0, 0, {})

    def close(self) -> None:
        dist.destroy_process_group()


def zero_config(config: GPTConfig, folder: str) -> dict[str, Any]:
    """DeepSpeed's configuration for a GPT with all of its state in `folder` and as little as it can in memory."""
    largest = max(config.num_tokens, 4 * config.width) * config.width  # the embedding, or a matrix of the MLP
    square = config.width**2
    nvme = {"device": "nvme", "nvme_path": folder, "pin_memory": False}
    return {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.batch_size,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "offload_param": {**nvme, "buffer_size": largest, "max_in_cpu": 0},
            "offload_optimizer": nvme,
            "sub_group_size": _SUB_GROUP,
            "reduce_bucket_size": square,
            "stage3_prefetch_bucket_size": 9 * square // 10,
            "stage3_param_persistence_threshold": 10 * config.width,
            "stage3_max_live_parameters": largest,
            "stage3_max_reuse_distance": 0,
        },
        "aio": {"block_size": 1 << 20, "queue_depth": 16, "single_submit": False, "overlap_events": True},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
    }


def _checkpoint(model: GPT) -> None:
    """Every block keeps its input alone, and runs again in the backward pass."""
    for block in model.blocks:
        forward = block.forward

        def recomputed(x: Tensor, forward: Callable[[Tensor], Tensor] = forward) -> Any:
            return checkpoint(forward, x, use_reentrant=False)

        block.forward = recomputed  # not a wrapping module: parameters keep their names
