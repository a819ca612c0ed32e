"""Programs: a text form that reads back, dependencies that point backwards, shapes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outgrow.parallel.actions import Action, Kind
from outgrow.scheduler.program import Buffer, ChunkUse, Instruction, Lane, Program, StepShape, UnitUse, actions_from

TEXTS = [
    "F0.0",
    "B12.3",
    "GATHER c7.0",
    "GATHER c7",
    "DROP c1.2",
    "REDUCE c3.0",
    "NORM",
    "STEP c4",
    "READ c7:optim",
    "WRITE c7:param",
]
TEXTS += ["DROP c7:param", "SAVE a3.1", "LOAD a3.1"]


@st.composite
def programs(draw: st.DrawFn) -> Program:
    instructions = []
    for position in range(draw(st.integers(0, 12))):
        after = draw(st.sets(st.integers(0, max(position - 1, 0)), max_size=3)) if position else set()
        instructions.append(
            Instruction(
                Action.parse(draw(st.sampled_from(TEXTS))),
                draw(st.sampled_from(list(Lane))),
                tuple(sorted(after)),
                draw(st.integers(0, 10**12)),
            )
        )
    buffers = []
    for name in draw(st.sets(st.sampled_from(["c7:optim", "c1:param", "a3.1"]))):
        start, size = draw(st.tuples(st.integers(0, 10**12), st.integers(0, 10**9)))
        buffers.append(Buffer(name, draw(st.sampled_from(["host", "device"])), start, size))
    return Program(tuple(instructions), tuple(buffers), draw(st.integers(0, len(instructions))))


@given(programs())
def test_text_reads_back(program):
    assert Program.parse(program.text()) == program


def test_a_program_by_hand():
    text = """
        0 net      GATHER c1.0         4096 <- -
        1 compute  F0.0                   0 <- 0
        2 compute  STEP c1                0 <- 0,1
    """
    program = Program.parse(text)
    assert program.instructions == (
        Instruction(Action(Kind.GATHER, 1, 0), Lane.NET, (), 4096),
        Instruction(Action(Kind.F, 0, 0), Lane.COMPUTE, (0,)),
        Instruction(Action(Kind.STEP, 1), Lane.COMPUTE, (0, 1)),
    )
    assert program.by_lane == {Lane.NET: (0,), Lane.COMPUTE: (1, 2)}
    assert program.actions() == actions_from(["GATHER c1.0", "F0.0", "STEP c1"])
    assert program.actions(Kind.F) == [Action(Kind.F, 0, 0)]
    assert program.actions(Kind.W) == []


CARRYING = """
    0 write    WRITE c1:param      4096 <- -
    1 write    WRITE c1:optim      8192 <- -
    2 read     READ c1:param       4096 <- 0
    3 compute  F0.0                   0 <- 0,2
    4 read     READ c1:optim       8192 <- 1
    5 compute  STEP c1                0 <- 2,3,4
    buffer c1:param host 8192 4096
    buffer c1:optim host 0 8192
    carried 2
"""


def test_what_is_carried_over_is_left_out_of_a_first_step_and_is_all_that_is_left_after_the_last():
    program = Program.parse(CARRYING)
    first, rest = program.without_carried(), program.only_carried()
    assert first.actions() == actions_from(["READ c1:param", "F0.0", "READ c1:optim", "STEP c1"])
    assert [instruction.after for instruction in first.instructions] == [(), (0,), (), (0, 1, 2)]
    assert rest.actions() == actions_from(["WRITE c1:param", "WRITE c1:optim"])
    assert first.buffers == rest.buffers == program.buffers
    assert first.num_carried == rest.num_carried == 0


def test_what_is_kept_is_read_in_a_first_step_and_let_go_after_the_last():
    program = Program.parse(
        CARRYING.replace("2 read     READ c1:param       4096 <- 0", "2 read     READ c1:param          0 <- -")
    )
    assert program.kept == {"c1:param"}
    assert Program.parse(program.text()) == program
    first, rest = program.without_carried(), program.only_carried()
    assert (str(first.instructions[0].action), first.instructions[0].num_bytes) == ("READ c1:param", 4096)
    assert first.kept == frozenset()
    assert rest.actions() == actions_from(["WRITE c1:param", "WRITE c1:optim", "DROP c1:param"])
    assert rest.instructions[-1].after == (0,)


def test_an_arena_reaches_to_the_end_of_the_last_buffer():
    program = Program.parse(CARRYING)
    assert program.arena_bytes("host") == 8192 + 4096
    assert program.arena_bytes("device") == 0
    assert Program(()).arena_bytes("host") == 0


@pytest.mark.parametrize("line", ["buffer c1:param host x 7", "buffer c1:param host 7", "carried many", "carried -1"])
def test_a_line_that_is_no_buffer_and_no_number_of_carried_is_refused(line):
    with pytest.raises(ValueError, match="no instruction"):
        Program.parse(line)


@pytest.mark.parametrize(
    "line",
    [
        "0 compute F0.0 0",
        "0 compute F0.0 0 <- x",
        "0 kitchen F0.0 0 <- -",
        "0 compute Q0.0 0 <- -",
        "0 compute F0.0 many <- -",
        "0 <- -",
        "0 compute F0.0 0 <- - <- -",
    ],
)
def test_a_line_that_is_no_instruction_is_refused_and_quoted(line):
    with pytest.raises(ValueError, match="no instruction: ") as caught:
        Program.parse(line)
    assert repr(line) in str(caught.value)


@pytest.mark.parametrize("after", [(0,), (1,), (-1,)])
def test_a_dependency_that_does_not_point_backwards_is_our_own_mistake(after):
    with pytest.raises(AssertionError, match="must point backwards"):
        Program((Instruction(Action(Kind.F, 0, 0), Lane.COMPUTE, after),))


def shape(*units: tuple[int, ...], held: tuple[int, ...] = (), without_backward: tuple[int, ...] = ()) -> StepShape:
    uses = tuple(UnitUse(f"u{i}", chunks, i not in without_backward) for i, chunks in enumerate(units))
    return StepShape(uses, tuple(ChunkUse(64) for _ in range(5)), held)


def test_held_chunks_are_not_counted_among_a_units_own():
    assert shape((0, 1), (0, 2), held=(0,)).uses(0) == (1,)
    assert shape((0, 1), (0, 2), held=(0,)).uses(1) == (2,)


def test_gradients_are_complete_after_the_first_unit_that_uses_a_chunk():
    tied = shape((0, 1), (2,), (1, 3))
    assert [tied.last_backward_of(chunk) for chunk in range(4)] == [0, 0, 1, 2]
    assert tied.last_backward_of(4) is None, "no unit uses it: at the end of the backward"
    assert shape((0, 1), (1,), held=(1,)).last_backward_of(1) is None
    frozen_first = shape((0,), (0, 1), without_backward=(0,))
    assert frozen_first.last_backward_of(0) == 1, "the first unit has no backward"
    assert shape((0,), without_backward=(0,)).last_backward_of(0) is None
