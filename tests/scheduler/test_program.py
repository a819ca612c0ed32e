"""Programs: a text form that reads back, dependencies that point backwards, shapes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outgrow.parallel.actions import Action, Kind
from outgrow.scheduler.program import ChunkUse, Instruction, Lane, Program, StepShape, UnitUse, actions_from

TEXTS = ["F0.0", "B12.3", "GATHER c7.0", "GATHER c7", "DROP c1.2", "REDUCE c3.0", "NORM", "STEP c4", "READ c7:optim"]


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
    return Program(tuple(instructions))


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
