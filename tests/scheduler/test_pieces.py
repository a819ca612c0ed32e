"""From measured units to pieces of a chain, and from a choice for runs to one for units."""

import torch
from torch import nn

from outgrow.parallel.units import find_units
from outgrow.scheduler.cost import TimeProfile, UnitSeconds
from outgrow.scheduler.hardware import DiskFigures, Transfers
from outgrow.scheduler.memory_profile import MemoryProfile, measure_memory
from outgrow.scheduler.pieces import choose_for_units, pieces_of, with_faults
from outgrow.scheduler.plan import Activations
from outgrow.scheduler.storage_replay import Fresh

DISK = DiskFigures(
    Transfers(1e9, 0.001, 1.0, 0.0), Transfers(2e9, 0.001, 1.0, 0.0), Transfers(2e9, 0.001, 1.0, 0.0), 1.0
)


class Chain(nn.Module):
    """The third unit runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.ModuleList(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index in (0, 1, 2, 2, 3):
            x = self.units[index](x)
        return x


def profile(num_samples: int = 32) -> tuple[MemoryProfile, TimeProfile]:
    model, batch = Chain(), torch.ones(num_samples, 64)
    memory = measure_memory(model, find_units(model), lambda m, b: m(b), lambda out, _: out.sum(), batch)
    return memory, TimeProfile(tuple(UnitSeconds(1.0, 2.0, 1.0, 1.0) for _ in memory.units))


def test_pieces_hold_what_was_measured() -> None:
    memory, times = profile()
    pieces = pieces_of(memory, times, DISK)
    assert len(pieces) == 5
    for piece, unit in zip(pieces, memory.units, strict=True):
        assert piece.saved_bytes == unit.saved_bytes >= 32 * 256 * 4
        assert piece.input_bytes == unit.input_bytes
        assert piece.recompute_s == 1.0
        assert piece.save_s == 0.001 + unit.saved_bytes / 2e9
        assert piece.load_s == 0.001 + unit.saved_bytes / 1e9
        assert piece.recompute_peak_bytes >= unit.input_bytes + unit.recompute_peak_bytes
    assert all(piece.save_s == piece.load_s == 0 for piece in pieces_of(memory, times))


def test_less_room_recomputes_more_and_a_unit_has_one_policy() -> None:
    memory, times = profile()
    ample = sum(unit.saved_bytes for unit in memory.units) * 4
    assert choose_for_units(memory, times, 4, ample) == [Activations.KEEP] * 4
    counts = []
    for room in range(0, ample, ample // 64):
        words = choose_for_units(memory, times, 4, room)
        if words is not None:
            assert len(words) == 4
            counts.append(sum(word is Activations.RECOMPUTE for word in words))
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 0
    assert choose_for_units(memory, times, 4, 0) is None


def test_what_is_quick_to_move_is_moved() -> None:
    memory, times = profile()
    tight = max(piece.offload_peak_bytes for piece in pieces_of(memory, times)) * 2
    words = choose_for_units(memory, times, 4, tight, DISK)
    assert words is not None
    assert Activations.OFFLOAD_DISK in words
    assert Activations.OFFLOAD_DISK not in (choose_for_units(memory, times, 4, tight) or ())


def test_fresh_pages_take_their_time_for_what_a_unit_makes() -> None:
    memory, times = profile(4000)
    assert all(unit.forward.fresh.paged_bytes and unit.forward.fresh.huge_bytes for unit in memory.units[:-1])

    def seconds_of(fresh: Fresh) -> float:
        return fresh.paged_bytes * 1e-9 + fresh.huge_bytes * 1e-10

    found = with_faults(times, memory, seconds_of)
    for unit, before, after in zip(memory.units, times.units, found.units, strict=True):
        assert after.forward_s == before.forward_s + seconds_of(unit.forward.fresh)
        assert after.backward_s == before.backward_s + seconds_of(unit.backward.fresh)
        assert after.recompute_s == before.recompute_s + seconds_of(unit.recompute_fresh)
        assert after.selective_s is None
    half = with_faults(times, memory, seconds_of, {("F", 1): 0.5, ("B", 1): 1.0})
    assert half.units[0] == times.units[0], "nothing of it is fresh"
    assert half.units[1].forward_s == times.units[1].forward_s + seconds_of(memory.units[1].forward.fresh) / 2
    assert half.units[1].backward_s == found.units[1].backward_s


def test_fresh_pages_that_were_timed_too_are_taken_off_again() -> None:
    memory, times = profile(4000)

    def seconds_of(fresh: Fresh) -> float:
        return fresh.paged_bytes * 1e-9 + fresh.huge_bytes * 1e-10

    assert with_faults(times, memory, seconds_of, has_faults=True) == times
    kept = with_faults(times, memory, seconds_of, {}, has_faults=True)
    assert kept.units[1].forward_s == times.units[1].forward_s - seconds_of(memory.units[1].forward.fresh)
    much = with_faults(times, memory, lambda fresh: 100.0, {}, has_faults=True)
    assert all(unit.forward_s == 0.5 for unit in much.units), "half is left at least"


def test_a_twice_as_fast_disk() -> None:
    twice = DISK.scaled(2.0)
    assert [each.bytes_per_s for each in (twice.read, twice.write, twice.save)] == [2e9, 4e9, 4e9]
    assert twice.read.latency_s == DISK.read.latency_s
    assert twice.both_capacity == DISK.both_capacity
