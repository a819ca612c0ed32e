"""One rank of a contestant: builds its member and answers the parent until the pipe ends.

Run as `python -m outgrow.perf.rank FD` by `contestants.py`, never by hand. Owns the process: its process group and the
loop. It does not own the member, which a builder of `peers.py`, `ours.py` or a case makes, nor the number of threads,
which torch takes from the environment that `contestants.py` sets. A single rank loads torch only if its member does.
"""

import pickle
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

from .contestants import Contestant

__all__ = ["Rank", "main"]


@dataclass(frozen=True, slots=True)
class Rank:
    """Which process of how many; what a builder is given."""

    index: int
    count: int

    def barrier(self) -> None:
        """Wait for all ranks of the contestant; nothing alone."""
        if self.count > 1:
            import torch.distributed as dist

            dist.barrier()

    def keep_to_cores(self) -> None:
        """Keep to the cores of its own, as the runtime's workers do: for contestants that are ours."""
        from ..memory.cores import keep_process_to_share

        keep_process_to_share(self.index, self.count)


def _resolve(builder: str) -> Callable[..., Any]:
    module, _, function = builder.partition(":")
    return getattr(import_module(module, __package__), function)


def _answer(connection: Connection, call: Callable[[], object]) -> bool:
    """Send what `call` returns, or the traceback of what it raises; whether it returned."""
    try:
        payload = pickle.dumps((True, call()))
    except Exception:
        connection.send_bytes(pickle.dumps((False, traceback.format_exc())))
        return False
    connection.send_bytes(payload)
    return True


def _serve(connection: Connection) -> None:
    contestant, index, store = connection.recv()
    assert isinstance(contestant, Contestant)
    members: list[Any] = []

    def build() -> None:
        if contestant.num_ranks > 1:
            import torch.distributed as dist

            dist.init_process_group(
                "gloo",
                store=dist.FileStore(store, contestant.num_ranks),
                rank=index,
                world_size=contestant.num_ranks,
                timeout=timedelta(minutes=10),
            )
        members.append(_resolve(contestant.builder)(Rank(index, contestant.num_ranks), **contestant.arguments))

    if not _answer(connection, build):
        return
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            break
        _answer(connection, lambda: getattr(members[0], method)(*arguments))  # noqa: B023 (called before the next turn)
    members[0].close()
    if contestant.num_ranks > 1:
        import torch.distributed as dist

        dist.destroy_process_group()


def main() -> None:
    with Connection(int(sys.argv[1])) as connection:
        _serve(connection)


if __name__ == "__main__":
    main()
