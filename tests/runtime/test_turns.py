"""Micro-batches that take turns: the program's order, one thread at a time, and what belongs to each of them."""

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from lanes import PATIENCE_S, Log, act, program

from outgrow.memory.errors import LaneTimeout, OutOfOrder
from outgrow.runtime.executor import Executor
from outgrow.runtime.turns import Turns

ORDER = ["F0.0", "F0.1", "F0.2", "F1.0", "B1.0", "F1.1", "B1.1", "F1.2", "B1.2", "B0.0", "B0.1", "B0.2"]
PROGRAM = program(*(f"compute {action}" for action in ORDER), "compute NORM")


class Steps:
    """Runs steps of PROGRAM with bodies that note when they are where."""

    def __init__(self) -> None:
        self.log = Log()
        self.executor = Executor(self.log.handlers(), deadline_s=PATIENCE_S)
        self.seen: list[str] = []
        self.calls: list[str] = []
        self.turns = Turns(
            self.executor,
            lambda number: self.calls.append(f"leave {number}"),
            lambda number: self.calls.append(f"enter {number}"),
            PATIENCE_S,
        )

    def body(self, number: int, *actions: str, meanwhile: Callable[[str], None] = lambda action: None) -> None:
        for action in actions:
            self.turns.advance_to(act(action))
            assert str(self.executor.running) == action
            self.seen.append(action)
            meanwhile(action)
        self.executor.complete_micro_batch(number)

    def run(self, bodies: dict[int, Callable[[], None]], without: tuple[int, ...] = ()) -> list[str]:
        self.seen = []
        self.executor.begin(PROGRAM)
        for number in without:
            self.executor.skip_micro_batch(number)
        try:
            self.turns.run(list(bodies.items()))
            self.executor.finish()
        except BaseException as error:
            self.executor.abort(error)
            raise
        return self.seen

    def whole(self, *numbers: int, left_out: tuple[str, ...] = ()) -> dict[int, Callable[[], None]]:
        """Bodies that come to all of their actions."""

        def body(number: int) -> Callable[[], None]:
            mine = [a for a in ORDER if a.endswith(f".{number}") and a not in left_out]
            mine.sort(key=lambda a: (a[0] == "B", int(a[1]) if a[0] == "F" else -int(a[1])))
            return lambda: self.body(number, *mine)

        return {number: body(number) for number in numbers}


@pytest.fixture
def steps() -> Iterator[Steps]:
    steps = Steps()
    with steps.executor:
        yield steps
    steps.turns.close()


def test_the_programs_order_is_followed_whatever_the_threads_do(steps: Steps) -> None:
    for numbers in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        assert steps.run(steps.whole(*numbers)) == ORDER
    assert steps.log.done == ["NORM"] * 3


def test_a_turn_is_left_and_entered_only_where_another_comes_between(steps: Steps) -> None:
    steps.run(steps.whole(0, 1, 2))
    assert steps.calls == [
        "leave 0",
        "leave 1",
        "leave 2",
        "enter 0",  # F1.0; B1.0 follows at once
        "leave 0",
        "enter 1",
        "leave 1",
        "enter 2",
        "leave 2",
        "enter 0",  # B0.0, its last
        "enter 1",
        "enter 2",
    ]


def test_a_micro_batch_without_samples_has_no_turn(steps: Steps) -> None:
    for gone in range(3):
        rest = [number for number in range(3) if number != gone]
        assert steps.run(steps.whole(*rest), without=(gone,)) == [a for a in ORDER if not a.endswith(f".{gone}")]
    assert steps.run(steps.whole(1), without=(0, 2)) == ["F0.1", "F1.1", "B1.1", "B0.1"]
    steps.run({}, without=(0, 1, 2))
    assert steps.log.done == ["NORM"] * 5


@pytest.mark.parametrize("left_out", [("B1.0",), ("B1.1",), ("B1.2", "B1.0"), ("B0.0",), ("B0.0", "B0.1", "B0.2")])
def test_backwards_that_no_gradient_reaches_are_passed_over(steps: Steps, left_out: tuple[str, ...]) -> None:
    for _ in range(2):
        assert steps.run(steps.whole(0, 1, 2, left_out=left_out)) == [a for a in ORDER if a not in left_out]


def test_gradients_are_put_by_where_the_program_is_not_done_with_a_micro_batch(steps: Steps) -> None:
    """B0 of all is passed over when the threads are gone already."""
    steps.run(steps.whole(0, 1, 2, left_out=("B0.0", "B0.1", "B0.2")))
    forward = ["leave 0", "leave 1", "leave 2"]
    assert steps.calls == [*forward, "enter 0", "leave 0", "enter 1", "leave 1", "enter 2", "leave 2"]


def test_random_numbers_belong_to_the_micro_batch(steps: Steps) -> None:
    drawn: dict[int, list[float]] = {0: [], 1: [], 2: []}

    def body(number: int) -> Callable[[], None]:
        def draw(action: str) -> None:
            if action.startswith("F0"):
                torch.manual_seed(number)
            drawn[number].append(torch.rand(()).item())

        return lambda: steps.body(number, *(f"{a}.{number}" for a in ("F0", "F1", "B1", "B0")), meanwhile=draw)

    steps.run({number: body(number) for number in range(3)})
    for number, values in drawn.items():
        torch.manual_seed(number)
        assert values == [torch.rand(()).item() for _ in range(4)]


@pytest.mark.parametrize("place", ["F0.1", "F1.0", "B1.2", "B0.0"])
def test_a_failing_micro_batch_ends_the_others_and_the_next_step_works(steps: Steps, place: str) -> None:
    def fail(action: str) -> None:
        if action == place:
            raise ZeroDivisionError(action)

    failing = int(place[-1])
    bodies = steps.whole(0, 1, 2)
    actions = ("F0", "F1", "B1", "B0")
    bodies[failing] = lambda: steps.body(failing, *(f"{a}.{failing}" for a in actions), meanwhile=fail)
    with pytest.raises(ZeroDivisionError, match=place):
        steps.run(bodies)
    assert steps.seen == ORDER[: ORDER.index(place) + 1], "nobody goes on"
    assert steps.run(steps.whole(0, 1, 2)) == ORDER


def test_a_forward_that_is_left_out_is_told(steps: Steps) -> None:
    with pytest.raises(OutOfOrder, match=r"F1\.1"):
        steps.run(steps.whole(0, 1, 2, left_out=("F1.1",)))


def test_a_turn_that_never_ends_is_told(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    def deadline_s(_turns: Turns) -> float:  # the others wait too, and begin at a moment of their own
        return 0.05 if threading.current_thread().name == "micro-batch-0" else PATIENCE_S

    monkeypatch.setattr(Turns, "_deadline_s", property(deadline_s, lambda *_: None), raising=False)
    hanging = Log()
    gate = hanging.gate("NORM")

    def stay(action: str) -> None:
        if action == "F0.1":
            gate.wait(PATIENCE_S)

    bodies = steps.whole(0, 1, 2)
    bodies[1] = lambda: steps.body(1, "F0.1", meanwhile=stay)

    def impatient() -> None:
        try:
            steps.body(0, "F0.0", "F1.0")
        finally:
            gate.set()

    bodies[0] = impatient
    with pytest.raises(LaneTimeout, match=r"F1\.0 waited 0\.05 s for its turn; micro-batch 1 has it"):
        steps.run(bodies)


def test_threads_stay_from_step_to_step_until_closed(steps: Steps) -> None:
    def threads() -> set[threading.Thread]:
        return {each for each in threading.enumerate() if each.name.startswith("micro-batch")}

    before, seen = threads(), set[threading.Thread]()
    for _ in range(3):
        bodies = steps.whole(0, 1, 2)
        inner = bodies[1]

        def noting(inner: Callable[[], None] = inner) -> None:
            seen.add(threading.current_thread())
            inner()

        bodies[1] = noting
        assert steps.run(bodies) == ORDER
        assert len(threads() - before) == 3
    assert seen <= threads()
    steps.turns.close()
    assert not threads() - before
    assert steps.run(steps.whole(0, 1, 2)) == ORDER  # another step makes new ones
    steps.turns.close()


def test_outside_of_turns_the_executor_is_used_as_it_is(steps: Steps) -> None:
    steps.executor.begin(program("compute F0.0", "compute B0.0"))
    steps.turns.advance_to(act("F0.0"))
    assert str(steps.executor.running) == "F0.0"
    steps.executor.finish()
    assert steps.calls == []
