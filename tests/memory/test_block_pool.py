"""Blocks serve again, never while someone looks at them, and never beyond the bound."""

import torch

from outgrow.memory.block_pool import BlockPool


def test_a_block_that_was_given_back_serves_the_next_of_its_size() -> None:
    pool = BlockPool(limit_bytes=400)
    first = pool.take(100, torch.float32)
    address = first.data_ptr()
    pool.give(first)
    del first
    assert pool.free_bytes == 400
    assert pool.take(100, torch.float32).data_ptr() == address
    assert pool.free_bytes == 0


def test_a_block_of_which_someone_still_has_a_view_keeps_its_values() -> None:
    pool = BlockPool(limit_bytes=800)
    first = pool.take(100, torch.float32).fill_(3.0)
    view = first[10:20]
    pool.give(first)
    del first
    second = pool.take(100, torch.float32).fill_(5.0)
    assert view.tolist() == [3.0] * 10
    address = view.data_ptr() - 40
    del view
    pool.give(second)
    assert {pool.take(100, torch.float32).data_ptr() for _ in range(1)} == {address}


def test_whoever_has_the_tensor_itself_keeps_its_values_too() -> None:
    pool = BlockPool(limit_bytes=800)
    first = pool.take(100, torch.float32).fill_(3.0)
    pool.give(first)
    pool.take(100, torch.float32).fill_(5.0)
    assert first.tolist() == [3.0] * 100


def test_nothing_is_kept_beyond_the_bound() -> None:
    pool = BlockPool(limit_bytes=1000)
    blocks = [pool.take(size, torch.float32) for size in (100, 120)]
    for block in blocks:
        pool.give(block)
    del blocks, block
    assert pool.free_bytes == 880
    other = pool.take(130, torch.float32)  # 520 bytes: the older of both goes
    assert pool.free_bytes == 480
    pool.give(other)
    assert pool.free_bytes == 1000
    pool.take(100, torch.bfloat16)
    assert pool.free_bytes == 520


def test_without_a_bound_of_its_own_nothing_is_kept() -> None:
    pool = BlockPool()
    pool.give(pool.take(100, torch.float32))
    assert pool.free_bytes == 0


def test_what_was_not_taken_is_left_alone() -> None:
    pool = BlockPool(limit_bytes=1000)
    pool.give(torch.ones(10))
    assert pool.free_bytes == 0
    pool.give(pool.take(0, torch.float32))
    assert pool.take(0, torch.float32).numel() == 0
