"""Programs of several ranks, run dry together."""

import pytest

from outgrow.memory.errors import InvalidProgram
from outgrow.scheduler.program import Program
from outgrow.scheduler.rank_check import check_ranks


def program(text: str) -> Program:
    """Lane, action and positions that are waited for, one instruction a line."""
    lines = [line.split(" <- ") for line in text.strip().splitlines()]
    whole = (f"{n} {words[0].strip()} 0 <- {words[1] if len(words) > 1 else '-'}" for n, words in enumerate(lines))
    return Program.parse("\n".join(whole))


GATHERS = program("net GATHER c0.0\nnet GATHER c1.0\nnet NORM")


def test_the_same_collectives_in_the_same_order_are_accepted() -> None:
    check_ranks([GATHERS, GATHERS, GATHERS])


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (
            "net GATHER c1.0\nnet GATHER c0.0\nnet NORM",
            "collective 0 is GATHER c0.0 on rank 0 and GATHER c1.0 on rank 1",
        ),
        ("net GATHER c0.0\nnet GATHER c1.0", "collective 2 is NORM on rank 0 and None on rank 1"),
    ],
)
def test_collectives_that_differ_are_named(other: str, words: str) -> None:
    with pytest.raises(InvalidProgram, match=words):
        check_ranks([GATHERS, program(other)])


def test_collectives_of_different_groups_need_not_agree() -> None:
    other = program("net GATHER c1.0\nnet NORM")
    check_ranks([GATHERS, other, GATHERS, other], [(0, 2), (1, 3)])


FIRST = """compute F0.0
    net SEND_F s0.0 <- 0
    net RECV_B s0.0
    compute B0.0 <- 2"""
SECOND = """net RECV_F s1.0
    compute F0.0 <- 0
    compute B0.0 <- 1
    net SEND_B s1.0 <- 2"""


def test_a_pipeline_of_two_runs() -> None:
    check_ranks([program(FIRST), program(SECOND)], [(0,), (1,)])


def test_a_send_without_its_receive_and_the_other_way_round_are_refused() -> None:
    silent = SECOND.replace("net SEND_B s1.0 <- 2", "compute NORM")
    with pytest.raises(InvalidProgram, match=r"SEND_B s1\.0 is sent 0 times and received 1"):
        check_ranks([program(FIRST), program(silent)], [(0,), (1,)])
    with pytest.raises(InvalidProgram, match=r"SEND_F s0\.0 is sent 1 times and received 0"):
        check_ranks([program("compute F0.0\nnet SEND_F s0.0 <- 0")])


def test_receives_before_sends_on_both_sides_are_a_deadlock() -> None:
    first = "net RECV_B s0.0\nnet SEND_F s0.0"
    second = "net RECV_F s1.0\nnet SEND_B s1.0"
    with pytest.raises(InvalidProgram, match=r"rank 0 at RECV_B s0\.0, rank 1 at RECV_F s1\.0"):
        check_ranks([program(first), program(second)], [(0,), (1,)])


def test_the_first_stage_receives_no_input() -> None:
    with pytest.raises(InvalidProgram, match="there is no stage before stage 0"):
        check_ranks([program("net RECV_F s0.0")])
