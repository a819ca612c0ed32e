"""One error for one failed run: which of the ranks' failures is the cause, and how the caller gets to see it.

Decides only; takes what ranks reported and what Ray Train says, raises. When a rank fails, its peers fail in their next
collective: those echoes are never shown as the cause.
"""

from collections.abc import Sequence
from typing import NoReturn

from ..memory.errors import WorkerError
from .events import Failure

__all__ = ["first_cause", "raise_failure"]


def first_cause(failures: Sequence[Failure], dead_ranks: Sequence[int]) -> Failure | None:
    """The first failure that is no echo; None: a rank died without a word, or nothing was reported."""
    causes = [failure for failure in failures if not failure.echo]
    if causes:
        return causes[0]
    return failures[0] if failures and not dead_ranks else None


def raise_failure(error: BaseException, failures: Sequence[Failure], num_ranks: int, num_steps: int) -> NoReturn:
    """Raise for a run that Ray Train ended with `error`.

    Args:
        error: what `TorchTrainer.fit` raised.
        failures: what ranks reported, in order of arrival.
        num_steps: steps that rank 0 finished.

    Raises:
        OutgrowError, ValueError: an error that this project raised on purpose, as the type that it is, its place added.
        WorkerError: everything else, with the worker's own traceback; `__cause__` is the exception where it survived.
    """
    reported: dict[int, BaseException] = getattr(error, "worker_failures", {})
    spoken = {failure.rank for failure in failures}
    dead = sorted(rank for rank in reported if rank not in spoken)
    failure = first_cause(failures, dead)
    if failure is not None:
        _raise_reported(failure, num_ranks)
    if dead:
        last_words = "; ".join(f"rank {rank}: {reported[rank]}" for rank in dead)
        raise WorkerError(
            f"{', '.join(f'rank {rank}' for rank in dead)} of {num_ranks} ended without a word after step {num_steps}: "
            "the process was killed or crashed (the kernel does so when memory runs out; logs/ may say more).\n"
            f"Ray says: {last_words}",
            rank=dead[0],
            step=num_steps + 1,
        ) from None
    raise WorkerError(f"the run failed before a rank could report why: {error}") from error


def _raise_reported(failure: Failure, num_ranks: int) -> NoReturn:
    cause = failure.error()
    if failure.ours and cause is not None:
        if f"rank {failure.rank}" not in failure.message:
            cause.args = (f"{failure.message} ({failure.place})", *cause.args[1:])
        raise cause
    raise WorkerError(
        f"{failure.place} (of {num_ranks} ranks): {failure.kind}: {failure.message}\n\n{failure.trace_text}",
        rank=failure.rank,
        step=failure.step or None,
        unit=failure.unit,
    ) from cause
