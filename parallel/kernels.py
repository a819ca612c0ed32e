"""The arithmetic of reducing gradients over ranks, in one pass over memory.

Owns two kernels with the same bits: numba's for float32, torch's (blocked, so that the intermediate stays in the
cache) for every dtype. The sum is made in rank order, first over the ranks, then onto what was accumulated before:
the result does not depend on how a chunk is cut into ranges.

The sum of squares is formed in float64 over blocks of BLOCK elements from the range's start, so it depends on the
range; callers that want the same norm for every ZeRO stage ask for the same ranges.
"""

import numpy as np
import torch
from numba import njit  # pyright: ignore[reportAttributeAccessIssue]

__all__ = ["BLOCK", "sum_ranks", "sum_ranks_torch"]

BLOCK = 4096


def sum_ranks(parts: torch.Tensor, out: torch.Tensor, accumulate: bool) -> float:
    """Sum `parts` over its first dimension into `out`; returns the sum of squares of `out` afterwards.

    Args:
        parts: [num_ranks, num_elems], the ranks' gradients, any floating dtype.
        out: [num_elems] float32.
        accumulate: whether the sum is added to what `out` holds.
    """
    if parts.dtype is torch.float32:
        return float(_sum_ranks_float32(parts.numpy(), out.numpy(), accumulate))
    return sum_ranks_torch(parts, out, accumulate)


def sum_ranks_torch(parts: torch.Tensor, out: torch.Tensor, accumulate: bool, block: int = 1 << 16) -> float:
    """As `sum_ranks`, by torch alone. The sum of squares may differ from numba's in its last bits."""
    squares = 0.0
    for start in range(0, out.numel(), block):
        part = parts[:, start : start + block]
        total = part[0].to(torch.float32, copy=True)
        for rank in range(1, part.shape[0]):
            total.add_(part[rank])
        target = out[start : start + block]
        target.copy_(target.add_(total) if accumulate else total)
        squares += torch.dot(target, target).item()
    return squares


@njit(nogil=True, cache=True, fastmath=False, boundscheck=False)
def _sum_ranks_float32(parts: np.ndarray, out: np.ndarray, accumulate: bool) -> float:  # pragma: no cover - compiled
    num_ranks, num_elems = parts.shape
    squares = 0.0
    lanes = np.zeros(8, np.float64)
    for start in range(0, num_elems, BLOCK):
        stop = min(start + BLOCK, num_elems)
        target = out[start:stop]
        size = stop - start
        first = parts[0, start:stop]
        if num_ranks == 2:  # the common case without a temporary
            second = parts[1, start:stop]
            if accumulate:
                for i in range(size):
                    target[i] = target[i] + (first[i] + second[i])
            else:
                for i in range(size):
                    target[i] = first[i] + second[i]
        else:
            total = np.empty(size, np.float32)
            for i in range(size):
                total[i] = first[i]
            for rank in range(1, num_ranks):
                part = parts[rank, start:stop]
                for i in range(size):
                    total[i] = total[i] + part[i]
            if accumulate:
                for i in range(size):
                    target[i] = target[i] + total[i]
            else:
                for i in range(size):
                    target[i] = total[i]
        # Eight running sums break the dependency between additions, in an order that never changes.
        lanes[:] = 0.0
        whole = size - size % 8
        for i in range(0, whole, 8):
            for lane in range(8):
                value = np.float64(target[i + lane])
                lanes[lane] += value * value
        for i in range(whole, size):
            value = np.float64(target[i])
            lanes[0] += value * value
        squares += ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]))
    return squares
