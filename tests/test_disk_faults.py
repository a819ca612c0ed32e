"""Training with a disk that fails, at every request of a step: each fault is named, nothing is trained wrong after it,
and nothing is left behind."""

import errno
import functools
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from disk_runs import (
    BY_UNIT,
    From,
    another_kind,
    attempt,
    each_request_fails,
    expected,
    files,
    make,
    names_the_place,
    nothing_is_left,
    same_weights,
    train,
)
from faulty_io import EIO, ENOSPC, Fault, FaultyIO, fails_with, nothing_moved, short_by_half

from outgrow.memory.errors import DiskFault, DiskFull, StateLost, StoreError
from outgrow.parallel.actions import Kind
from outgrow.runtime.engine import Engine
from outgrow.scheduler.program import Program


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path, one_thread: None) -> Iterator[None]:
    expected()
    with nothing_is_left(tmp_path):
        yield


def moves(program: Program, kind: Kind) -> list[int]:
    """Positions of the moves in the order in which their lane does them; those that move nothing left out."""
    return [p for p, each in enumerate(program.instructions) if each.action.kind is kind and each.num_bytes]


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
    num_refused = num_went_on = 0
    wanted = functools.partial(moves, kind=Kind.WRITE if write else Kind.READ)
    for failing in each_request_fails(tmp_path, write, list(KINDS.values()), wanted, **settings):
        engine, position, program = failing.engine, failing.position, failing.engine.program
        assert program is not None
        error = failing.third_step()
        assert names_the_place(error, failing.path)
        action = program.instructions[position].action
        assert error.place is not None
        assert f"c{action.index}:{action.slot}" == f"{error.place.chunk}:{error.place.slot}"
        assert "rank 0, step 3" in "\n".join(error.__notes__)
        del error
        failing.disk.heal()
        went_on = goes_on(engine, tmp_path, settings)
        if position in before_first_update(program):
            assert went_on, f"{action} failed before any update, and the engine does not go on"
        if write and position >= program.num_carried:
            assert not went_on, f"{action} was not written, and the engine goes on"
        num_went_on += went_on
        num_refused += not went_on
    assert num_went_on > 0
    assert num_refused > 0 or not write


@pytest.mark.parametrize("write", [False, True], ids=["reads", "writes"])
def test_every_request_before_and_in_the_first_step_fails(tmp_path: Path, write: bool) -> None:
    """The engine is not made, or does its first step when the fault has passed, or refuses; whatever was opened is
    closed."""
    losses, weights = expected(num_steps=1)
    n, outcomes = 0, set()
    while "the fault was never met" not in outcomes:
        name, (fault, kind) = list(KINDS.items())[n % len(KINDS)]
        disk = From(fault, write, n)
        n += 1
        io = FaultyIO(always=disk)
        io.arm()
        engine, error = attempt(lambda io=io: make(tmp_path, io))
        if engine is None:
            assert type(error) is kind, name
            assert "run demo, rank 0" in str(error)
            assert files(tmp_path) == []
            outcomes.add("not made")
            continue
        result, error = attempt(lambda engine=engine: train(engine, 1, 1))
        if error is None:
            assert disk.num_hits == 0
            outcomes.add("the fault was never met")
        else:
            assert type(error) is kind, name
            assert names_the_place(error, *files(tmp_path))
            disk.heal()
            result, error = attempt(lambda engine=engine: train(engine, 1, 1))
            outcomes.add("done again" if error is None else "refused")
            assert error is None or type(error) is StateLost
        disk.heal()
        if error is None:
            assert result == losses
            assert same_weights(engine.state_dict(), weights)
        engine.close()
        del engine, error, result
    assert {"not made", "refused" if write else "done again"} <= outcomes


@pytest.mark.parametrize(("fault", "write"), [(EIO, False), (short_by_half, None)], ids=["EIO", "short"])
def test_what_passes_by_itself_is_not_noticed(tmp_path: Path, fault: Fault, write: bool | None) -> None:
    """A read that fails once is tried again; a short transfer goes on where it stopped."""
    losses, weights = expected()
    n, was_met = 0, True
    while was_met:
        once = From(fault, write, n, times=1)
        io = FaultyIO(always=once)
        engine = make(tmp_path, io)
        assert train(engine, 1, 2) == losses[:2]
        io.arm()
        assert train(engine, 3, 4) == losses[2:]
        was_met = once.num_hits == 1
        assert same_weights(engine.state_dict(), weights)
        engine.close()
        n += 3
    assert n > 12


def test_a_step_that_fails_before_it_begins_leaves_the_last_steps_writes_to_be_done(tmp_path: Path) -> None:
    losses, weights = expected()
    engine = make(tmp_path)
    assert train(engine, 1, 2) == losses[:2]
    assert engine.program is not None
    assert engine.program.num_carried > 0
    for _ in range(2):
        with pytest.raises(ValueError, match="at least one sample"):
            engine.step(None)
    assert train(engine, 3, 4) == losses[2:]
    assert same_weights(engine.state_dict(), weights)
    engine.close()


@pytest.mark.parametrize("settings", [{}, BY_UNIT], ids=["sequential", "by-unit"])
def test_a_model_that_fails_in_its_forward_leaves_everything_as_it_was(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    losses, weights = expected(**settings)
    engine = make(tmp_path, **settings)
    assert train(engine, 1, 2) == losses[:2]

    def fail(*_: Any) -> None:
        raise KeyError("mine")

    for unit in (engine.model.layers[0], engine.model.layers[1], engine.model.head):
        handle = unit.register_forward_pre_hook(fail)
        with pytest.raises(KeyError, match="mine"):
            train(engine, 3, 3)
        handle.remove()
    assert train(engine, 3, 4) == losses[2:]
    assert same_weights(engine.state_dict(), weights)
    engine.close()


def test_a_model_that_fails_after_an_update_is_refused_from_then_on(tmp_path: Path) -> None:
    losses, _ = expected()
    engine = make(tmp_path)
    assert train(engine, 1, 2) == losses[:2]

    def fail(*_: Any) -> None:
        raise KeyError("mine")

    handle = engine.model.layers[0].linear.register_full_backward_hook(fail)  # the head was updated before
    with pytest.raises(KeyError, match="mine"):
        train(engine, 3, 3)
    handle.remove()
    assert not goes_on(engine, tmp_path, {})
    engine.close()


@pytest.mark.parametrize("ask", ["state_dict", "export", "gathered"])
def test_a_write_that_is_left_of_the_last_step_fails_and_is_tried_again(tmp_path: Path, ask: str) -> None:
    """Its buffer still holds what it was to write: nothing is lost as long as the disk comes back."""
    losses, weights = expected()
    disk = From(EIO, write=True)
    io = FaultyIO(always=disk)
    engine = make(tmp_path, io)
    assert train(engine, 1, 4) == losses
    io.arm()
    asks = {
        "state_dict": engine.state_dict,
        "export": lambda: engine.export(tmp_path / "w.safetensors"),
        "gathered": lambda: engine.gathered().__enter__(),
    }
    for _ in range(3):
        with pytest.raises(DiskFault):
            asks[ask]()
    disk.heal()
    assert same_weights(engine.state_dict(), weights)
    engine.close()


def test_a_failed_forward_keeps_no_activations_alive(tmp_path: Path) -> None:
    """Hooks on the graph hold on to what they need; that must not be the graph."""
    engine = make(tmp_path)
    train(engine, 1, 1)
    alive: list[weakref.ref[Any]] = []

    def watch(_module: Any, _args: Any, output: torch.Tensor) -> None:
        alive.append(weakref.ref(output.untyped_storage()))

    def fail(*_: Any) -> None:
        raise KeyError("mine")

    handles = [engine.model.layers[1].register_forward_hook(watch), engine.model.head.register_forward_pre_hook(fail)]
    with pytest.raises(KeyError):
        train(engine, 2, 2)
    for handle in handles:
        handle.remove()
    assert train(engine, 2, 2) == expected()[0][1:2]
    gc.collect()
    assert [ref() for ref in alive] == [None]
    engine.close()


def test_a_closed_engines_model_holds_no_buffer(tmp_path: Path) -> None:
    """The last step's writes were still to be done, so parameters lay in their buffers."""
    with nothing_is_left(tmp_path):
        engine = make(tmp_path)
        model = engine.model
        train(engine, 1, 2)
        engine.close()
        del engine
        assert all(parameter.numel() == 0 for parameter in model.parameters())


def test_a_parameter_used_before_the_first_unit_is_waited_for(tmp_path: Path) -> None:
    """Its read is held back until the model uses it, which it must not, or half a second has passed."""
    losses, _ = expected()
    used = threading.Event()

    def slow(transfer: Callable[[memoryview], int], view: memoryview, write: bool) -> int:
        assert not used.wait(0.5), "the model used a parameter that was not there"
        return transfer(view)

    io = FaultyIO(always=From(slow, write=False, times=1))
    engine = make(tmp_path, io)
    assert train(engine, 1, 2) == losses[:2]
    engine.state_dict()  # nothing is kept in its buffer from step to step
    io.arm()
    handle = engine.model.layers[0].register_forward_pre_hook(lambda *_: used.set(), prepend=True)
    assert train(engine, 3, 4) == losses[2:]
    handle.remove()
    engine.close()
