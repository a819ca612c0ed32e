"""The peers, each set up as its own documentation does, on the GPT of `models.py`.

Plain PyTorch; DistributedDataParallel (DDP), alone and with ZeroRedundancyOptimizer; FSDP2 (`fully_shard` on every
block, on embedding, head and root) with and without resharding after forward; DeepSpeed ZeRO. All in float32 with fused
AdamW, learning rate 3e-4 and weight decay 0.01, and the loss averaged over ranks inside the timed step, as anyone who
prints it does. Nothing is tuned for a peer, nothing held back from one.
"""

import os
import sys
from collections.abc import Iterable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .members import Trainee
from .models import CONFIGS, Batches, build_gpt, library_text, random_batches, text_batches, token_loss
from .rank import Rank

__all__ = ["EXTENSIONS", "adamw", "batches_of", "ddp", "deepspeed", "fsdp2", "load_deepspeed", "plain"]

EXTENSIONS = Path(sys.prefix) / "torch_extensions"

adamw = partial(torch.optim.AdamW, lr=3e-4, weight_decay=0.01, fused=True)


def batches_of(config: str, data: str) -> Batches:
    """The batches of a configuration: `data` is "random" or "text"."""
    if data == "text":
        return text_batches(CONFIGS[config], library_text())
    return random_batches(CONFIGS[config])


def _trainee(rank: Rank, config: str, data: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> Trainee:
    def train(inputs: Tensor, targets: Tensor) -> float:
        loss = token_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return _mean(rank, loss)

    return Trainee(rank, batches_of(config, data), train)


def _mean(rank: Rank, loss: Tensor) -> float:
    if rank.count == 1:
        return loss.item()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / rank.count


def plain(rank: Rank, config: str, data: str = "random") -> Trainee:
    """PyTorch alone, one process."""
    model = build_gpt(CONFIGS[config])
    return _trainee(rank, config, data, model, adamw(model.parameters()))


def ddp(rank: Rank, config: str, data: str = "random", shard_optimizer: bool = False) -> Trainee:
    """DistributedDataParallel; with `shard_optimizer`, ZeroRedundancyOptimizer around AdamW."""
    model = nn.parallel.DistributedDataParallel(build_gpt(CONFIGS[config]))
    if not shard_optimizer:
        return _trainee(rank, config, data, model, adamw(model.parameters()))
    from torch.distributed.optim import ZeroRedundancyOptimizer

    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=3e-4, weight_decay=0.01, fused=True)
    return _trainee(rank, config, data, model, optimizer)


def fsdp2(rank: Rank, config: str, data: str = "random", reshard_after_forward: bool = True) -> Trainee:
    """`fully_shard` on each block, the embedding, the head and the root."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = build_gpt(CONFIGS[config])
    mesh = init_device_mesh("cpu", (rank.count,))
    pieces: Iterable[nn.Module] = (*model.blocks, model.embed, model.head, model)
    for piece in pieces:
        fully_shard(piece, mesh=mesh, reshard_after_forward=reshard_after_forward)
    return _trainee(rank, config, data, model, adamw(model.parameters()))


def load_deepspeed(rank_index: int) -> Any:
    """The library, with what it wants of a launcher: the rank's number, `ninja` from beside this Python, and its
    compiled parts where `make peers` put them (without them it compiles them now, which takes minutes)."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(EXTENSIONS))
    os.environ.setdefault("LOCAL_RANK", str(rank_index))
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    return import_module("deepspeed")


def deepspeed(rank: Rank, config: str, data: str = "random", stage: int = 3, nvme_folder: str | None = None) -> Trainee:
    """DeepSpeed ZeRO on CPU with torch's fused AdamW; its default of clipping gradients at 1.0 is switched off.

    With `nvme_folder`, parameters and optimizer lie there. It keeps such parameters in bfloat16 without being asked to.
    """
    library = load_deepspeed(rank.index)
    model = build_gpt(CONFIGS[config])
    if rank.count > 1:
        library.init_distributed("gloo")
    batch_size = CONFIGS[config].batch_size
    optimizer = adamw(model.parameters())
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": stage == 3, "contiguous_gradients": True}
    if nvme_folder is not None:
        nvme = {"device": "nvme", "nvme_path": nvme_folder, "pin_memory": False, "buffer_count": 5}
        largest = max(parameter.numel() for parameter in model.parameters())
        optimizer = library.ops.adam.DeepSpeedCPUAdam(model.parameters(), lr=3e-4, weight_decay=0.01)  # its own advice
        zero["offload_optimizer"] = {**nvme, "pipeline_read": False, "pipeline_write": False, "fast_init": False}
        zero["offload_param"] = {**nvme, "buffer_size": largest}
        if rank.count == 1:  # it wants a group for one rank too
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            library.init_distributed("gloo")
    engine, *_ = library.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_batch_size": batch_size,
            "train_micro_batch_size_per_gpu": batch_size // rank.count,
            "zero_optimization": zero,
            "aio": {"block_size": 1 << 20, "queue_depth": 16, "single_submit": False, "overlap_events": True},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
            "steps_per_print": 10**9,
        },
    )

    def train(inputs: Tensor, targets: Tensor) -> float:
        loss = token_loss(engine(inputs), targets)
        engine.backward(loss)
        engine.step()
        return _mean(rank, loss.detach().float())

    return Trainee(rank, batches_of(config, data), train)
