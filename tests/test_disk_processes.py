"""Training with state on disk beside other processes: killed ones, forks, other runs, other ranks, and whole runs."""

import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from disk_runs import From, batch, expected, files, make, names_the_place, nothing_is_left, same_weights, train
from faulty_io import EIO, FaultyIO
from ranks import run_outcomes, warm_context

from outgrow.memory.errors import DiskFault, OutgrowError, StateLost, StoreError

PATIENCE_S = 60.0


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path, one_thread: None) -> Iterator[None]:
    expected()
    warm_up = warm_context().Process(target=int)  # the server and the tracker stay, with their descriptors
    warm_up.start()
    warm_up.join()
    with nothing_is_left(tmp_path):
        yield


def train_for_ever(folder: str, pipe: Connection) -> None:
    """Says so after every step, until it is told to stop; then gives the losses."""
    torch.set_num_threads(1)
    engine = make(folder)
    losses: list[float] = []
    while not pipe.poll():
        losses += train(engine, len(losses) + 1, len(losses) + 1)
        pipe.send(len(losses))
    pipe.send(losses)
    engine.close()


class Other:
    """A process that trains in a folder."""

    def __init__(self, folder: Path) -> None:
        context = warm_context()
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=train_for_ever, args=(str(folder), end), daemon=True)
        self.process.start()
        end.close()
        self.await_steps(2)

    def await_steps(self, num_steps: int) -> None:
        for _ in range(num_steps):
            assert self.pipe.poll(PATIENCE_S)
            self.pipe.recv()

    def kill(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self._end()

    def stop(self) -> list[float]:
        self.pipe.send("stop")
        while not isinstance(said := self.pipe.recv(), list):
            pass
        self._end()
        return said

    def _end(self) -> None:
        self.process.join(PATIENCE_S)
        assert not self.process.is_alive()
        self.process.close()
        self.pipe.close()


def test_what_a_killed_run_leaves_is_removed_by_the_next_one_in_that_folder(tmp_path: Path) -> None:
    losses, weights = expected()
    other = Other(tmp_path)
    (left,) = files(tmp_path)
    other.kill()
    assert files(tmp_path) == [left], "nobody was there to remove it"
    engine = make(tmp_path)
    assert left not in files(tmp_path)
    assert len(files(tmp_path)) == 1
    assert train(engine, 1, 4) == losses
    assert same_weights(engine.state_dict(), weights)
    engine.close()


def test_two_processes_in_one_folder_do_not_harm_each_other(tmp_path: Path) -> None:
    """The same run's name, the same rank, at the same time."""
    losses, weights = expected()
    other = Other(tmp_path)
    (its,) = files(tmp_path)
    for _ in range(2):
        engine = make(tmp_path)
        assert len(files(tmp_path)) == 2
        other.await_steps(1)
        assert train(engine, 1, 4) == losses
        assert same_weights(engine.state_dict(), weights)
        engine.close()
        assert files(tmp_path) == [its]
    got = other.stop()
    assert got == expected(len(got))[0]


def test_two_runs_of_one_process_need_two_names(tmp_path: Path) -> None:
    losses, weights = expected()
    first, second = make(tmp_path), make(tmp_path, run_name="other")
    with pytest.raises(
        StoreError, match=r"run demo, rank 0, file .*another store of this process.*name one differently"
    ):
        make(tmp_path)
    for step in range(1, 5):
        assert train(first, step, step) == train(second, step, step) == losses[step - 1 : step]
    assert len(files(tmp_path)) == 2
    first.close()
    assert same_weights(second.state_dict(), weights)
    second.close()


def test_a_fork_of_the_training_process_cannot_train_and_does_no_harm(tmp_path: Path) -> None:
    losses, weights = expected()
    engine = make(tmp_path)
    assert train(engine, 1, 2) == losses[:2]
    for closes in (False, True):
        pid = os.fork()
        if pid == 0:
            try:
                _be_a_fork(engine, closes)
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
        assert len(files(tmp_path)) == 1
    assert train(engine, 3, 4) == losses[2:]
    assert same_weights(engine.state_dict(), weights)
    engine.close()


def _be_a_fork(engine: Any, closes: bool) -> None:
    watch = threading.Timer(PATIENCE_S, lambda: os._exit(2))  # it hangs
    watch.daemon = True
    watch.start()
    words = f"belongs to process {os.getppid()}, and this is its fork {os.getpid()}"
    for ask in (lambda: engine.step(batch(3)), engine.state_dict, lambda: engine.export("nowhere")):
        with pytest.raises(OutgrowError, match=words):
            ask()
    if closes:
        engine.close()


# ---- ranks


def train_on_two(rank: int, folder: str, write: bool) -> list[str]:
    """Rank 1's disk fails in step 3. Gives what the rank was told, then and when it asked again."""
    disk = From(EIO, write, n=2)
    io = FaultyIO(always=disk)
    engine = make(folder, io)
    train(engine, 1, 2)
    if rank == 1:
        io.arm()
    (path,) = [path for path in files(folder) if f"-rank{rank}-" in path.name]
    kind: type[Exception] = DiskFault if rank == 1 else Exception  # rank 0 may hear it from the transport
    with pytest.raises(kind) as caught:
        train(engine, 3, 3)
    if rank == 1:
        assert names_the_place(caught.value, path, rank=1)
        os._exit(7)  # as a worker that fails does, sooner or later; the other is waiting for it
    told = [type(caught.value).__name__, str(caught.value)]
    for ask in (lambda: train(engine, 3, 3), engine.state_dict):
        with pytest.raises(StateLost, match=r"rank 0: .* step 3 failed"):
            ask()
    engine.close()
    return told


@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
def test_a_rank_whose_disk_fails_names_itself_and_the_others_are_released(tmp_path: Path, write: bool) -> None:
    released, failed = run_outcomes(train_on_two, 2, str(tmp_path), write, timeout_s=PATIENCE_S)
    assert "exit code 7" in str(failed), f"rank 1: {failed!r}"
    assert isinstance(released, list), f"rank 0: {released!r}"
    assert len(released) == 2, "rank 0 went on as if nothing had happened"
    assert ["-rank1-" in path.name for path in files(tmp_path)] == [True]
    make(tmp_path).close()  # the next start removes what rank 1 left
