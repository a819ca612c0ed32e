"""Settings of all tests: properties try the same examples every time, however slow the machine is."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("same-every-time", derandomize=True, deadline=None, database=None)
settings.load_profile("same-every-time")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tiny tensors: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
