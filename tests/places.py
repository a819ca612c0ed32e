"""Places that hold named values: pages of buffers, and places of their own. Whoever writes leaves rubbish first."""

import random
from collections.abc import Iterator
from typing import Any

from outgrow.scheduler.program import Buffer

__all__ = ["RUBBISH", "Broken", "Places"]

RUBBISH = "rubbish"


class Broken(Exception):
    """The run stops, or something is not where it must be."""


class Places:
    """Memory of one rank."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.value: dict[str, Any] = {}  # place -> value; a place that is not there has none
        self.pages: dict[tuple[str, int], Any] = {}
        self.where: dict[str, list[tuple[str, int]]] = {}  # slot or activations in a buffer -> tier and pages
        self.buffers: dict[str, Buffer] = {}

    def look(self, name: str) -> Any:
        """What lies at a place now."""
        if name in self.where:
            found = {self.pages[page] for page in self.where[name]}
            if len(found) != 1:
                raise Broken(f"{name} is torn")
            return found.pop()
        if name not in self.value:
            raise Broken(f"{name} is not there")
        return self.value[name]

    def put(self, name: str, value: Any) -> None:
        if name in self.where:
            for page in self.where[name]:
                self.pages[page] = value
        else:
            self.value[name] = value

    def open(self, name: str) -> None:
        """A buffer is filled from now on."""
        if name not in self.buffers or name in self.where:
            raise Broken(f"{name} has no buffer, or is in it already")
        buffer = self.buffers[name]
        pages = range(buffer.start_bytes // 4096, -(-(buffer.start_bytes + buffer.num_bytes) // 4096))
        self.where[name] = [(buffer.tier, page) for page in pages]
        self.put(name, (RUBBISH, self.rng.random()))

    def close(self, name: str) -> None:
        if name in self.where:
            del self.where[name]
        elif name in self.value:
            del self.value[name]
        else:
            raise Broken(f"{name} is not there")

    def used(self, names: list[str]) -> Iterator[list[Any]]:
        """Find the same at the beginning and at the end."""
        before = [self.look(name) for name in names]
        yield before
        if [self.look(name) for name in names] != before or any(RUBBISH in str(value) for value in before):
            raise Broken(f"{names} changed during their use")
