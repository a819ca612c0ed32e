"""Settings of all tests: properties try the same examples every time, however slow the machine is; what is measured of
this machine is kept for the session and not in the user's cache."""

import gc
import os
import tempfile
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("same-every-time", derandomize=True, deadline=None, database=None)
settings.load_profile("same-every-time")


def pytest_collection_finish() -> None:
    """What was imported stays: looking for what nobody refers to need not go through it, which takes a fifth of a
    second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def own_cache() -> Iterator[None]:
    """Also for the processes that tests start."""
    with tempfile.TemporaryDirectory(prefix="outgrow-cache-") as folder:
        before = os.environ.get("XDG_CACHE_HOME")
        os.environ["XDG_CACHE_HOME"] = folder
        yield
        if before is None:
            del os.environ["XDG_CACHE_HOME"]
        else:
            os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tiny tensors: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
