"""A shard at home on another tier: it is there between attach and detach, and gathering copies it."""

import pytest
import torch

from outgrow.parallel.placement import GatheredParameters, LocalParameters, OffloadedParameters, UploadedParameters

FIRST = torch.arange(4, dtype=torch.float32)
OTHER = FIRST + 10


def all_gather(full: torch.Tensor, shard: torch.Tensor) -> None:
    """What two ranks would do, of which this one is the second."""
    full.copy_(torch.cat([OTHER, shard]))


def test_on_one_rank_the_attached_buffer_is_the_full_chunk() -> None:
    store = OffloadedParameters(8, torch.float32)
    assert (store.start, store.stop, store.gathers) == (0, 8, False)
    assert not store.is_attached
    assert store.full is None
    assert store.held_bytes == 0
    buffer = torch.zeros(8)
    store.attach(buffer)
    assert store.is_attached
    assert store.full is buffer
    assert store.held_bytes == 32
    store.gather()
    store.drop()
    assert store.full is buffer, "there is no copy to make or to forget"
    store.fill(torch.ones(8))
    assert buffer.tolist() == [1] * 8
    store.detach()
    assert (store.is_attached, store.full, store.held_bytes) == (False, None, 0)
    assert store.shard.numel() == 0


def test_on_several_ranks_a_copy_is_made_of_the_shard_and_outlives_it() -> None:
    store = OffloadedParameters(8, torch.float32, 2, 1, all_gather)
    assert (store.start, store.stop, store.gathers) == (4, 8, True)
    with pytest.raises(AssertionError, match="not in memory"):
        store.gather()
    store.attach(FIRST.clone())
    assert store.full is None, "a shard is no full chunk"
    store.gather()
    full = store.full
    assert full is not None
    assert full.tolist() == [*OTHER.tolist(), *FIRST.tolist()]
    assert store.held_bytes == 16 + 32
    store.detach()
    assert store.full is full
    assert store.held_bytes == 32
    store.attach(FIRST * 2)
    store.gather()
    assert store.full is full, "the same memory again"
    assert full[4:].tolist() == (FIRST * 2).tolist()
    store.drop()
    assert store.full is None
    store.fill(torch.arange(8, dtype=torch.float32))
    assert store.shard.tolist() == [4, 5, 6, 7]


def test_what_is_computed_with_is_the_copy_on_the_device() -> None:
    store = UploadedParameters(8, torch.float32)
    assert (store.moves, store.comes_and_goes, store.computes_with_shard) == (True, True, False)
    store.settle(torch.arange(8, dtype=torch.float32))
    assert (store.moves, store.is_attached, store.is_up) == (False, True, False)
    assert store.full is None
    assert store.held_bytes == 32
    copy = store.shard.clone()
    store.bring(copy)
    assert store.full is copy
    assert store.held_bytes == 64
    store.shard.mul_(2)
    assert store.full.tolist() == list(range(8)), "another memory"
    store.forget()
    assert store.full is None
    assert store.shard.tolist() == list(range(0, 16, 2))
    with pytest.raises(AssertionError):
        store.bring(torch.zeros(4))


def test_several_ranks_gather_from_the_copies_on_their_devices() -> None:
    store = UploadedParameters(8, torch.float32, 2, 1, all_gather)
    store.settle(FIRST.clone())
    with pytest.raises(AssertionError, match="not in memory"):
        store.gather()
    store.bring(FIRST * 3)
    store.gather()
    store.forget()
    full = store.full
    assert full is not None
    assert full.tolist() == [*OTHER.tolist(), *(FIRST * 3).tolist()], "a gathered copy outlives it"
    store.drop()
    assert store.full is None


def test_a_buffer_of_another_size_or_kind_is_our_own_mistake() -> None:
    store = OffloadedParameters(8, torch.bfloat16, 2, 0, all_gather)
    for buffer in (torch.zeros(8, dtype=torch.bfloat16), torch.zeros(4)):
        with pytest.raises(AssertionError):
            store.attach(buffer)
        assert not store.is_attached


def test_an_empty_shard_can_be_attached() -> None:
    store = OffloadedParameters(0, torch.float32)
    store.attach(torch.zeros(4)[:0])
    assert store.is_attached


def test_local_parameters_are_always_there() -> None:
    store = LocalParameters(FIRST.clone())
    store.gather()
    store.drop()
    assert store.full is store.shard
    store.fill(OTHER)
    assert store.full.tolist() == OTHER.tolist()


@pytest.mark.parametrize("droppable", [True, False])
def test_gathered_parameters_keep_their_shard(droppable: bool) -> None:
    store = GatheredParameters(8, torch.float32, 2, 1, all_gather, droppable)
    store.fill(torch.cat([OTHER, FIRST]))
    assert store.shard.tolist() == FIRST.tolist()
    store.gather()
    assert store.full is not None
    assert store.full.tolist() == [*OTHER.tolist(), *FIRST.tolist()]
    store.drop()
    assert (store.full is None) is droppable
    assert store.held_bytes == (16 if droppable else 32)
