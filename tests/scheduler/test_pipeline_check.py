"""Validation: every rule refuses what it should, names the action and shows the orders."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outgrow.parallel.actions import Action, Kind
from outgrow.scheduler.pipeline_check import Limits, validate
from outgrow.scheduler.pipeline_data import Schedule, ScheduleError, StageCosts
from outgrow.scheduler.pipelines import NAMES, schedule

PATTERNS = tuple(name for name in NAMES if name != "auto")


def by_hand(*orders: str, placement: tuple[int, ...] | None = None) -> Schedule:
    actions = tuple(tuple(Action.parse(word.replace("~", " ")) for word in order.split()) for order in orders)
    m = 1 + max(action.micro_batch or 0 for order in actions for action in order)
    return Schedule("by hand", placement or tuple(range(len(orders))), actions, m)


GOOD = by_hand("F0.0 F0.1 B0.0 I0.1 W0.1", "F1.0 I1.0 F1.1 W1.0 B1.1")


def test_a_good_one_passes() -> None:
    validate(GOOD, Limits(activations=2, send_buffers=2, one_channel=True))


@pytest.mark.parametrize(
    ("orders", "placement", "message"),
    [
        (("F0.0 B0.0", "F1.0"), None, r"stage 1 needs B1.0, or I1.0 and W1.0; it has nothing"),
        (("F0.0 B0.0", "F1.0 I1.0"), None, r"stage 1 needs B1.0, or I1.0 and W1.0; it has I1.0"),
        (("F0.0 B0.0", "F1.0 B1.0 W1.0"), None, r"it has B1.0 and W1.0"),
        (("F0.0 B0.0", "B1.0"), None, r"F1.0 is missing"),
        (("F0.0 B0.0 F0.0", "F1.0 B1.0"), None, r"F0.0 is there twice"),
        (("F0.0 B0.0", "B1.0 F1.0"), None, r"B1.0 comes before F1.0"),
        (("F0.0 B0.0", "F1.0 W1.0 I1.0"), None, r"W1.0 comes before I1.0"),
        (("F0.0 B0.0 F1.0 B1.0", ""), (0, 1), r"F1.0 is on rank 0, but its stage is placed on rank 1"),
        (("F0.0 B0.0 F7.0 B7.0",), None, r"F7.0 names a stage that does not exist"),
        (("F0.0 B0.0 STEP~c0",), None, r"STEP c0 does not belong"),
        (("F0.0 B0.0",), (3,), r"stage 0 is placed on rank 3, but there are 1 ranks"),
        (("F0.1 F0.0 B0.0 B0.1",), None, r"F0.0 comes after micro-batch 1 of its stage"),
        (("F0.0 F0.1 B0.1 B0.0",), None, r"B0.0 comes after micro-batch 1 of its stage"),
        (("F0.0 F0.1 I0.0 B0.1 W0.0",), None, r"W0.0 comes after micro-batch 1 of its stage"),
        (("F0.0 SAVE~a0.0 B0.0",), None, r"SAVE a0.0 and LOAD a0.0 go together"),
        (("F0.0 LOAD~a0.0 SAVE~a0.0 B0.0",), None, r"LOAD a0.0 comes before SAVE a0.0"),
        (("F0.0 SAVE~a0.0 B0.0 LOAD~a0.0",), None, r"B0.0 comes before LOAD a0.0"),
        (("F0.0 B0.0 R0.0",), None, r"B0.0 comes before R0.0"),
        (("B0.0 F0.0",), None, r"B0.0 comes before F0.0"),
    ],
)
def test_rules(orders: tuple[str, ...], placement: tuple[int, ...] | None, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        validate(by_hand(*orders, placement=placement))


def test_recomputing_and_copies_pass() -> None:
    validate(by_hand("F0.0 SAVE~a0.0 LOAD~a0.0 R0.0 I0.0 W0.0"))


def test_a_cycle_is_named() -> None:
    # Rank 1 wants micro-batch 1 backwards before rank 0 has sent it forwards.
    stuck = by_hand("F0.0 B0.0 F0.1 B0.1", "F1.0 F1.1 B1.0 B1.1")
    with pytest.raises(ScheduleError, match=r"deadlock: .*needs") as error:
        validate(stuck)
    text = str(error.value)
    assert "F1.1 (rank 1) needs F0.1 (rank 0)" in text
    assert "rank 0: " in text
    assert "[" in text


def test_the_picture_marks_the_action_and_is_cut() -> None:
    plan = schedule("1f1b", 2, 30)
    orders = list(plan.orders)
    orders[0] = tuple(action for action in orders[0] if str(action) != "B0.15")
    with pytest.raises(ScheduleError, match=r"\.\.\. .*\[F0\.15\].* \.\.\."):
        validate(replace(plan, orders=tuple(orders)))


def test_blocking_sends_deadlock_in_one_forward_one_backward() -> None:
    plan = schedule("1f1b", 4, 8)
    with pytest.raises(ScheduleError, match="deadlock with 0 send buffers"):
        validate(plan, Limits(send_buffers=0))
    validate(plan, Limits(send_buffers=1))
    validate(schedule("gpipe", 4, 8), Limits(send_buffers=0))


def test_looped_breadth_first_needs_as_many_buffers_as_it_sends_ahead() -> None:
    # Rank 1 takes its second chunk's inputs only after all of the first chunk; rank 0 sends on in the meantime.
    plan = schedule("looped-bfs", 2, 8)
    with pytest.raises(ScheduleError, match="deadlock with 2 send buffers"):
        validate(plan, Limits(send_buffers=2))
    validate(plan, Limits(send_buffers=8))


def test_one_channel_wants_the_order_of_sending() -> None:
    # Rank 1 has stages 1 and 2, rank 0 has 0 and 3: both send 0 -> 1 ... and rank 1 -> 0 forwards; swap two on arrival.
    crossed = by_hand(
        "F0.0 F2.0 F0.1 F2.1 B2.0 B0.0 B2.1 B0.1",
        "F1.0 F1.1 F3.0 B3.0 B1.0 F3.1 B3.1 B1.1",
        placement=(0, 1, 0, 1),
    )
    validate(crossed)
    with pytest.raises(ScheduleError, match=r"F1.1 uses what rank 0 sends forward to rank 1 before F3.0 does"):
        validate(crossed, Limits(one_channel=True))


@pytest.mark.parametrize("name", PATTERNS)
def test_all_schedules_use_channels_in_order(name: str) -> None:
    for p, m in ((2, 3), (3, 7), (4, 8)):
        validate(schedule(name, p, m), Limits(one_channel=True))


def test_memory_names_the_action_that_overflows() -> None:
    plan = schedule("gpipe", 2, 4)
    validate(plan, Limits(activations=4))
    with pytest.raises(ScheduleError, match=r"F0\.3 would raise the activations to 4, above the limit of 3"):
        validate(plan, Limits(activations=3))
    costs = StageCosts.of_stages([1, 1], [1, 1], [1, 1], activations=[100, 10])
    with pytest.raises(ScheduleError, match=r"F0\.2 would raise the activations to 300, above the limit of 250"):
        validate(plan, Limits(activations=250, costs=costs))


def test_memory_counts_copies() -> None:
    plan = schedule("pipeoffload-full", 4, 8)
    validate(plan, Limits(activations=1.5))
    kept = tuple(tuple(a for a in order if a.kind not in (Kind.SAVE, Kind.LOAD)) for order in plan.orders)
    with pytest.raises(ScheduleError, match="above the limit"):
        validate(replace(plan, orders=kept), Limits(activations=1.5))


def test_limits_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="count from 0, got -1"):
        Limits(send_buffers=-1)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_mutations_are_refused(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(PATTERNS))
    plan = schedule(name, data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6)))
    orders = [list(order) for order in plan.orders]
    rank = data.draw(st.integers(0, len(orders) - 1))
    position = data.draw(st.integers(0, len(orders[rank]) - 1))
    action = orders[rank][position]
    mutation = data.draw(st.sampled_from(["drop", "double", "move away", "swap", "other micro-batch"]))
    if mutation == "drop":
        del orders[rank][position]
    elif mutation == "double":
        orders[rank].append(action)
    elif mutation == "move away":
        if len(orders) == 1:
            return
        del orders[rank][position]
        orders[(rank + 1) % len(orders)].append(action)
    elif mutation == "swap":  # with the next one of the same stage and kind, or with what it needs
        later = [
            n for n in range(position + 1, len(orders[rank]))
            if orders[rank][n].index == action.index
            and (orders[rank][n].kind is action.kind or orders[rank][n].micro_batch == action.micro_batch)
            and action.kind not in (Kind.SAVE, Kind.LOAD)
        ]  # fmt: skip
        if not later:
            return
        orders[rank][position], orders[rank][later[0]] = orders[rank][later[0]], action
    else:
        orders[rank][position] = replace(action, micro_batch=plan.num_micro_batches)
    with pytest.raises(ScheduleError):
        validate(replace(plan, orders=tuple(map(tuple, orders))))
