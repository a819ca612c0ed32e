"""Hand-written programs and handlers that note what they do, for tests of the executor. Gates instead of sleeps."""

import threading
from collections.abc import Callable

from outgrow.parallel.actions import Action, Kind
from outgrow.runtime.executor import Executor
from outgrow.scheduler.program import Instruction, Lane, Program

PATIENCE_S = 20.0  # for gates that open at once where the code is right


def program(*lines: str) -> Program:
    """`"net GATHER c0.0"` or `"compute F0.0 <- 0, 1"`."""
    instructions = []
    for line in lines:
        left, _, after = line.partition("<-")
        lane, action = left.strip().split(" ", 1)
        waits = tuple(int(number) for number in after.split(",")) if after else ()
        instructions.append(Instruction(Action.parse(action), Lane(lane), waits, 7))
    return Program(tuple(instructions))


def act(text: str) -> Action:
    return Action.parse(text)


class Log:
    """Handlers that note what they did; an action may wait at a gate or fail."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.threads: dict[str, str] = {}
        self.gates: dict[str, threading.Event] = {}
        self.started: dict[str, threading.Event] = {}
        self.errors: dict[str, BaseException] = {}

    def gate(self, action: str) -> threading.Event:
        self.started[action] = threading.Event()
        self.gates[action] = threading.Event()
        return self.gates[action]

    def handle(self, action: Action) -> None:
        text = str(action)
        if text in self.gates:
            self.started[text].set()
            assert self.gates[text].wait(PATIENCE_S), f"the gate of {text} was never opened"
        if text in self.errors:
            raise self.errors[text]
        self.done.append(text)
        self.threads[text] = threading.current_thread().name

    def handlers(self) -> dict[Kind, Callable[[Action], None]]:
        return dict.fromkeys((kind for kind in Kind if not kind.is_compute), self.handle)


def run(executor: Executor, *compute: str) -> list[str]:
    """Come to compute actions one after the other; what `running` said in each."""
    seen = []
    for text in compute:
        executor.advance_to(act(text))
        seen.append(str(executor.running))
    return seen


ONE_LANE = program("compute F0.0", "compute F1.0", "compute B1.0", "compute B0.0", "compute NORM", "compute STEP c0")
