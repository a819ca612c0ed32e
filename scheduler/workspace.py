"""Memory of CPU kernels that no tensor shows: accumulators, reordered operands, packing buffers.

Owns an allowance for each operator that needs much of it, computed from its operands. Each is an upper bound, fitted to
measurements (peak of the resident set around single calls, freed blocks returned, two threads, AVX-512 without native
bfloat16; oneDNN and MKL of torch 2.13); what was measured stands beside it. Does not own when they are counted
(`storage_watch.py`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["hidden_bytes", "library_bytes", "workspace_bytes"]

_MIB = 1 << 20


def library_bytes(operator: Any, arguments: Sequence[Any]) -> int:
    """Bytes of buffers that MKL keeps for later calls of products of float32 matrices.

    (m, k) x (k, n) packs a block of k for all n: 4.9 MiB for (256, 768) x (768, 3072), where 5.5 are allowed; 29.6 for
    (256, 768) x (768, 32000), where 32.3 are; 8.2 for (256, 512) x (512, 8192), where 9 are. Long sums are split
    between threads, each with its own result: 6.4 for (1024, 32000) x (32000, 768), where 7 are.
    """
    operands = _product(operator, arguments)
    if operands is None or operands[0].dtype is not torch.float32:
        return 0
    left, right = operands
    (m, k), n = left.shape, right.shape[1]
    block = min(384 if k >= 768 and n < 16384 else 256, 2 * m, k)
    num_bytes = 4 * n * block
    if k >= 8 * max(m, n):
        num_bytes = max(num_bytes, 4 * m * n * torch.get_num_threads())
    return num_bytes + min(_MIB, left.nbytes + right.nbytes)


def workspace_bytes(operator: Any, arguments: Sequence[Any], results: Sequence[torch.Tensor]) -> int:
    """Bytes that the operator takes beside its operands and results, and gives back when it is done."""
    rule = _RULES.get(str(operator))
    if rule is None or not results or results[0].device.type != "cpu":
        return 0
    return rule(arguments, results)


def hidden_bytes(operator: Any, arguments: Sequence[Any]) -> dict[int, int]:
    """Position of a result -> its resident bytes, where a traced result is smaller than the real one: what an LSTM
    layer saves for its backward. 20.0 to 23.7 bytes for each step, sample and hidden element in float32, 10.1 to 12.0
    in bfloat16; about three times that is reserved, and moved where it is moved.
    """
    if str(operator) != "aten.mkldnn_rnn_layer.default":
        return {}
    steps, samples, hidden = _rnn_sizes(arguments[0], arguments[1])
    return {3: steps * samples * hidden * (24 if arguments[0].dtype is torch.float32 else 12)}


def _product(operator: Any, arguments: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor] | None:
    name = str(operator)
    if name not in ("aten.mm.default", "aten.addmm.default"):
        return None
    left, right = arguments[-2:] if name == "aten.mm.default" else arguments[1:3]
    return (left, right) if left.device.type == "cpu" else None


def _matrix_product(arguments: Sequence[Any], results: Sequence[torch.Tensor]) -> int:
    """oneDNN sums 16-bit products in float32: 93.6 MiB for a result of 32000 x 768, where 95.7 are allowed."""
    result = results[0]
    return 4 * result.numel() + min(2 * _MIB, 2 * arguments[-2].numel()) if result.itemsize == 2 else 0


def _blocked_bytes(image: torch.Tensor) -> int:
    """An image in oneDNN's layout: channels padded to a multiple of 16."""
    num_channels = image.shape[1] if image.dim() > 1 else 1
    return image.nbytes // max(num_channels, 1) * (-(-num_channels // 16) * 16)


def _convolution(arguments: Sequence[Any], results: Sequence[torch.Tensor]) -> int:
    """16.0 MiB for 16 x 64 x 64 x 64 of float32, and for 64 x 9 x 64 x 64, both as allowed."""
    return max(_blocked_bytes(arguments[0]), _blocked_bytes(results[0]))


def _convolution_backward(arguments: Sequence[Any], results: Sequence[torch.Tensor]) -> int:
    """Both gradients of images: 31.9 MiB for 16 x 64 x 64 x 64 of float32 (34 allowed), 18.7 in bfloat16 (18.3)."""
    gradient, image, weight, wants_image = arguments[0], arguments[1], arguments[2], arguments[-1][0]
    sums = 4 * weight.numel() * (1 + torch.get_num_threads())
    return _blocked_bytes(gradient) + (_blocked_bytes(image) if wants_image else 0) + sums + 2 * _MIB


def _rnn(arguments: Sequence[Any], results: Sequence[torch.Tensor]) -> int:
    """Gates of all steps and the weights: 22.1 MiB for 128 x 16 x 256 -> 512 (23 allowed)."""
    steps, samples, hidden = _rnn_sizes(arguments[0], arguments[1])
    return steps * samples * 4 * hidden * 4 + arguments[1].nbytes + arguments[2].nbytes + _MIB


def _rnn_backward(arguments: Sequence[Any], results: Sequence[torch.Tensor]) -> int:
    """Gates of all steps twice and the weights three times: 49.6 MiB for 128 x 16 x 256 -> 512 (51 allowed)."""
    steps, samples, hidden = _rnn_sizes(arguments[0], arguments[1])
    weights = arguments[1].nbytes + arguments[2].nbytes
    return 2 * steps * samples * 4 * hidden * 4 + 3 * weights + _MIB


def _rnn_sizes(inputs: torch.Tensor, weight: torch.Tensor) -> tuple[int, int, int]:
    return inputs.shape[0], inputs.shape[1], weight.shape[0] // 4


def _mean(arguments: Sequence[Any], results: Sequence[torch.Tensor]) -> int:
    """Of 16-bit numbers, in float32: 16.0 MiB for 8 MiB, as allowed."""
    return 4 * math.prod(arguments[0].shape) if arguments[0].itemsize == 2 else 0


def _embedding_backward(arguments: Sequence[Any], results: Sequence[torch.Tensor]) -> int:
    """A gradient that is not contiguous is copied: 1.8 MiB for 2, as allowed."""
    return 0 if arguments[0].is_contiguous() else int(arguments[0].nbytes)


_RULES: dict[str, Callable[[Sequence[Any], Sequence[torch.Tensor]], int]] = {
    "aten.mm.default": _matrix_product,
    "aten.addmm.default": _matrix_product,
    "aten.convolution.default": _convolution,
    "aten.convolution_backward.default": _convolution_backward,
    "aten.mkldnn_rnn_layer.default": _rnn,
    "aten.mkldnn_rnn_layer_backward.default": _rnn_backward,
    "aten.mean.dim": _mean,
    "aten.embedding_dense_backward.default": _embedding_backward,
}
