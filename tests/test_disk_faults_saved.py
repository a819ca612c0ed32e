"""Saved activations on a disk that fails, at every request of a step: each fault is named, nothing is trained wrong
after it, and nothing is left behind."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from disk_runs import (
    BY_UNIT,
    From,
    another_kind,
    each_request_fails,
    expected,
    make,
    nothing_is_left,
    same_weights,
    tier_of,
    train,
)
from faulty_io import EIO, ENOSPC, FaultyIO, nothing_moved

from outgrow.memory.errors import ChunkCorrupted, DiskFault, DiskFull, StateLost, StoreError
from outgrow.parallel.actions import Kind
from outgrow.scheduler.program import Program

MOVED = {"offload": "none", "activations": "offload:disk"}
KINDS = {
    "EIO": (EIO, DiskFault),
    "ENOSPC": (ENOSPC, DiskFull),
    "nothing-moves": (nothing_moved, DiskFault),
    "another-kind": (another_kind, StoreError),
}


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path, one_thread: None) -> Iterator[None]:
    expected()
    with nothing_is_left(tmp_path):
        yield


@pytest.mark.parametrize("update", ["after", "backward"])
@pytest.mark.parametrize("turns", [{}, BY_UNIT], ids=["sequential", "by-unit"])
@pytest.mark.parametrize("write", [False, True], ids=["loads", "saves"])
def test_every_request_of_a_step_fails(tmp_path: Path, write: bool, turns: dict[str, Any], update: str) -> None:
    """Before any update the step can be done again, with the same bits; afterwards it is refused: one of the two."""
    losses, weights = expected(**turns)
    went_on = refused = 0
    wanted = Kind.SAVE if write else Kind.LOAD

    def positions(program: Program) -> list[int]:
        return [p for p, each in enumerate(program.instructions) if each.action.kind is wanted]

    for failing in each_request_fails(
        tmp_path, write, list(KINDS.values()), positions, update=update, **MOVED, **turns
    ):
        engine = failing.engine
        assert engine.program is not None
        action = engine.program.instructions[failing.position].action
        error = failing.third_step()
        place = error.place
        assert place is not None
        assert (place.run, place.rank, place.path) == ("demo-activations", 0, str(failing.path))
        assert place.chunk == f"a{action.index}.{action.micro_batch}"
        assert f"chunk {place.chunk}" in str(error)
        assert f"offset {place.offset_bytes}" in str(error)
        del error, place
        failing.disk.heal()
        try:
            assert train(engine, 3, 4) == losses[2:]
            assert same_weights(engine.state_dict(), weights)
            went_on += 1
        except StateLost:
            refused += 1
    assert went_on + refused > 1
    if update == "after":  # else it depends on the lanes' timing what was updated before the failure was noticed
        assert refused == 0


def test_activations_that_changed_on_disk_are_found(tmp_path: Path) -> None:
    losses, weights = expected()
    changed: list[int] = []

    def flip(transfer: Any, view: memoryview, write: bool) -> int:
        num_bytes = transfer(view)
        view[17] ^= 4
        changed.append(num_bytes)
        return num_bytes

    flips = From(flip, write=False, times=1)
    io = FaultyIO(always=flips)
    engine = make(tmp_path, io, update="after", **MOVED)
    with tier_of(io):
        assert train(engine, 1, 2) == losses[:2]
    io.arm()
    with pytest.raises(ChunkCorrupted, match="its bytes changed"):
        train(engine, 3, 3)
    assert len(changed) == 1
    assert train(engine, 3, 4) == losses[2:]
    assert same_weights(engine.state_dict(), weights)
    engine.close()
    gc.collect()
