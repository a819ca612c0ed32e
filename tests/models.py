"""Small models and data for the equivalence tests: each has something that a sharded, chunked trainer can get wrong."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc, self.out = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.ln1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.proj(y.transpose(1, 2).reshape(b, t, d)))
        return x + self.drop(self.out(F.gelu(self.fc(self.ln2(x)))))


class GPT(nn.Module):
    """A byte-level GPT; `pos` is a parameter of the model itself, used outside of every unit; `tied` shares embedding
    and head (a vocabulary that does not divide by the ranks)."""

    def __init__(
        self, dim: int = 32, layers: int = 3, vocab: int = 67, tied: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.tok = nn.Embedding(vocab, dim)
        self.pos = nn.Parameter(torch.randn(16, dim) * 0.02)
        self.blocks = nn.ModuleList([Block(dim, 4, dropout) for _ in range(layers)])
        self.ln = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)
        if tied:
            self.head.weight = self.tok.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tok(tokens) + self.pos[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln(x))


class ConvNet(nn.Module):
    """Residual convolutions with BatchNorm, whose statistics are buffers."""

    class Residual(nn.Module):
        def __init__(self, width: int, dropout: float) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
            self.dropout = dropout

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + F.dropout(F.relu(self.norm(self.conv(x))), self.dropout, self.training)

    def __init__(self, width: int = 9, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.body = nn.Sequential(*[ConvNet.Residual(width, dropout) for _ in range(3)])
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.stem(x)).mean(dim=(2, 3)))


class LSTMClassifier(nn.Module):
    def __init__(self, vocab: int = 29, dim: int = 14, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.lstm = nn.LSTM(dim, 18, num_layers=2, batch_first=True, dropout=dropout)
        self.head = nn.Linear(18, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.embed(tokens))[0][:, -1])


class EncoderDecoder(nn.Module):
    """Two stacks; every decoder layer reads the encoder's output, so units have several inputs."""

    def __init__(self, vocab: int = 31, dim: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.core = nn.Transformer(dim, 2, 2, 2, 24, dropout=dropout, batch_first=True)
        self.head = nn.Linear(dim, vocab)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.head(self.core(self.embed(source), self.embed(target)))


class TiedFrozen(nn.Module):
    """Tied embedding and head, a frozen block, a parameter that gets a gradient in some steps only, one that never
    does."""

    def __init__(self, vocab: int = 37, dim: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.tok = nn.Embedding(vocab, dim)
        self.layers = nn.ModuleList([nn.Linear(dim, dim) for _ in range(3)])
        self.sometimes = nn.Linear(dim, dim)
        self.never = nn.Linear(dim, dim)
        self.head = nn.Linear(dim, vocab, bias=False)
        self.head.weight = self.tok.weight
        self.layers[1].requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tok(tokens)
        for layer in self.layers:
            x = x + F.dropout(torch.tanh(layer(x)), self.dropout, self.training)  # drawn between units
        side = self.sometimes(x)
        if bool((tokens[0, 0] % 2 == 0).item()) if tokens.device.type != "meta" else True:
            x = x + side
        return self.head(x)


@dataclass(frozen=True)
class Case:
    """A model, its batches and its loss."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int, int], Any]  # (step, samples) -> tuple of tensors, the last one the target

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output.reshape(-1, output.shape[-1]), target.reshape(-1))

    def model(self) -> nn.Module:
        torch.manual_seed(11)
        return self.build()


def _generator(step: int) -> torch.Generator:
    return torch.Generator().manual_seed(100 + step)


def _tokens(vocab: int, length: int) -> Callable[[int, int], Any]:
    def batch(step: int, samples: int) -> Any:
        tokens = torch.randint(0, vocab, (samples, length + 1), generator=_generator(step))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    return batch


def _images(step: int, samples: int) -> Any:
    generator = _generator(step)
    return torch.randn(samples, 3, 8, 8, generator=generator), torch.randint(0, 10, (samples,), generator=generator)


def _labels(step: int, samples: int) -> Any:
    generator = _generator(step)
    return (
        torch.randint(0, 29, (samples, 9), generator=generator),
        torch.randint(0, 5, (samples,), generator=generator),
    )


def _pairs(step: int, samples: int) -> Any:
    generator = _generator(step)
    source = torch.randint(0, 31, (samples, 7), generator=generator)
    target = torch.randint(0, 31, (samples, 6), generator=generator)
    return source, target[:, :-1].contiguous(), target[:, 1:].contiguous()


CASES = {
    case.name: case
    for case in (
        Case("gpt", GPT, _tokens(67, 12)),
        Case("gpt-tied", lambda: GPT(tied=True), _tokens(67, 12)),
        Case("conv", ConvNet, _images),
        Case("lstm", LSTMClassifier, _labels),
        Case("encoder-decoder", EncoderDecoder, _pairs),
        Case("tied-frozen", TiedFrozen, _tokens(37, 6)),
    )
}

DROPPING = {
    name: replace(CASES[name], build=build)
    for name, build in {
        "gpt": lambda: GPT(dropout=0.2),
        "gpt-tied": lambda: GPT(tied=True, dropout=0.2),
        "conv": lambda: ConvNet(dropout=0.2),
        "lstm": lambda: LSTMClassifier(dropout=0.2),
        "encoder-decoder": lambda: EncoderDecoder(dropout=0.2),
        "tied-frozen": lambda: TiedFrozen(dropout=0.2),
    }.items()
}
"""The same models with dropout: what runs in another order must still draw the same masks."""
