"""The protocol with real processes, and small members of this file's own."""

import os
import signal
import subprocess
import sys

import pytest

from outgrow.perf import contestants as module
from outgrow.perf.contestants import Contestant, ContestantFailed, Group, StepReport
from outgrow.perf.rank import Rank


class Member:
    """Answers what it is asked, and fails on demand."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self.turns: list[int] = []

    def turn(self, number: int) -> tuple[int, int]:
        self.turns.append(number)
        return self.rank.index, len(self.turns)

    def threads(self) -> tuple[int, str | None]:
        import torch

        return torch.get_num_threads(), os.environ.get("OUTGROW_TEST")

    def fail(self, rank: int) -> None:
        if rank == self.rank.index:
            raise RuntimeError(f"rank {rank} does not like this")
        self.rank.barrier()

    def die(self) -> None:
        os.write(2, b"last words\n")
        os.kill(os.getpid(), signal.SIGKILL)

    def busy(self) -> None:
        import threading

        def spin() -> None:
            while True:
                pass

        threading.Thread(target=spin, daemon=True).start()

    def close(self) -> None:
        pass


def member(rank: Rank) -> Member:
    return Member(rank)


MEMBER = "test_contestants:member"


def contestant(name: str, num_ranks: int = 1, builder: str = MEMBER, **more: object) -> Contestant:
    environment = {"PYTHONPATH": os.path.dirname(__file__), "OUTGROW_TEST": name}
    return Contestant(name, builder, num_ranks, environment=environment, **more)  # pyright: ignore[reportArgumentType]


def test_turns_rotate_every_rank_answers_and_the_first_failure_ends_it() -> None:
    lines: list[str] = []
    with Group([contestant("a"), contestant("b", 2)], timeout_s=60, say=lines.append) as group:
        assert group.ask("b", "threads") == [(1, "b"), (1, "b")]
        answers = group.rounds(3, "turn", first=5)
        with pytest.raises(ContestantFailed, match=r"b, rank 1:\n[\s\S]*in fail[\s\S]*rank 1 does not like this"):
            group.ask("b", "fail", 1)  # rank 0 waits for rank 1 and has no answer
        processes = [process for running in group._running.values() for process in running.processes]
    assert answers == {"a": [[(0, 1)], [(0, 2)], [(0, 3)]], "b": [[(0, n), (1, n)] for n in (1, 2, 3)]}
    assert [line[-1] for line in lines if line.startswith("round")] == ["b", "a", "a", "b", "b", "a"]
    assert all(process.returncode is not None for process in processes)


def test_a_dead_rank_is_named_with_its_last_words() -> None:
    with pytest.raises(ContestantFailed, match=r"a: the process of rank 0 ended with -9; last output: last words"):
        with Group([contestant("a")], timeout_s=60) as group:
            group.ask("a", "die")


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(ContestantFailed, match="has no attribute 'nobody'"):
        with Group([contestant("a", builder="test_contestants:nobody")], timeout_s=60):
            pass


def test_a_late_answer_is_an_error() -> None:
    with pytest.raises(ContestantFailed, match=r"no answer of rank \[0\] in 0 s"):
        with Group([contestant("a")], timeout_s=0):
            pass


def test_what_does_not_sleep_between_turns_is_noticed() -> None:
    with Group([contestant("a"), contestant("restless")], timeout_s=60) as group:
        group.ask("restless", "busy")
        group.ask("a", "turn", 0)
        while group._idle_cpu_s["restless"] < 0.05:  # until the kernel has counted a few of its ticks
            group.ask("a", "turn", 0)
        shares = group.idle_shares()
        (sleeper,) = group._running["a"].processes
    assert shares["restless"] > 5 * shares["a"]
    assert sleeper.returncode == 0


def test_missing_requirements_leave_a_contestant_out() -> None:
    absent = contestant("absent", requires=("outgrow_no_such_module",))
    assert absent.missing == ("outgrow_no_such_module",)
    with Group([absent], timeout_s=60) as group:
        assert group.contestants == ()
        assert group.rounds(2) == {}


def test_bad_contestants_are_refused() -> None:
    with pytest.raises(ValueError, match="needs a rank and a thread, got 0 and 1"):
        contestant("a", 0)
    with pytest.raises(ValueError, match="names of their own"):
        Group([contestant("a"), contestant("a")])


def test_ddp_in_processes_trains_as_plain_pytorch_does_here() -> None:
    with Group([Contestant("DDP", ".peers:ddp", 2, arguments={"config": "tiny"})], timeout_s=60) as group:
        turns: list[list[StepReport]] = group.rounds(2)["DDP"]
    assert [len(ranks) for ranks in turns] == [2, 2]
    for report in (report for ranks in turns for report in ranks):
        assert isinstance(report, StepReport)
        assert report.seconds > 0
        assert report.peak_rss_bytes > 50 * 2**20
    from outgrow.perf.peers import plain  # not above: ranks import this file, and most of them need no torch

    trainee = plain(Rank(0, 1), config="tiny")
    expected = [trainee.step(index).loss for index in range(2)]
    for rank in range(2):
        assert [ranks[rank].loss for ranks in turns] == pytest.approx(expected, rel=1e-6)
    assert expected[0] != expected[1]


def test_the_parent_needs_no_torch() -> None:
    code = f"import sys, {module.__name__}, outgrow.perf.suite; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
