"""The demo's model and text: a byte-level GPT in plain PyTorch, and the source of Python's standard library.

Knows nothing of the rest of the project; any model and data set would do in its place.
"""

import math
import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset

__all__ = ["ByteGPT", "StdlibText", "byte_loss", "generate", "warm_then_cool"]

NUM_BYTES = 256


class Block(nn.Module):
    """Attention and MLP, each after a norm and beside a residual. (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        batch, length, width = hidden.shape
        qkv = self.qkv(self.attention_norm(hidden)).view(batch, length, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.project(mixed.transpose(1, 2).reshape(batch, length, width))
        return hidden + self.narrow(functional.gelu(self.widen(self.mlp_norm(hidden))))


class Embedding(nn.Module):
    """Bytes and their places. (B, T) -> (B, T, D)."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.byte, self.place = nn.Embedding(NUM_BYTES, width), nn.Embedding(context, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.byte(tokens) + self.place(torch.arange(tokens.shape[1], device=tokens.device))


class Head(nn.Module):
    """(B, T, D) -> logits (B, T, 256)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.logits = nn.LayerNorm(width), nn.Linear(width, NUM_BYTES, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.logits(self.norm(hidden))


class ByteGPT(nn.Module):
    """A GPT over bytes. (B, T) -> logits (B, T, 256)."""

    def __init__(self, num_blocks: int = 6, width: int = 256, num_heads: int = 4, context: int = 128) -> None:
        super().__init__()
        self.context = context
        self.embedding = Embedding(width, context)
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(num_blocks))
        self.head = Head(width)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


class StdlibText(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Windows of `context` bytes of the standard library's source, each with the same window one byte later."""

    def __init__(self, context: int) -> None:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(
            path
            for path in root.rglob("*.py")
            if not {"site-packages", "dist-packages", "test", "tests", "idlelib"} & set(path.relative_to(root).parts)
        )
        text = b"\n".join(path.read_bytes() for path in files)
        self.num_files, self.num_bytes = len(files), len(text)
        self._text, self._context = torch.frombuffer(bytearray(text), dtype=torch.uint8), context

    def __len__(self) -> int:
        return (self.num_bytes - 1) // self._context

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = index * self._context
        window = self._text[start : start + self._context + 1].long()
        return window[:-1], window[1:]


def byte_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy per byte, in nats."""
    return functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def warm_then_cool(step: int, num_steps: int) -> float:
    """Learning rate over its maximum: up in the first twentieth of the steps, then down a cosine to a tenth."""
    warm = max(1, num_steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, num_steps - warm)))


@torch.no_grad()
def generate(model: ByteGPT, prompt: str, num_bytes: int, temperature: float = 0.7, seed: int = 0) -> str:
    """Sample `num_bytes` after `prompt`."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([list(prompt.encode())])
    for _ in range(num_bytes):
        logits = model(tokens[:, -model.context :])[0, -1] / temperature
        chosen = torch.multinomial(logits.softmax(0), 1, generator=generator)
        tokens = torch.cat([tokens, chosen[None]], dim=1)
    return bytes(tokens[0].tolist()).decode(errors="replace")
