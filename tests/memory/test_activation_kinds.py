"""Which tensors the activation store moves, and that every kind comes back as it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from saving import Keeper, away_and_back, staging_of, through
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from outgrow.memory.activations import ALIGN_BYTES, ActivationStore


def kinds() -> dict[str, Callable[[], torch.Tensor]]:
    base = torch.randn(40, 30, generator=torch.Generator().manual_seed(3))
    return {
        "plain": lambda: base.clone(),
        "transposed": lambda: base.clone().t(),
        "offset": lambda: base.clone()[7:, 3:],
        "gaps": lambda: base.clone()[::3, 1::2],
        "view of a view": lambda: base.clone()[5:].t()[2:, ::2].unsqueeze(1),
        "expanded": lambda: base.clone()[:1].expand(50, 30),
        "expanded to nothing": lambda: base.clone()[:1].expand(0, 30),
        "one number expanded": lambda: base.clone()[3, 4].expand(50, 30),
        "overlapping": lambda: base.clone().as_strided((100, 20), (3, 1), 17),
        "scalar of a large storage": lambda: base.clone()[20, 20],
        "empty": lambda: torch.empty(0, 5),
        "empty view": lambda: base.clone()[:, :0],
        "small": lambda: base[:2, :3].clone(),
        "double": lambda: base.double(),
        "half": lambda: base.half()[1:],
        "bfloat16": lambda: base.bfloat16()[:, 1:],
        "float8": lambda: base.to(torch.float8_e4m3fn)[3:],
        "int64": lambda: (base * 100).long(),
        "uint8": lambda: (base * 100).to(torch.uint8)[:, 1:],
        "bool": lambda: (base > 0)[1:, 1:],
        "complex": lambda: torch.complex(base, base.flip(0)),
        "conjugated": lambda: torch.complex(base, base.flip(0))[2:].conj(),
        "negated": lambda: torch.complex(base, base.flip(0)).conj().imag,
        "conjugated and negated": lambda: torch._neg_view(torch.complex(base, base).conj()),
        "real part": lambda: torch.complex(base, base.flip(0)).real,
        "other dtype": lambda: base.clone().view(torch.int32)[4:],
        "channels last": lambda: torch.randn(2, 5, 8, 8).to(memory_format=torch.channels_last),
        "channels last, 3-D": lambda: torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
        "sparse": lambda: base.clone().relu().to_sparse(),
        "on meta": lambda: torch.empty(50, 50, device="meta"),
    }


def plain_bytes(tensor: torch.Tensor) -> torch.Tensor:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    return flat.view(tensor.shape).copy_(tensor).view(-1).view(torch.uint8)


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_of_tensor_comes_back_as_it_was(kind: str) -> None:
    store = ActivationStore()
    tensor = kinds()[kind]()
    # The values in a tensor of its own, not in the storage that is let go.
    expected = tensor.clone() if tensor.layout is not torch.strided else tensor.resolve_conj().resolve_neg().clone()
    shape, stride = tensor.shape, () if tensor.layout is torch.sparse_coo else tensor.stride()
    (back,) = through(store, tensor)
    assert back.shape == shape
    assert back.dtype is expected.dtype
    assert back.layout is expected.layout
    assert back.device == expected.device
    if back.is_sparse:
        assert torch.equal(back.to_dense(), expected.to_dense())
    elif not back.is_meta:
        assert kind.startswith("conjugated") or back.stride() == stride
        bits = [plain_bytes(t) for t in (back, expected)]
        assert torch.equal(*bits)


def test_conjugates_and_negatives_come_back_as_views() -> None:
    store = ActivationStore()
    value = torch.randn(200, dtype=torch.complex64)
    x = torch.zeros(2, requires_grad=True)
    flags: list[tuple[bool, bool, tuple[int, ...]]] = []

    class Flags(Keeper):
        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
            flags.extend((t.is_conj(), t.is_neg(), t.stride()) for t in ctx.saved_tensors)
            return (*gradients, None, None, None, None)

    with store.hooks(0, 0):
        y = Flags.apply(x, [], value, value.conj(), value.conj().imag)
    assert store.bytes_needed(0, 0) == 1600
    away_and_back(store)
    y.sum().backward()
    assert flags == [(False, False, (1,)), (True, False, (1,)), (False, True, (2,))]


def test_a_storage_is_stored_once_and_only_what_was_saved_of_it() -> None:
    store = ActivationStore()
    whole = torch.arange(5000.0)
    (first, second, third) = through(store, whole[1000:1500], whole[1200:1600], whole[1200:1600].view(20, 20).t())
    assert torch.equal(first, whole[1000:1500])
    assert torch.equal(second, whole[1200:1600])
    assert torch.equal(third, whole[1200:1600].view(20, 20).t())
    assert first.untyped_storage()._cdata == second.untyped_storage()._cdata == third.untyped_storage()._cdata
    assert store.statistics().here_bytes == 600 * 4 + (1000 * 4) % ALIGN_BYTES
    assert second.data_ptr() - first.data_ptr() == 200 * 4
    store.clear()


def test_the_first_and_the_last_byte_may_come_from_any_of_the_views() -> None:
    store = ActivationStore()
    whole = torch.arange(5000.0)
    starts = (1700, 1000, 2900, 1300, 2300, 1100, 2000)
    views = through(store, *[whole[start : start + 100] for start in starts])
    assert all(torch.equal(view, whole[start : start + 100]) for view, start in zip(views, starts, strict=True))
    assert store.statistics().here_bytes == 2000 * 4 + (1000 * 4) % ALIGN_BYTES


def test_an_empty_view_does_not_keep_its_storage() -> None:
    store = ActivationStore()
    storage = torch.randn(5000)
    reference = StorageWeakRef(storage.untyped_storage())
    with store.hooks(0, 0):
        y = Keeper.apply(torch.zeros(2, requires_grad=True), [], storage[:0], storage.view(50, 100)[:, :0])
    assert store.bytes_needed(0, 0) == 0
    del storage
    assert reference.expired()
    y.sum().backward()


def test_every_tensor_keeps_its_alignment() -> None:
    """Kernels may round differently for another alignment; results are to be bit-exact."""
    store = ActivationStore()
    tensors = [torch.randn(1000)[offset:] for offset in (0, 1, 3, 7, 16, 17)]
    addresses = [tensor.data_ptr() % ALIGN_BYTES for tensor in tensors]
    assert addresses == [0, 4, 12, 28, 0, 4]
    assert [back.data_ptr() % ALIGN_BYTES for back in through(store, *tensors)] == addresses


def test_leaves_parameters_small_tensors_and_subclasses_stay_as_they_are() -> None:
    class Sub(torch.Tensor):
        pass

    store = ActivationStore()
    leaf = torch.randn(1000, requires_grad=True)
    frozen = nn.Parameter(torch.randn(1000), requires_grad=False)
    seen = []
    with store.hooks(0, 0):
        sub = torch.randn(1000).as_subclass(Sub)
        y = (leaf * frozen).sum() + Keeper.apply(torch.zeros(2, requires_grad=True), seen, torch.ones(255), sub).sum()
    assert store.bytes_needed(0, 0) == 0
    frozen.data = frozen.data * 2  # found where it is then, as plain autograd does
    assert store.save(0, 0, staging_of(0)) == 0
    store.load(0, 0, staging_of(0))
    y.backward()
    assert torch.equal(leaf.grad, frozen)
    assert seen[1].untyped_storage()._cdata == sub.untyped_storage()._cdata
    store.release(0, 0)


def test_the_threshold_counts_storages_not_views() -> None:
    """A small view would keep its large storage alive."""
    store = ActivationStore(threshold_bytes=4096)
    with store.hooks(0, 0):
        y = Keeper.apply(torch.zeros(2, requires_grad=True), [], torch.randn(1024)[:2], torch.randn(1023))
    assert store.bytes_needed(0, 0) == 8
    del y


def test_tensors_that_live_elsewhere_are_found_there() -> None:
    home = torch.randn(1000)
    asked = []

    def elsewhere(tensor: torch.Tensor) -> Callable[[], torch.Tensor] | None:
        if tensor.untyped_storage()._cdata != home.untyped_storage()._cdata:
            return None
        return lambda: asked.append(tensor.shape) or home

    x = torch.randn(1000, requires_grad=True)
    store = ActivationStore(elsewhere=elsewhere)
    with store.hooks(0, 0):
        y = (x * home).sum()
    assert store.bytes_needed(0, 0) == 0
    y.backward()
    assert torch.equal(x.grad, home)
    assert asked == [torch.Size([1000])]
