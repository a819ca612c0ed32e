"""READ, WRITE and DROP of a chunk's slots on one rank: where parameters, masters and optimizer slots are found then."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from lanes import act
from torch import nn

from outgrow.memory.chunk import ChunkLayout, layout_chunk
from outgrow.parallel.placement import LocalParameters, OffloadedParameters
from outgrow.runtime.chunk_state import ChunkState, OptimLayout, OwnedPiece
from outgrow.runtime.disk_tier import DiskTier
from outgrow.runtime.offload import OffloadedState, optim_layouts, state_extents
from outgrow.runtime.optimizer import PiecewiseOptimizer
from outgrow.scheduler.plan import ChunkPlan, GatheredFor, Home, Plan, plan_for_zero
from outgrow.scheduler.program import Buffer, Program

PAGE = 4096
SLOTS = {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}


def layouts(dtype: torch.dtype = torch.float32, num_elems: int = 16) -> list[ChunkLayout]:
    return [layout_chunk(i, f"u{i}", [(f"p{i}", torch.empty(num_elems))], dtype, i != 2) for i in range(3)]


def plan(*chunks: ChunkPlan, ranks: int = 1) -> Plan:
    return replace(plan_for_zero(layouts(), 0, ranks), chunks=chunks, world_size=ranks)


BOTH = ChunkPlan(parameter_home=Home.DISK, optimizer_home=Home.DISK)
SLOTS_ONLY = ChunkPlan(optimizer_home=Home.DISK)
SHARDED = ChunkPlan(GatheredFor.USE, True, True, Home.DISK, Home.DISK)
ORIGINALS = {f"p{i}": torch.float32 for i in range(3)}


# ---- what lies where


def test_optimizer_slots_lie_one_after_the_other_each_from_a_page_on() -> None:
    layout = OptimLayout(1500, {"master": torch.float32, "exp_avg": torch.bfloat16})
    assert layout.num_bytes == 2 * PAGE + PAGE
    buffer = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    views = layout.views(buffer)
    assert {name: (view.dtype, view.numel()) for name, view in views.items()} == {
        "master": (torch.float32, 1500),
        "exp_avg": (torch.bfloat16, 1500),
    }
    assert [view.data_ptr() - buffer.data_ptr() for view in views.values()] == [0, 2 * PAGE]


def test_only_what_is_at_home_on_disk_has_room_there() -> None:
    made = optim_layouts(layouts(), plan(BOTH, ChunkPlan(), BOTH), SLOTS, ORIGINALS)
    assert made == [OptimLayout(16, SLOTS), None, None], "the third is frozen"
    assert state_extents(layouts(), plan(BOTH, SLOTS_ONLY, BOTH), made) == {
        "c0:param": 64,
        "c0:optim": 2 * PAGE,
        "c2:param": 64,
    }


def test_masters_lie_first_and_frozen_ones_too() -> None:
    low = layouts(torch.bfloat16)
    made = optim_layouts(low, plan(BOTH, SLOTS_ONLY, BOTH), SLOTS, ORIGINALS)
    assert [list(each.dtypes) for each in made if each] == [
        ["master", "exp_avg", "exp_avg_sq"],
        ["master", "exp_avg", "exp_avg_sq"],
        ["master"],
    ]
    assert state_extents(low, plan(BOTH, SLOTS_ONLY, BOTH), made)["c0:param"] == low[0].num_bytes


def test_ranks_keep_their_part_alone() -> None:
    made = optim_layouts(layouts(), plan(SHARDED, SHARDED, SHARDED, ranks=2), SLOTS, ORIGINALS)
    assert made[0] == OptimLayout(8, SLOTS)
    assert state_extents(layouts(), plan(SHARDED, SHARDED, SHARDED, ranks=2), made)["c0:param"] == 32


def test_an_optimizer_without_slots_has_nothing_there() -> None:
    assert optim_layouts(layouts(), plan(BOTH, BOTH, BOTH), {}, ORIGINALS) == [None] * 3


# ---- moves

ADAGRAD = partial(torch.optim.Adagrad, lr=0.1, initial_accumulator_value=0.25)
ADAM = partial(torch.optim.Adam, lr=0.1)


class One:
    """One chunk of 16 elements, with everything on disk."""

    def __init__(self, folder: Path, factory: object, with_master: bool = False) -> None:
        self.parameter = nn.Parameter(torch.zeros(16))
        self.optimizer = PiecewiseOptimizer(factory, {"p0": self.parameter})  # pyright: ignore[reportArgumentType]
        dtype = torch.bfloat16 if with_master else torch.float32
        slots = self.optimizer.slots
        self.optim = OptimLayout(16, ({"master": torch.float32} if with_master else {}) | slots)
        self.tier = DiskTier(str(folder), "run", 0, {"c0:param": 64, "c0:optim": self.optim.num_bytes})
        self.tier.lay_out(
            Program((), (Buffer("c0:param", "host", 0, PAGE), Buffer("c0:optim", "host", PAGE, self.optim.num_bytes)))
        )
        layout = layout_chunk(0, "u0", [("p0", self.parameter)], dtype, True)
        piece = OwnedPiece(0, torch.empty(0), 0, 16, 0)
        self.chunk = ChunkState(
            layout,
            OffloadedParameters(16, dtype),
            [self.parameter],
            has_master=with_master,
            pieces=[piece],
            optim=self.optim,
        )
        self.optimizer.place({"p0": [(0, piece.tensor)]})
        self.pointed: list[bool] = []
        self.state = OffloadedState(
            self.tier, self.optimizer, lambda chunk: self.pointed.append(chunk.store.full is not None)
        )
        self.first = torch.linspace(0, 1, 16)
        self.state.store(self.chunk, self.first)

    def do(self, *actions: str) -> None:
        for action in map(act, actions):
            handlers = {"READ": self.state.read, "WRITE": self.state.write, "DROP": self.state.drop}
            end = handlers[action.kind](self.chunk, action)
            if end is not None:
                end()

    def garbage(self) -> None:
        for name in ("c0:param", "c0:optim"):
            self.tier.buffer(name).fill_(255)

    def update(self, gradient: float) -> None:
        piece = self.chunk.pieces[0]
        base = self.chunk.master if self.chunk.has_master else self.chunk.store.shard
        assert base is not None
        piece.tensor.data = base
        piece.tensor.grad = torch.full((16,), gradient)
        self.optimizer.step(0)
        self.optimizer.move_into(piece.tensor, self.chunk.slots_of(piece))
        piece.tensor.data = torch.empty(0)


@pytest.fixture(params=["adam", "adagrad", "adam master", "adagrad master"])
def one(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[One]:
    name, _, master = request.param.partition(" ")
    one = One(tmp_path, {"adam": ADAM, "adagrad": ADAGRAD}[name], bool(master))
    yield one
    one.tier.close()


def test_slots_go_and_come_with_the_bits_of_an_optimizer_that_keeps_them(one: One) -> None:
    master = one.chunk.has_master
    plain = nn.Parameter(one.first.clone())
    reference = type(one.optimizer.optimizer)([plain], **one.optimizer.optimizer.defaults)
    for step in range(4):
        one.garbage()
        one.do("READ c0:param", "READ c0:optim")
        assert one.pointed[-1] is True
        one.update(0.5 - 0.2 * step)
        if master:
            assert one.chunk.master is not None
            one.chunk.store.shard.copy_(one.chunk.master)
        one.do("WRITE c0:param", "WRITE c0:optim")
        plain.grad = torch.full((16,), 0.5 - 0.2 * step)
        reference.step()
    one.garbage()
    assert one.pointed[-1] is False
    assert one.chunk.master is None
    assert all(value.numel() <= 1 for value in one.optimizer.optimizer.state[one.chunk.pieces[0].tensor].values())
    with one.state.in_memory(one.chunk, with_master=True):
        assert one.chunk.store.full is not None
        found = one.chunk.master if master else one.chunk.store.full
        assert found is not None
        assert torch.equal(found, plain.detach())
        assert torch.equal(one.chunk.store.full, plain.detach().to(one.chunk.layout.dtype))
    assert one.chunk.store.full is None
    assert one.chunk.master is None


def test_a_dropped_slot_is_what_was_written_last(one: One) -> None:
    one.do("READ c0:param")
    one.chunk.store.shard.fill_(7)
    one.do("DROP c0:param", "READ c0:param")
    assert torch.equal(one.chunk.store.shard, one.first.to(one.chunk.layout.dtype))


def test_slots_that_were_begun_and_never_written_begin_again(one: One) -> None:
    """A step that fails before its first write leaves nothing behind."""
    for _ in range(2):
        one.garbage()
        one.do("READ c0:param", "READ c0:optim")
        one.state.drop_all(one.chunk)
        assert not one.chunk.store.full
        assert one.chunk.slots == {}
    one.do("READ c0:param", "WRITE c0:param")
    assert not one.chunk.optim_is_written, "parameters are no slots"
    one.do("READ c0:param", "READ c0:optim")
    state = one.optimizer.optimizer.state[one.chunk.pieces[0].tensor]
    if "sum" in one.optimizer.slots:
        assert state["sum"].tolist() == [0.25] * 16
    else:
        assert not state


def test_a_gathered_copy_is_no_business_of_the_shards_moves(one: One) -> None:
    def all_gather(full: torch.Tensor, shard: torch.Tensor) -> None:
        full.copy_(shard.repeat(2))

    one.chunk.store = OffloadedParameters(32, one.chunk.layout.dtype, 2, 0, all_gather)
    before = len(one.pointed)
    one.do("READ c0:param", "DROP c0:param")
    assert len(one.pointed) == before, "other lanes may be gathering or dropping it now"


def test_parameters_at_home_in_memory_are_left_alone(one: One) -> None:
    values = one.first.clone()
    one.chunk.store = LocalParameters(values)
    with one.state.in_memory(one.chunk, with_master=False):
        assert one.chunk.store.full is values
    one.state.drop_all(one.chunk)
    assert one.chunk.store.full is values
