"""Training with a disk that fails, at every request of a step: each fault is named, nothing is trained wrong after it,
and nothing is left behind."""

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from disk_runs import (
    BY_UNIT,
    From,
    another_kind,
    expected,
    files,
    make,
    names_the_place,
    nothing_is_left,
    same_weights,
    train,
)
from faulty_io import EIO, ENOSPC, FaultyIO, fails_with, nothing_moved

from outgrow.memory.errors import DiskFault, DiskFull, StateLost, StoreError
from outgrow.parallel.actions import Kind
from outgrow.runtime.engine import Engine
from outgrow.scheduler.program import Program


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path) -> Iterator[None]:
    expected()
    with nothing_is_left(tmp_path):
        yield


def moves(program: Program, kind: Kind) -> list[int]:
    """Positions of the moves in the order in which their lane does them."""
    return [position for position, each in enumerate(program.instructions) if each.action.kind is kind]


def before_first_update(program: Program) -> set[int]:
    """Positions of what must be done before any chunk can be updated."""
    wanted = {next(p for p, each in enumerate(program.instructions) if each.action.kind is Kind.STEP)}
    for position in reversed(range(len(program.instructions))):
        if position in wanted:
            wanted |= set(program.instructions[position].after)
    return wanted


def goes_on(engine: Engine, folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the engine does the failed step 3 again, with the right bits; False: it refuses whatever it is asked."""
    losses, weights = expected(**settings)
    try:
        loss = train(engine, 3, 3)
    except StateLost:
        for ask in (lambda: train(engine, 3, 3), engine.state_dict, lambda: engine.export(folder / "w.safetensors")):
            with pytest.raises(StateLost, match=r"rank 0: .* step 3 failed after .* checkpoint"):
                ask()
        with pytest.raises(StateLost), engine.gathered():
            pass
        assert not (folder / "w.safetensors").exists()
        return False
    assert loss == losses[2:3]
    assert train(engine, 4, 4) == losses[3:4]
    assert same_weights(engine.state_dict(), weights)
    return True


KINDS = {
    "EIO": (EIO, DiskFault),
    "ENOSPC": (ENOSPC, DiskFull),
    "no-device": (fails_with(errno.ENODEV), DiskFault),
    "nothing-moves": (nothing_moved, DiskFault),
    "another-kind": (another_kind, StoreError),
}


@pytest.mark.parametrize("settings", [{}, BY_UNIT], ids=["sequential", "by-unit"])
@pytest.mark.parametrize("write", [False, True], ids=["reads", "writes"])
def test_every_request_of_a_step_fails_once_and_for_all(tmp_path: Path, write: bool, settings: dict[str, Any]) -> None:
    """Request n of step 3 and all after it, for every n. A failure that nothing can have been updated before leaves an
    engine that goes on with the right bits; after an update it refuses; in between it does one of the two."""
    losses, _ = expected(**settings)
    num_refused = num_went_on = n = 0
    while True:
        name, (fault, kind) = list(KINDS.items())[n % len(KINDS)]
        disk = From(fault, write, n)
        io = FaultyIO(always=disk)
        engine = make(tmp_path, io, **settings)
        assert train(engine, 1, 2) == losses[:2]
        (path,) = files(tmp_path)
        program = engine.program
        assert program is not None
        io.arm()
        positions = moves(program, Kind.WRITE if write else Kind.READ)
        if n == len(positions):  # there is no such request
            assert train(engine, 3, 3) == losses[2:3]
            assert disk.count == n
            engine.close()
            break
        with pytest.raises(kind) as caught:
            train(engine, 3, 3)
        assert type(caught.value) is kind, name
        assert names_the_place(caught.value, path)
        action = program.instructions[positions[n]].action
        assert f"c{action.index}:{action.slot}" == f"{caught.value.place.chunk}:{caught.value.place.slot}"
        assert "rank 0, step 3" in "\n".join(caught.value.__notes__)
        del caught
        disk.heal()
        went_on = goes_on(engine, tmp_path, settings)
        if positions[n] in before_first_update(program):
            assert went_on, f"{action} failed before any update, and the engine does not go on"
        if write and positions[n] >= program.num_carried:
            assert not went_on, f"{action} was not written, and the engine goes on"
        num_went_on += went_on
        num_refused += not went_on
        engine.close()
        n += 1
    assert num_went_on > 0
    assert num_refused > 0 or not write
