"""Transports between real processes: both give the bits of the sum in rank order, and storage that keeps its word."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_outcomes, run_ranks

from outgrow.parallel import collectives
from outgrow.parallel.collectives import MessageTransport, SharedMemoryTransport, Transport, open_transport
from outgrow.parallel.sharding import shard_range

KINDS = pytest.mark.parametrize("kind", ["shared-memory", "gloo"])
RANKS = pytest.mark.parametrize("num_ranks", [2, 3])
NUM_ELEMS = 6 * 1000
FLAGS = [[1, 0, 0, 1], [0, 0, 0, 1], [0, 1, 0, 1]]  # by rank: which parameters have a gradient


def gradient(rank: int, number: int, num_elems: int = NUM_ELEMS, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * number + rank)
    scale = 10.0 ** torch.randint(-3, 4, (num_elems,), generator=generator)
    return (torch.randn(num_elems, generator=generator) * scale).to(dtype)


def reference(num_ranks: int, numbers: list[int], num_elems: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The sums of the reductions in `numbers`, each in rank order, added up in their order."""
    out = torch.zeros(num_elems)
    for place, number in enumerate(numbers):
        total = gradient(0, number, num_elems, dtype).float()
        for rank in range(1, num_ranks):
            total = total + gradient(rank, number, num_elems, dtype).float()
        out = total if place == 0 else out + total
    return out


def packer(rank: int, number: int, num_elems: int, dtype: torch.dtype = torch.float32) -> Any:
    def pack(flat: torch.Tensor, flags: torch.Tensor) -> None:
        assert flat.shape == (num_elems,)
        assert flat.dtype is dtype
        flat.copy_(gradient(rank, number, num_elems, dtype))
        flags.copy_(torch.tensor(FLAGS[rank][: flags.numel()], dtype=torch.uint8))

    return pack


def reduce_twice(rank: int, kind: str, dtype: torch.dtype) -> dict[str, Any]:
    transport = open_transport(kind=kind)
    transport.prepare_reduce(NUM_ELEMS, dtype, 4)
    results: dict[str, Any] = {"name": transport.name, "rank": transport.rank, "size": transport.size}
    for whole in (True, False):
        out = torch.full((NUM_ELEMS if whole else NUM_ELEMS // transport.size,), float("nan"))
        squares = []
        for number, accumulate in ((1, False), (2, True)):
            square, flags = transport.reduce(
                packer(rank, number, NUM_ELEMS, dtype), NUM_ELEMS, 4, out, whole, accumulate
            )
            squares.append(square)
        results[f"out {whole}"], results[f"squares {whole}"], results[f"flags {whole}"] = out, squares, flags.tolist()
    small = torch.empty(12)  # of the same buffers, fewer elements and flags
    _, flags = transport.reduce(packer(rank, 3, 12, dtype), 12, 2, small, True, False)
    results["small"], results["small flags"] = small, flags.tolist()
    transport.close()
    return results


@RANKS
@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_have_the_bits_of_the_reference_whole_and_in_shards(num_ranks, kind, dtype):
    expected = reference(num_ranks, [1, 2], NUM_ELEMS, dtype)
    after_first = reference(num_ranks, [1], NUM_ELEMS, dtype)
    results = run_ranks(reduce_twice, num_ranks, kind, dtype)
    for rank, result in enumerate(results):
        assert (result["name"], result["rank"], result["size"]) == (kind, rank, num_ranks)
        start, stop = shard_range(NUM_ELEMS, num_ranks, rank)
        assert torch.equal(result["out True"], expected)
        assert torch.equal(result["out False"], expected[start:stop])
        assert torch.equal(result["small"], reference(num_ranks, [3], 12, dtype))
        for whole in (True, False):
            own = [float((total[start:stop].double() ** 2).sum()) for total in (after_first, expected)]
            assert result[f"squares {whole}"] == pytest.approx(own, rel=1e-4)
            assert result[f"flags {whole}"] == [1, 1 if num_ranks == 3 else 0, 0, 1]
        assert result["squares True"] == result["squares False"], "the norm of every ZeRO stage has the same bits"
        assert result["small flags"] == [1, 1 if num_ranks == 3 else 0]


def test_the_order_of_ranks_matters_to_these_gradients():
    backwards = sum((gradient(rank, 1) for rank in (2, 1, 0)), torch.zeros(()))
    assert not torch.equal(backwards, reference(3, [1], NUM_ELEMS))


def reduce_while_a_peer_is_slow(rank: int, folder: str) -> list[torch.Tensor]:
    """Rank 1 adds up reduction k only when rank 0 has written its gradients of reduction k + 1."""
    transport = open_transport(kind="shared-memory")
    transport.prepare_reduce(64, torch.float32, 1)
    real, count, last = collectives.sum_ranks, 0, 5

    def written(number: int) -> Path:
        return Path(folder) / f"written-{number}"

    def late_sum(*args: Any) -> float:
        while count < last and not written(count + 1).exists():
            os.sched_yield()
        return real(*args)

    if rank == 1:
        collectives.sum_ranks = late_sum
    results = []
    for number in range(last + 1):
        count = number

        def pack(flat: torch.Tensor, flags: torch.Tensor, number: int = number) -> None:
            flat.fill_(10.0**number * (rank + 1))
            flags.fill_(number % 2)
            if rank == 0:
                written(number).touch()

        out = torch.empty(64)
        _, flags = transport.reduce(pack, 64, 1, out, True, False)
        assert flags.item() == number % 2
        results.append(out)
    return results


def test_a_fast_rank_does_not_write_over_what_a_slow_one_still_reads(tmp_path):
    for results in run_ranks(reduce_while_a_peer_is_slow, 2, str(tmp_path)):
        assert [result.unique().tolist() for result in results] == [[3.0 * 10.0**number] for number in range(6)]


def one_rank_has_nothing(rank: int, kind: str) -> tuple[list[float], list[int]]:
    transport = open_transport(kind=kind)
    transport.prepare_reduce(64, torch.float32, 3)
    stale = torch.empty(64)
    transport.reduce(packer(rank, 1, 64), 64, 3, stale, True, False)
    transport.reduce(packer(rank, 1, 64), 64, 3, stale, True, False)  # both buffers hold old gradients now

    def pack(flat: torch.Tensor, flags: torch.Tensor) -> None:
        flat.fill_(0.0 if rank == 0 else 5.0)
        flags.copy_(torch.tensor([0, 0, 0] if rank == 0 else [0, 1, 0], dtype=torch.uint8))

    out = torch.empty(64)
    _, flags = transport.reduce(pack, 64, 3, out, True, False)
    return out.unique().tolist(), flags.tolist()


@KINDS
def test_a_rank_without_gradients_adds_nothing(kind):
    assert run_ranks(one_rank_has_nothing, 2, kind) == [([5.0], [0, 1, 0])] * 2


def keep_parameters(rank: int, kind: str, sharded: bool) -> dict[str, Any]:
    transport = open_transport(kind=kind)
    num_elems = 16 * 6
    store = transport.parameters(num_elems, torch.float32, sharded)
    other = transport.parameters(num_elems, torch.bfloat16, sharded)
    other.fill(torch.full((num_elems,), 7.0, dtype=torch.bfloat16))
    seen: dict[str, Any] = {"range": (store.start, store.stop), "kind": type(store).__name__}
    seen["held at first"] = store.held_bytes
    store.fill(torch.arange(num_elems, dtype=torch.float32))
    transport.gather_rows([0.0])
    store.gather()
    seen["filled"] = store.full.clone() if store.full is not None else None
    seen["held gathered"] = store.held_bytes
    transport.gather_rows([0.0])
    store.shard.add_(1000.0 * (rank + 1))  # an update
    transport.gather_rows([0.0])
    store.drop()
    seen["dropped"] = store.full is None
    seen["held dropped"] = store.held_bytes
    store.gather()
    seen["updated"] = store.full.clone() if store.full is not None else None
    store.drop()
    store.drop()
    transport.gather_rows([0.0])
    store.gather()
    store.gather()
    seen["again"] = store.full.clone() if store.full is not None else None
    other.gather()
    seen["other"] = other.full.unique().tolist() if other.full is not None else None
    seen["all gathered"] = transport.all_gather(store.shard)
    transport.gather_rows([0.0])
    return seen


@RANKS
@pytest.mark.parametrize(
    ("kind", "sharded", "store", "droppable"),
    [
        ("shared-memory", True, "CommonParameters", False),
        ("shared-memory", False, "WindowParameters", False),
        ("gloo", True, "GatheredParameters", True),
        ("gloo", False, "GatheredParameters", False),
    ],
)
def test_parameters_are_gathered_from_their_owners(num_ranks, kind, sharded, store, droppable):
    results = run_ranks(keep_parameters, num_ranks, kind, sharded)
    filled = torch.arange(96, dtype=torch.float32)
    updated = filled + 1000 * torch.arange(1, num_ranks + 1).repeat_interleave(96 // num_ranks)
    shard_bytes, full_bytes = 96 * 4 // num_ranks, 96 * 4
    for rank, seen in enumerate(results):
        assert seen["kind"] == store
        assert seen["range"] == shard_range(96, num_ranks, rank)
        assert torch.equal(seen["filled"], filled)
        assert torch.equal(seen["updated"], updated)
        assert torch.equal(seen["again"], updated)
        assert torch.equal(seen["all gathered"], updated)
        assert seen["other"] == [7.0]
        assert seen["dropped"] is droppable
        small = shard_bytes if sharded else full_bytes
        assert seen["held at first"] == seen["held dropped"] == small
        assert seen["held gathered"] == (shard_bytes + full_bytes if droppable else small)


def gather_around_reductions(rank: int, kind: str, buffer_elems: int) -> tuple[int, list[list[float]]]:
    transport = open_transport(kind=kind)
    transport.prepare_reduce(buffer_elems, torch.float32, 4)
    found, sent = [], []
    by_messages = Transport.gather_into

    def counted(self: Transport, full: torch.Tensor, shard: torch.Tensor) -> None:
        sent.append(full)
        by_messages(self, full, shard)

    Transport.gather_into = counted
    for number, dtype in enumerate((torch.float32, torch.bfloat16, torch.float32)):
        full = torch.zeros(12 * transport.size, dtype=dtype)
        transport.gather_into(full, torch.full((12,), 10.0 * number + rank, dtype=dtype))
        found.append(full.tolist())
        out = torch.empty(6 // transport.size)
        transport.reduce(packer(rank, number, 6), 6, 4, out, whole=False, accumulate=False)
        start, stop = shard_range(6, transport.size, rank)
        assert torch.equal(out, reference(transport.size, [number], 6)[start:stop]), "a gather does not get in its way"
    return len(sent), found


@RANKS
@pytest.mark.parametrize(
    ("kind", "buffer_elems", "num_sent"), [("shared-memory", 600, 0), ("shared-memory", 6, 3), ("gloo", 600, 3)]
)
def test_shards_are_gathered_among_reductions_through_the_same_buffers_or_without(
    num_ranks, kind, buffer_elems, num_sent
):
    expected = [[10.0 * number + owner for owner in range(num_ranks) for _ in range(12)] for number in range(3)]
    assert run_ranks(gather_around_reductions, num_ranks, kind, buffer_elems) == [(num_sent, expected)] * num_ranks


def talk(rank: int, kind: str) -> tuple[list[list[float]], list[float], int]:
    transport = open_transport(kind=kind)
    rows = transport.gather_rows([float(rank), rank + 0.1]).tolist()
    value = transport.broadcast(torch.full((3,), float(rank + 5)))
    transport.prepare_reduce(100, torch.float32, 70)
    return rows, value.tolist(), transport.buffer_bytes


@KINDS
def test_rows_broadcasts_and_what_buffers_count(kind):
    expected = 2 * 100 * 4 if kind == "shared-memory" else 0
    assert run_ranks(talk, 2, kind) == [([[0.0, 0.1], [1.0, 1.1]], [5.0, 5.0, 5.0], expected)] * 2


def choose(rank: int, seconds: dict[str, float]) -> str:
    collectives._reduce_seconds = lambda transport, **_: seconds[transport.name]
    return open_transport().name


@pytest.mark.parametrize("faster", ["shared-memory", "gloo"])
def test_the_faster_transport_is_chosen(faster):
    seconds = {"shared-memory": 2.0, "gloo": 2.0} | {faster: 0.9}
    assert run_ranks(choose, 2, seconds) == [faster] * 2


def measure(rank: int) -> tuple[str, float, float]:
    name = open_transport().name
    shared, message = (open_transport(kind=kind) for kind in ("shared-memory", "gloo"))
    return name, collectives._reduce_seconds(shared, 4096), collectives._reduce_seconds(message, 4096)


def test_a_measurement_is_the_same_on_every_rank():
    first, second = run_ranks(measure, 2)
    assert first == second
    assert first[0] in ("shared-memory", "gloo")
    assert min(first[1:]) > 0


def ask_for(rank: int, kind: str | None, shares: bool) -> str:
    if not shares:
        collectives.can_share = lambda _group: False
    transport = open_transport(kind=kind)
    transport.gather_rows([0.0])  # nobody leaves before all are connected
    return transport.name


@pytest.mark.parametrize(
    ("kind", "shares", "message"),
    [
        ("nccl", True, "transport 'nccl': there is shared-memory and gloo"),
        ("shared-memory", False, "the ranks cannot open each other's memory; use transport='gloo'"),
    ],
)
def test_a_transport_that_cannot_be_is_refused(kind, shares, message):
    with pytest.raises(ValueError, match=message):
        run_ranks(ask_for, 2, kind, shares)


def test_where_memory_cannot_be_shared_messages_are_sent():
    assert run_ranks(ask_for, 2, None, False) == ["gloo", "gloo"]


def die_before_reducing(rank: int, kind: str) -> None:
    transport = open_transport(kind=kind)
    transport.prepare_reduce(64, torch.float32, 1)
    transport.gather_rows([0.0])  # all are connected
    if rank == 1:
        os._exit(7)
    transport.reduce(packer(rank, 1, 64), 64, 1, torch.empty(64), True, False)


@KINDS
def test_when_a_peer_dies_the_others_fail_and_do_not_hang(kind):
    first, second, third = run_outcomes(die_before_reducing, 3, kind, timeout_s=60)
    assert str(second) == "rank 1 ended without a result, exit code 7"
    for outcome in (first, third):
        assert isinstance(outcome, RuntimeError)
        assert not isinstance(outcome, TimeoutError)
        assert "ended without a result" not in str(outcome)


def leave(rank: int, kind: str) -> list[str]:
    transport = open_transport(kind=kind)
    store = transport.parameters(600, torch.float32, True)
    transport.prepare_reduce(600, torch.float32, 4)
    transport.reduce(packer(rank, 1, 600), 600, 4, torch.empty(600), True, False)
    maps = Path("/proc/self/maps").read_text()
    transport.close()
    assert store.shard.numel() == 300
    return [name for name in ("/dev/shm/", "memfd:outgrow") if name in maps]


@pytest.mark.parametrize(("kind", "mapped"), [("shared-memory", ["memfd:outgrow"]), ("gloo", [])])
def test_shared_memory_has_no_name_that_could_stay_behind(kind, mapped):
    assert run_ranks(leave, 2, kind) == [mapped] * 2


def test_every_transport_has_a_name_of_its_own():
    assert {SharedMemoryTransport.name, MessageTransport.name} == {"shared-memory", "gloo"}
    assert all(issubclass(kind, Transport) for kind in (SharedMemoryTransport, MessageTransport))
