"""Errors survive the way between processes, with what they carry."""

import copy
import pickle

import pytest

from outgrow.memory.errors import ChunkCorrupted, DiskFault, DiskFull, OutgrowError, Place, StoreError

PLACE = Place("demo", 3, "/scratch/x.chunks", "c7", "exp_avg", 8192)


@pytest.mark.parametrize("kind", [StoreError, DiskFull, DiskFault, ChunkCorrupted])
def test_store_errors_keep_message_and_place(kind: type[StoreError]) -> None:
    for error in (kind("no", PLACE), kind("no")):
        for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
            assert type(twin) is kind
            assert isinstance(twin, OutgrowError)
            assert (twin.message, twin.place, str(twin)) == (error.message, error.place, str(error))


def test_the_text_names_everything() -> None:
    assert str(DiskFault("EIO", PLACE)) == (
        "run demo, rank 3, chunk c7, slot exp_avg, file /scratch/x.chunks, offset 8192: EIO"
    )
    assert str(Place("demo", 0, "/x")) == "run demo, rank 0, file /x"
