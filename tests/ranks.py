"""Runs a function on several ranks, each a process of its own with one thread and gloo as the default process group.

    def sum_of_ranks(rank: int, scale: float) -> float: ...

    results = run_ranks(sum_of_ranks, 3, 2.0)  # [rank 0's, rank 1's, rank 2's]

The function is found by name in the new processes, so it stands at the top level of a module. The processes are forked
from a server that has imported all but the tests once: torch's compiler, too, which every first optimizer asks for and
which takes seconds.
"""

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

__all__ = ["run_outcomes", "run_ranks", "warm_context"]

_ROOT = Path(__file__).parents[1]
_PRELOADED = ("torch", "torch.distributed", "torch._dynamo", "numba", "pytest", "outgrow.runtime.engine")
_GRACE_S = 10.0
"""How long the other ranks may go on after one of them has failed."""


def warm_context() -> Any:
    """Processes of it are forked from the server that has imported all but the tests."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_PRELOADED])
    return context


def run_ranks(function: Callable[..., Any], num_ranks: int, *args: Any, timeout_s: float = 300.0) -> list[Any]:
    """`function(rank, *args)` on every rank; the results in rank order.

    Raises:
        what the rank that failed first raised, with a note that names the rank and holds its traceback.
    """
    outcomes = run_outcomes(function, num_ranks, *args, timeout_s=timeout_s, grace_s=_GRACE_S)
    errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    if errors:
        raise min(errors, key=lambda error: getattr(error, "failed_at_s", float("inf")))
    return outcomes


def run_outcomes(
    function: Callable[..., Any], num_ranks: int, *args: Any, timeout_s: float = 300.0, grace_s: float | None = None
) -> list[Any]:
    """As `run_ranks`, but a rank that failed has its exception in the list.

    A process that ends without a word counts as a RuntimeError, one that had to be killed as a TimeoutError.

    Args:
        grace_s: seconds that the others may go on after one has failed; None: until `timeout_s` is over.
    """
    context = warm_context()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        processes = [
            context.Process(
                target=_run_rank, args=(function, rank, num_ranks, args, folder, timeout_s), name=f"rank-{rank}"
            )
            for rank in range(num_ranks)
        ]
        for process in processes:
            process.daemon = True
            process.start()
        try:
            killed = _join(processes, time.monotonic() + timeout_s, grace_s)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [_outcome(folder, rank, process.exitcode, rank in killed) for rank, process in enumerate(processes)]


def _join(processes: list[Any], deadline_s: float, grace_s: float | None) -> set[int]:
    """Wait for all; the ranks that were still running at the deadline."""
    running = dict(enumerate(processes))
    while running:
        rest_s = deadline_s - time.monotonic()
        if rest_s <= 0:
            return set(running)
        wait([process.sentinel for process in running.values()], timeout=rest_s)
        for rank, process in list(running.items()):
            if process.exitcode is not None:
                del running[rank]
                if process.exitcode != 0 and grace_s is not None:
                    deadline_s = min(deadline_s, time.monotonic() + grace_s)
    return set()


def _outcome(folder: str, rank: int, exit_code: int | None, killed: bool) -> Any:
    path = Path(folder) / f"outcome-{rank}"
    if path.exists():
        return pickle.loads(path.read_bytes())
    if killed:
        return TimeoutError(f"rank {rank} did not end in time and was killed")
    error = RuntimeError(f"rank {rank} ended without a result, exit code {exit_code}")
    error.failed_at_s = float("-inf")  # pyright: ignore[reportAttributeAccessIssue]  # what the others met follows from it
    return error


def _run_rank(
    function: Callable[..., Any], rank: int, num_ranks: int, args: tuple[Any, ...], folder: str, timeout_s: float
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=timeout_s),
    )
    dist.barrier()  # a rank that failed at once would otherwise be gone before the others have connected to it
    failed = False
    try:
        outcome = function(rank, *args)
        content = pickle.dumps(outcome)
    except Exception as error:
        failed = True
        content = _pickle_error(error, rank)
    unfinished = Path(folder) / f"unfinished-{rank}"
    unfinished.write_bytes(content)
    unfinished.rename(Path(folder) / f"outcome-{rank}")
    if failed:  # leaving the group cleanly could wait for the others
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    dist.destroy_process_group()


def _pickle_error(error: Exception, rank: int) -> bytes:
    error.add_note(f"on rank {rank}:\n{''.join(traceback.format_exception(error))}")
    error.failed_at_s = time.monotonic()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        content = pickle.dumps(error)
        pickle.loads(content)
    except Exception:
        return pickle.dumps(RuntimeError(f"rank {rank} failed:\n{''.join(traceback.format_exception(error))}"))
    return content
