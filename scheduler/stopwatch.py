"""How long a unit's passes take, found as a step finds them: what they use was last touched long ago, and machines have
slower and faster moments.

Owns the rounds of a measurement and what is made of them. Does not own what is timed (`unit_times.py`).
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..memory.allocator import release_kernel_buffers
from ..memory.cores import keep_to_own_cores

__all__ = ["CACHE_BYTES", "OtherMemory", "Stopwatch", "Way", "expected", "typical"]

_SHORT_S = 0.3  # rounds that take less begin with one that is not counted
_LONG_S = 0.15  # rounds that take more have the other ways once
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 30
_LEAST_S, _MOST_S = 0.16, 0.3  # of all rounds; where one takes longer, two that agree will do
_SETTLED = 0.02  # standard error of a median, as a part of it
_NUM_TURNS, _TURNS_S = 2, 0.15  # threads, and seconds of their work alone at least, in three parts
_STALL = 2.0  # times as long as the usual, from which on a round met something else
_SLOW = 1.5  # times as long as the middle, as which what took longer counts
_SETTLING_S = 0.1  # of turns: new threads and their helpers may share a core until the kernel has moved them


def _cache_bytes() -> int:
    """Of the last cache, as far as it is known; within reason, where a machine has much."""
    try:
        known = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except (ValueError, OSError):
        known = 0
    return min(known, 64 << 20) if known > 0 else 32 << 20


CACHE_BYTES = _cache_bytes()


@dataclass(frozen=True, slots=True)
class Way:
    """One of the ways to run something.

    Attributes:
        run: the forward pass.
        given: what it is given, just made by what runs before it.
        trained: what gets gradients, new ones each time.
        frozen: what must not for the time being.
    """

    run: Callable[[], Any]
    given: Sequence[torch.Tensor]
    trained: Sequence[torch.Tensor]
    frozen: Sequence[nn.Parameter] = ()


class OtherMemory:
    """What a step touches between two uses of the same unit.

    Args:
        num_bytes: of it; at most a cache's size counts.
    """

    def __init__(self, num_bytes: int = CACHE_BYTES) -> None:
        self._others = torch.ones(max(1, min(num_bytes, CACHE_BYTES) // 4))

    @property
    def nbytes(self) -> int:
        return self._others.nbytes

    def walk(self, fresh: Sequence[torch.Tensor]) -> None:
        """Leave in the caches what other units use, and then what is `fresh`."""
        self._others.sum()
        for tensor in fresh:
            tensor.detach().sum()


class Stopwatch:
    """Times passes forward and backward.

    Args:
        others_bytes: walked over before each pass (`OtherMemory`).
        prepare: called before the first of several passes.
    """

    def __init__(self, others_bytes: int = CACHE_BYTES, prepare: Callable[[], object] = lambda: None) -> None:
        self.others = OtherMemory(others_bytes)
        self._prepare = prepare

    def seconds(self, ways: Sequence[Way]) -> list[tuple[float, float]]:
        """What forward and backward of each usually take."""
        rounds = self.rounds(ways)
        columns = [[each[way] for each in rounds if way < len(each)] for way in range(len(ways))]
        return [
            (expected([forward_s for forward_s, _ in column]), expected([backward_s for _, backward_s in column]))
            for column in columns
        ]

    def rounds(self, ways: Sequence[Way], times_as_long: float = 1.0) -> list[list[tuple[float, float]]]:
        """Forward and backward seconds of each, in rounds of all, until the first way has settled: of short ones more
        are looked at, since a machine changes its speed meanwhile. Where one round takes long, the others have the
        first way alone: what the other ways take more or less is told by that one."""
        rounds: list[list[tuple[float, float]]] = []
        is_first, spent_s = True, 0.0
        self._prepare()
        while not _is_enough(rounds, spent_s / times_as_long):
            is_long = bool(rounds) and sum(map(sum, rounds[0])) > _LONG_S
            found = [self._once(way) for way in (ways[:1] if is_long else ways)]
            taken_s = sum(map(sum, found))
            if not is_first or taken_s > _SHORT_S:  # the first one pays for what libraries set up
                rounds.append(found)
                spent_s += taken_s
            is_first = False
        return _without_stalls(rounds)

    def in_turns(self, way: Way) -> float:
        """Times as long that both passes take where threads compute in turns, each with helpers of its own and, since a
        turn ends with them, with kernels' buffers that are taken anew; at least 1, and 1 where kernels have no helpers:
        what such a thread takes longer by then is less than how far this measurement is off."""
        num_threads = torch.get_num_threads()
        if num_threads == 1:
            return 1.0
        alone: list[float] = []
        turns: list[float] = []

        def once(begin: Callable[[], object] = lambda: None) -> float:
            return sum(self._once(way, begin))

        def begin_thread() -> None:
            torch.set_num_threads(num_threads)  # torch keeps it for each thread
            keep_to_own_cores()

        once()
        while sum(alone) < _TURNS_S and len(alone) < _MOST_ROUNDS:
            alone += _repeated(once, _TURNS_S / 3)
            with ExitStack() as stack:  # apart from the ones alone, which a second team would slow too
                threads = [stack.enter_context(ThreadPoolExecutor(1, "turn", begin_thread)) for _ in range(_NUM_TURNS)]

                def both(threads: Sequence[ThreadPoolExecutor] = threads) -> list[float]:
                    return [thread.submit(once, release_kernel_buffers).result() for thread in threads]

                settling_s = 0.0
                while settling_s < _SETTLING_S:
                    settling_s += sum(both())
                turns += both()
        return max(1.0, statistics.median(turns) / statistics.median(alone))

    def _once(self, way: Way, begin: Callable[[], object] = lambda: None) -> tuple[float, float]:
        """`begin` is called before each pass, when the caches are as they will be."""
        for tensor in (*way.trained, *way.frozen):
            tensor.grad = None
        for parameter in way.frozen:
            parameter.requires_grad_(False)
        try:
            self.others.walk(way.given)
            begin()
            began_s = time.perf_counter()
            output = way.run()
            forward_s = time.perf_counter() - began_s
            outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
            if not outputs:
                return forward_s, 0.0
            gradients = [torch.ones_like(leaf) for leaf in outputs]
            self.others.walk(gradients)
            begin()
            began_s = time.perf_counter()
            torch.autograd.backward(outputs, gradients)
            return forward_s, time.perf_counter() - began_s
        finally:
            for parameter in way.frozen:
                parameter.requires_grad_(True)


def _repeated(once: Callable[[], float], least_s: float) -> list[float]:
    """Seconds, twice at least and until they add up to so much."""
    seconds: list[float] = []
    while len(seconds) < _NUM_TURNS or (sum(seconds) < least_s and len(seconds) < _MOST_ROUNDS):
        seconds.append(once())
    return seconds


def typical(seconds: Sequence[float]) -> float:
    """The mean without the fastest and the slowest fifth, at least one of each: a step goes through a machine's faster
    and slower moments too, which a median would leave out, but not through a stall each time."""
    left_out = max(1, len(seconds) // 5) if len(seconds) > 2 else 0
    return statistics.fmean(sorted(seconds)[left_out : len(seconds) - left_out])


def expected(seconds: Sequence[float]) -> float:
    """The mean, in which none counts as more than half as much again as the middle one: of many passes in a step some
    meet a slow moment, and those add up."""
    middle = statistics.median(seconds)
    return statistics.fmean(min(each, _SLOW * middle) for each in seconds)


def _without_stalls(rounds: list[list[tuple[float, float]]]) -> list[list[tuple[float, float]]]:
    """Those whose first way took less than twice as long as in the faster half: others met what no step meets as often,
    such as memory that the host of a virtual machine has to find first. A round of all ways stays where the others have
    one."""
    totals = [sum(each[0]) for each in rounds]
    usual = statistics.median_low(sorted(totals)[: (len(totals) + 1) // 2])
    most_s, num_ways = _STALL * usual, len(rounds[-1])
    return [each for each, total in zip(rounds, totals, strict=True) if total <= most_s or len(each) > num_ways]


def _is_enough(rounds: Sequence[Sequence[tuple[float, float]]], spent_s: float) -> bool:
    is_long, count = spent_s > _MOST_S, len(rounds)
    if count >= _MOST_ROUNDS or (is_long and count >= _LEAST_ROUNDS):
        return True
    if count < _LEAST_ROUNDS - is_long or spent_s < _LEAST_S:
        return False
    return _is_settled([sum(each[0]) for each in rounds])


def _is_settled(seconds: Sequence[float]) -> bool:
    """By the standard error of a median, from the median distance to it."""
    middle = statistics.median(seconds)
    spread = 1.48 * statistics.median(abs(each - middle) for each in seconds)
    return 1.25 * spread / len(seconds) ** 0.5 <= _SETTLED * middle
