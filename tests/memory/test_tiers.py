"""Arenas of the host and of a device apart from it, and copies between the two."""

import pytest
import torch

from outgrow.memory.direct_io import ALIGN_BYTES
from outgrow.memory.process import read_process_memory
from outgrow.memory.tiers import CudaDevice, HostTier, SimulatedDevice, Tiers, open_tiers

PLACES = {"c0:param": (0, 8192), "c1:param": (8192, 4096), "a0.0": (4096, 8192)}


@pytest.fixture(params=[HostTier, SimulatedDevice])
def tier(request: pytest.FixtureRequest) -> HostTier | SimulatedDevice:
    return request.param()


def test_buffers_lie_where_they_are_placed_in_an_arena_of_exact_size(tier: HostTier | SimulatedDevice) -> None:
    tier.lay_out(PLACES)
    assert tier.arena_bytes == 12288
    first, second, across = (tier.buffer(name) for name in PLACES)
    assert [buffer.numel() for buffer in (first, second, across)] == [8192, 4096, 8192]
    assert first.data_ptr() % ALIGN_BYTES == 0
    assert second.data_ptr() - first.data_ptr() == 8192
    across.fill_(7)
    assert first[4095] == 0
    assert first[4096] == second[0] == second[4095] == 7, "they share bytes, as they were told to"
    tier.close()


def test_a_buffers_storage_is_its_own_so_that_a_view_tells_whose_bytes_it_sees(
    tier: HostTier | SimulatedDevice,
) -> None:
    tier.lay_out(PLACES)
    addresses = {tier.buffer(name).untyped_storage().data_ptr() for name in PLACES}
    assert len(addresses) == len(PLACES)
    view = tier.buffer("c1:param").view(torch.float32)[16:]
    assert view.untyped_storage().data_ptr() == tier.buffer("c1:param").data_ptr()
    tier.close()


def test_another_layout_takes_the_place_of_the_first(tier: HostTier | SimulatedDevice) -> None:
    tier.lay_out(PLACES)
    kept = tier.buffer("c0:param")
    tier.lay_out({"c0:param": (0, 4096)})
    assert tier.arena_bytes == tier.buffer("c0:param").numel() == 4096
    kept.fill_(1)  # its memory lives as long as somebody looks at it
    assert tier.buffer("c0:param").sum() == 0
    tier.lay_out({})
    assert tier.arena_bytes == 0
    with pytest.raises(KeyError):
        tier.buffer("c0:param")
    tier.close()
    tier.close()


def test_what_is_brought_is_a_copy() -> None:
    device = SimulatedDevice()
    value = torch.arange(6).view(2, 3)
    brought = device.bring(value)
    assert torch.equal(brought, value)
    assert brought.device == device.device
    assert brought.untyped_storage().data_ptr() != value.untyped_storage().data_ptr()
    assert device.empty(5, torch.bfloat16).shape == (5,)


def test_what_is_brought_lies_at_the_same_place_within_a_cache_line() -> None:
    whole = torch.arange(240, dtype=torch.float32).view(24, 2, 5)
    for tensor in (whole[3:7], whole[5:], whole[1:4].transpose(0, 2), whole.long()[7:9], torch.tensor(3.0)):
        brought = SimulatedDevice().bring(tensor)
        assert torch.equal(brought, tensor)
        assert brought.stride() == torch.empty_like(tensor).stride()
        assert brought.data_ptr() % 64 == tensor.data_ptr() % 64
        assert brought.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
    assert SimulatedDevice().bring(torch.empty(0, 3)).shape == (0, 3)


def test_copies_are_done_when_their_context_is_left() -> None:
    tiers = Tiers(HostTier(), SimulatedDevice())
    tiers.host.lay_out({"c0:param": (0, 4096)})
    tiers.device.lay_out({"c0:device": (0, 4096)})
    tiers.host.buffer("c0:param").copy_(torch.arange(4096) % 251)
    tiers.device.computed()
    with tiers.device.copying():
        tiers.device.buffer("c0:device").copy_(tiers.host.buffer("c0:param"), non_blocking=True)
    assert torch.equal(tiers.device.buffer("c0:device"), tiers.host.buffer("c0:param"))
    tiers.close()


def test_a_machine_without_an_accelerator_plays_one() -> None:
    assert not torch.cuda.is_available(), "these tests are for machines without one"
    tiers = open_tiers()
    assert isinstance(tiers.device, SimulatedDevice)
    assert tiers.host.empty(3, torch.float32).shape == (3,)
    tiers.close()
    with pytest.raises(ValueError, match="there is no CUDA device"):
        CudaDevice()


@pytest.mark.parametrize("takes_pages", [False, True])
def test_an_arenas_pages_are_taken_at_their_first_uses_or_at_once(takes_pages: bool) -> None:
    tier, num_bytes = HostTier(), 64 << 20
    before = read_process_memory().resident_bytes
    tier.lay_out({"c0:param": (0, num_bytes)}, takes_pages)
    grown = read_process_memory().resident_bytes - before
    assert (grown > num_bytes // 2) == takes_pages
    assert tier.buffer("c0:param").sum() == 0
    tier.close()
