"""The GPT that benchmarks train, its configurations, and their data.

Owns the model (pre-LayerNorm, learned positions, untied head, scaled-dot-product attention, a GELU MLP of four times
the width), its initialisation and deterministic batches. Every contestant builds it from here, so that all of them
start from the same weights and see the same tokens.
"""

import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CONFIGS", "GPT", "GPTConfig", "build_gpt", "library_text", "random_batches", "text_batches", "token_loss"]


@dataclass(frozen=True, slots=True)
class GPTConfig:
    """Sizes of a GPT and of the batch that it is measured with.

    Attributes:
        num_blocks: transformer blocks.
        width: of the residual stream; a multiple of `num_heads`.
        num_heads: attention heads.
        num_tokens: vocabulary.
        length: positions in a sample.
        batch_size: samples in a global batch.

    Raises:
        ValueError: a width that the heads do not divide.
    """

    num_blocks: int
    width: int
    num_heads: int
    num_tokens: int
    length: int
    batch_size: int

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.length

    @property
    def num_parameters(self) -> int:
        block = 12 * self.width**2 + 13 * self.width
        return self.num_blocks * block + (2 * self.num_tokens + self.length + 2) * self.width


CONFIGS: dict[str, GPTConfig] = {
    "S": GPTConfig(num_blocks=6, width=512, num_heads=8, num_tokens=8192, length=256, batch_size=8),
    "M": GPTConfig(num_blocks=12, width=768, num_heads=12, num_tokens=32000, length=256, batch_size=8),
    # 3.1 billion parameters: 50 GB of float32 state.
    "3B": GPTConfig(num_blocks=26, width=3072, num_heads=24, num_tokens=32000, length=256, batch_size=1),
    # Many bytes of state beside few of activations, in many small blocks, and a batch that four ranks divide.
    "memory": GPTConfig(num_blocks=48, width=256, num_heads=4, num_tokens=256, length=4, batch_size=4),
    # A byte-level model that learns enough in a minute on two cores for a curve to have a shape.
    "bytes": GPTConfig(num_blocks=4, width=192, num_heads=6, num_tokens=256, length=128, batch_size=8),
    "tiny": GPTConfig(num_blocks=2, width=16, num_heads=2, num_tokens=32, length=8, batch_size=4),
}


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and around a residual: (B, T, width) -> (B, T, width)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        num_samples, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(num_samples, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(heads.transpose(1, 2).reshape(num_samples, length, width))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class Embedding(nn.Module):
    """Tokens and positions: (B, T) of int64 -> (B, T, width)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(config.num_tokens, config.width)
        self.position = nn.Embedding(config.length, config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))


class Head(nn.Module):
    """The last LayerNorm and the logits: (B, T, width) -> (B, T, num_tokens)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.logits = nn.Linear(config.width, config.num_tokens, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.norm(x))


class GPT(nn.Module):
    """Next-token logits: (B, T) of int64 -> (B, T, num_tokens)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embed = Embedding(config)
        self.blocks = nn.ModuleList(Block(config.width, config.num_heads) for _ in range(config.num_blocks))
        self.head = Head(config)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build_gpt(config: GPTConfig) -> GPT:
    """The same weights at every call: matrices from a normal distribution of 0.02, the rest as PyTorch leaves it."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = GPT(config)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.02)
    return model


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over all positions: (B, T, V) and (B, T) -> scalar."""
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), targets.reshape(-1))


Batches = Callable[[int], tuple[Tensor, Tensor]]


def random_batches(config: GPTConfig) -> Batches:
    """Step -> its global batch of uniform tokens, (B, T) inputs and targets, the same on every rank."""

    def batch(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1234 + step)
        tokens = torch.randint(config.num_tokens, (config.batch_size, config.length + 1), generator=generator)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    return batch


def text_batches(config: GPTConfig, text: bytes) -> Batches:
    """Step -> its global batch of windows at seeded places of `text`, a byte a token.

    Raises:
        ValueError: a vocabulary that cannot hold bytes, or a text shorter than one window.
    """
    if config.num_tokens < 256 or len(text) <= config.length:
        raise ValueError(
            f"bytes need a vocabulary of 256 and a text longer than a window of {config.length}, "
            f"got {config.num_tokens} and {len(text)} bytes"
        )
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1234 + step)
        starts = torch.randint(len(data) - config.length, (config.batch_size,), generator=generator)
        tokens = torch.stack([data[start : start + config.length + 1] for start in starts.tolist()]).long()
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    return batch


def library_text(limit_bytes: int = 8 * 2**20) -> bytes:
    """The source of Python's standard library on this machine, file after file by name, up to `limit_bytes`."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= limit_bytes:
            break
    return bytes(text[:limit_bytes])
