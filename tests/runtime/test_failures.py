import pickle

import pytest

from outgrow.memory.errors import LaneTimeout, NotFinite, WorkerError
from outgrow.runtime.data import DataError
from outgrow.runtime.events import Failure
from outgrow.runtime.failures import first_cause, raise_failure


class Stubborn(Exception):
    """An exception that does not survive pickling."""

    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


def failure(error, rank=0, step=3):
    try:
        raise error
    except Exception as raised:
        return Failure.of(raised, rank, step)


def test_a_failure_knows_where_and_travels():
    error = KeyError("boom")
    error.outgrow_unit, error.outgrow_step = "blocks.2", 7
    described = pickle.loads(pickle.dumps(failure(error, rank=1)))
    assert described.place == "rank 1, step 7, unit blocks.2"
    assert isinstance(described.error(), KeyError)
    assert "raise error" in described.trace_text
    assert failure(ValueError("x"), step=0).place == "rank 0, before step 1"


def test_an_exception_that_does_not_survive_is_still_described():
    described = failure(Stubborn("a", "b"))
    assert described.error() is None
    assert (described.kind, described.message) == ("Stubborn", "a b")


@pytest.mark.parametrize(
    "echo",
    [
        RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]:1"),
        LaneTimeout("rank 1 is gone"),
    ],
)
def test_the_cause_is_no_echo(echo):
    cause = failure(KeyError("boom"), rank=1)
    assert first_cause([failure(echo), cause], []) == cause
    assert first_cause([failure(echo)], dead_ranks=[1]) is None
    alone = failure(echo)
    assert first_cause([alone], dead_ranks=[]) == alone


def test_a_users_exception_becomes_a_worker_error_with_its_traceback():
    error = KeyError("boom")
    error.outgrow_unit = "head"
    with pytest.raises(WorkerError, match=r"rank 1, step 3, unit head \(of 2 ranks\): KeyError: 'boom'") as caught:
        raise_failure(RuntimeError("fit"), [failure(error, rank=1)], 2, 2)
    assert (caught.value.rank, caught.value.step, caught.value.unit) == (1, 3, "head")
    assert isinstance(caught.value.__cause__, KeyError)
    assert str(caught.value).count("Traceback") == 1


@pytest.mark.parametrize("kind", [NotFinite, DataError])
def test_our_own_errors_keep_their_type_and_gain_their_place(kind):
    with pytest.raises(kind, match=r"too bad \(rank 0, step 3\)"):
        raise_failure(RuntimeError("fit"), [failure(kind("too bad"))], 2, 2)
    with pytest.raises(kind, match=r"^rank 0: too bad$"):
        raise_failure(RuntimeError("fit"), [failure(kind("rank 0: too bad"))], 2, 2)


def test_refused_arguments_keep_their_type():
    error = ValueError("no such unit")
    error.outgrow_argument = True
    with pytest.raises(ValueError, match="no such unit"):
        raise_failure(RuntimeError("fit"), [failure(error)], 2, 0)


def test_a_rank_that_died_without_a_word_is_the_cause():
    error = RuntimeError("fit")
    error.worker_failures = {0: RuntimeError("peer gone"), 1: RuntimeError("actor died")}
    echo = failure(RuntimeError("Connection reset by peer"), rank=0)
    with pytest.raises(WorkerError, match=r"rank 1 of 2 ended without a word after step 4") as caught:
        raise_failure(error, [echo], 2, 4)
    assert caught.value.rank == 1
    assert "actor died" in str(caught.value)


def test_a_run_that_never_started():
    with pytest.raises(WorkerError, match=r"before a rank could report why: no room"):
        raise_failure(RuntimeError("no room"), [], 2, 0)
