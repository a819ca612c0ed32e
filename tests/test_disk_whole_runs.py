"""Whole runs whose disk is damaged meanwhile, in this process and on a Ray worker: the caller gets the very error."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from outgrow import Callback, Memory, Runtime
from outgrow.memory.errors import ChunkCorrupted, DiskFault, StoreError


@pytest.fixture(scope="module", autouse=True)
def _travels_by_value() -> Iterator[None]:
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


class Damage(Callback):
    """In the worker, after step 2: the run's files vanish, or one bit of every page changes."""

    def __init__(self, folder: Path, what: str) -> None:
        self.folder, self.what = folder, what

    def on_step(self, engine: Any, step: Any) -> None:
        assert engine.plan.uses_disk
        if step.step != 2:
            return
        engine.state_dict()  # nothing is left to be written over it
        for path in self.folder.glob("outgrow-*"):
            if self.what == "vanish":
                path.unlink()
            else:
                content = bytearray(path.read_bytes())
                content[::4096] = bytes(byte ^ 1 for byte in content[::4096])
                path.write_bytes(content)


def wide() -> nn.Module:
    return nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(8)], nn.Linear(1024, 1))


def failure_of(tmp_path: Path, what: str, kind: type[StoreError], workers: int) -> StoreError:
    """What a run raises here whose disk is damaged after its second step."""
    disk = tmp_path / "disk"
    disk.mkdir()
    data = TensorDataset(torch.randn(16, 1024), torch.randn(16, 1))
    memory = Memory(disk=disk)
    runtime = Runtime(workers=workers, memory=memory, storage_path=tmp_path / "runs", progress=False, name="my-run")
    callbacks = [Damage(disk, what)]
    with pytest.raises(kind) as caught:
        runtime.train(wide, data, nn.functional.mse_loss, batch_size=4, steps=6, callbacks=callbacks, offload="all")
    error = caught.value
    assert type(error) is kind
    assert error.place is not None
    assert (error.place.run, error.place.rank) == ("my-run", 0)
    assert f"run my-run, rank 0, chunk {error.place.chunk}, slot {error.place.slot}, file {disk}/outgrow-" in str(error)
    assert list(disk.iterdir()) == []
    return error


@pytest.mark.parametrize(("what", "kind"), [("vanish", DiskFault), ("flip", ChunkCorrupted)])
def test_a_run_in_this_process(tmp_path: Path, what: str, kind: type[StoreError]) -> None:
    error = failure_of(tmp_path, what, kind, 0)
    assert "rank 0, step 3" in "\n".join(error.__notes__)


@pytest.mark.ray
def test_a_run_on_a_worker(tmp_path: Path) -> None:
    error = failure_of(tmp_path, "vanish", DiskFault, 1)
    assert "removed while the run was using it" in str(error)
