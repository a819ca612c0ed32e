"""Actions: every one has a text form that reads back, and text that names none is refused."""

import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outgrow.parallel.actions import Action, Kind, Target

NUMBERS = st.integers(0, 10**6)


@st.composite
def actions(draw: st.DrawFn) -> Action:
    kind = draw(st.sampled_from(list(Kind)))
    if kind.target is Target.NOTHING:
        return Action(kind)
    if kind.target is Target.CHUNK:
        slots = st.none() | st.sampled_from(["param", "optim", "exp_avg", "exp_avg_sq", "master", "s1"])
        return Action(kind, draw(NUMBERS), draw(st.none() | NUMBERS), draw(slots))
    return Action(kind, draw(NUMBERS), draw(NUMBERS))


@given(actions())
def test_text_reads_back(action):
    assert Action.parse(str(action)) == action


@given(actions(), actions())
def test_different_actions_have_different_texts(first, second):
    assert (str(first) == str(second)) == (first == second)


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("F12.3", Action(Kind.F, 12, 3)),
        ("B0.0", Action(Kind.B, 0, 0)),
        ("I4.1", Action(Kind.I, 4, 1)),
        ("W4.1", Action(Kind.W, 4, 1)),
        ("R4.1", Action(Kind.R, 4, 1)),
        ("GATHER c7.0", Action(Kind.GATHER, 7, 0)),
        ("GATHER c7", Action(Kind.GATHER, 7)),
        ("REDUCE c7.2", Action(Kind.REDUCE, 7, 2)),
        ("DROP c7.2", Action(Kind.DROP, 7, 2)),
        ("STEP c7", Action(Kind.STEP, 7)),
        ("READ c7:optim", Action(Kind.READ, 7, None, "optim")),
        ("UP c7.1:param", Action(Kind.UP, 7, 1, "param")),
        ("SAVE a7.0", Action(Kind.SAVE, 7, 0)),
        ("LOAD a7.0", Action(Kind.LOAD, 7, 0)),
        ("SEND_F s1.3", Action(Kind.SEND_F, 1, 3)),
        ("NORM", Action(Kind.NORM)),
    ],
)
def test_the_texts_that_are_documented(text, action):
    assert Action.parse(text) == action
    assert str(action) == text
    assert Action.parse(f"  {text}\n") == action


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected e.g. 'F12.3'"),
        ("X1.0", "no action: 'X1.0'; expected"),
        ("f1.0", "no action: 'f1.0'"),
        ("F-1.0", "no action: 'F-1.0'"),
        ("GATHER 7", "GATHER counts chunks: 'c7'"),
        ("GATHER a7.0", "GATHER counts chunks: 'c7'"),
        ("SAVE c7.0", "SAVE counts activations: 'a7'"),
        ("SEND_F c1.3", "SEND_F counts stages: 's1'"),
        ("Fc1.0", "F counts units: '1'"),
        ("F12", "needs a micro-batch"),
        ("SAVE a7", "needs a micro-batch"),
        ("GATHER", "an index"),
        ("F", "an index"),
        ("F1.0:param", "takes no slot"),
        ("SAVE a7.0:param", "takes no slot"),
        ("READ c7:", "no action"),
        ("READ c7.:optim", "no action"),
        ("GATHER c7 c8", "no action"),
        ("F1.0.0", "no action"),
    ],
)
def test_text_that_names_no_action_is_refused(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Action.parse(text)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (Kind.NORM, {"index": 3}),
        (Kind.NORM, {"micro_batch": 3}),
        (Kind.F, {"index": 1}),
        (Kind.F, {}),
        (Kind.F, {"index": -1, "micro_batch": 0}),
        (Kind.F, {"index": 1, "micro_batch": -2}),
        (Kind.F, {"index": 1, "micro_batch": 0, "slot": "param"}),
        (Kind.STEP, {}),
        (Kind.READ, {"index": 1, "slot": ""}),
        (Kind.READ, {"index": 1, "slot": "two words"}),
    ],
)
def test_fields_that_do_not_go_together_are_refused(kind, fields):
    with pytest.raises(ValueError, match=str(kind)):
        Action(kind, **fields)


def test_only_units_run_code():
    assert {kind for kind in Kind if kind.is_compute} == {Kind.F, Kind.B, Kind.I, Kind.W, Kind.R}
    assert all(kind.target is Target.UNIT for kind in Kind if kind.is_compute)


def test_actions_are_values():
    assert len({Action(Kind.F, 1, 0), Action.parse("F1.0"), Action(Kind.F, 1, 1)}) == 2
    assert pickle.loads(pickle.dumps(Action(Kind.READ, 7, None, "optim"))) == Action.parse("READ c7:optim")
