"""The one executor: walks a program on lanes.

Owns: starting every instruction when its dependencies are done, each lane in its own order; spans; deadlines; the
release of every waiting lane when something fails. Does not own what actions do: handlers are given for each kind.

The `compute` lane is the caller. A model keeps its own `forward`: hooks call `advance_to(F12.3)`, which runs whatever
the program puts before that action on the compute lane, waits for the action's dependencies and returns to the model;
the next `advance_to` or `complete_micro_batch` ends it. Every other lane is a thread.
"""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Set
from types import TracebackType

from ..memory.errors import LaneTimeout, OutOfOrder
from ..memory.timeline import Span, Timeline
from ..parallel.actions import Action, Kind
from ..scheduler.program import Instruction, Lane, Program

__all__ = ["Executor", "Handler"]

Handler = Callable[[Action], Callable[[], None] | None]
"""Does an action; or begins it, and returns what waits for its end."""

_NUM_BEGUN = 2
"""Actions that a lane other than `compute` has begun and not ended: while the disk ends one, it has the next."""


class Executor:
    """Runs programs, one step after the other.

    Args:
        handlers: what to do for each kind of action; compute kinds need none (the model is what they do).
        deadline_s: how long a wait may last in which no action at all finishes.
        clock: seconds, monotonic.
        computed: called when the compute lane has given out all the work of an action, before that counts as done.
    """

    def __init__(
        self,
        handlers: Mapping[Kind, Handler],
        deadline_s: float = 1800.0,
        clock: Callable[[], float] = time.perf_counter,
        computed: Callable[[], None] = lambda: None,
    ) -> None:
        self._handlers, self._computed = dict(handlers), computed
        self._deadline_s = deadline_s
        self._clock = clock
        self._changed = threading.Condition()
        self._threads: dict[Lane, threading.Thread] = {}
        self._program: Program | None = None
        self._step = 0
        self._done = bytearray()
        self._num_done = 0
        self._idle: set[Lane] = set()  # done with the step that runs
        self._inside: set[Lane] = set()  # not yet out of a step, perhaps an aborted one
        self._failure: BaseException | None = None
        self._closed = False
        self._cursor = 0
        self._awaited: set[int] = set()  # positions that some lane waits for
        self._skipped: set[int] = set()  # micro-batches without a sample
        self._current: int | None = None
        self._current_start_s = self._start_s = 0.0
        self._spans: list[Span] = []

    def __enter__(self) -> "Executor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def running(self) -> Action | None:
        """The compute action that the model is in, if any."""
        position, program = self._current, self._program
        return None if position is None or program is None else program.instructions[position].action

    @property
    def active(self) -> bool:
        """Whether a step has begun and not ended."""
        return self._program is not None

    def begin(self, program: Program) -> None:
        """Start a step: the lanes other than `compute` set off at once. Waits until they have left an aborted step.

        Raises:
            LaneTimeout: they do not leave it.
        """
        assert self._program is None, "a step is running already"
        assert not self._closed, "this executor is closed"
        self.await_lanes()
        for lane in program.by_lane:
            if lane is not Lane.COMPUTE and lane not in self._threads:
                thread = threading.Thread(target=self._run_lane, args=(lane,), name=f"lane-{lane}", daemon=True)
                self._threads[lane] = thread
                thread.start()
        with self._changed:
            self._program = program
            self._done = bytearray(len(program.instructions))
            self._num_done = self._cursor = 0
            self._idle, self._awaited = {Lane.COMPUTE}, set()
            self._failure = None
            self._skipped = set()
            self._current = None
            self._spans = []
            self._start_s = self._clock()
            self._step += 1
            self._changed.notify_all()

    def advance_to(self, action: Action) -> None:
        """Come to a compute action: finish the one before it, run what lies between, wait for what it needs.

        A backward action that the program has and no gradient reached is passed over.

        Raises:
            OutOfOrder: the program has another forward action next.
            LaneTimeout, or what another lane failed with.
        """
        program = self._running_program()
        self._finish_current()
        order = program.by_lane.get(Lane.COMPUTE, ())
        while self._cursor < len(order):
            position = order[self._cursor]
            found = program.instructions[position].action
            if found == action:
                self._wait_for(position)
                self._cursor += 1
                self._current = position
                self._current_start_s = self._clock()
                return
            may_pass = found.micro_batch in self._skipped or not found.kind.is_compute
            if not may_pass and (found.kind is Kind.F or action.kind is Kind.F):
                raise OutOfOrder(f"the program has {found} next, the model came to {action}")
            self._pass(position)
        raise OutOfOrder(f"the program has no {action} left, the model came to it")

    def next_compute(self, over: Set[int]) -> Action | None:
        """The compute action that comes next, those of micro-batches that are `over`, or have no sample, left out."""
        program = self._running_program()
        order = program.by_lane.get(Lane.COMPUTE, ())
        actions = (program.instructions[position].action for position in order[self._cursor :])
        over = {*over, *self._skipped}
        return next((a for a in actions if a.kind.is_compute and a.micro_batch not in over), None)

    def await_next(self) -> None:
        """Run what lies before the next compute action and wait for what that needs, without coming to it: a model's
        own code may use parameters before it comes to its first unit."""
        program = self._running_program()
        self._finish_current()
        order = program.by_lane.get(Lane.COMPUTE, ())
        while self._cursor < len(order):
            position = order[self._cursor]
            action = program.instructions[position].action
            if action.kind.is_compute and action.micro_batch not in self._skipped:
                self._wait_for(position)
                return
            self._pass(position)

    def pass_over(self, action: Action) -> None:
        """Come to a backward action that no gradient reached: what lies before it is run, and it is done.

        Raises:
            OutOfOrder: it is a forward action, which the model should have come to.
        """
        if action.kind is Kind.F:
            raise OutOfOrder(f"the program has {action} next, but the model left it out")
        self.advance_to(action)
        self._finish_current()

    def complete_micro_batch(self, micro_batch: int) -> None:
        """The backward of `micro_batch` is over: end the last action, pass over backwards that no gradient reached."""
        program = self._running_program()
        self._finish_current()
        order = program.by_lane.get(Lane.COMPUTE, ())
        while self._cursor < len(order):
            position = order[self._cursor]
            found = program.instructions[position].action
            if found.kind is Kind.F or found.micro_batch != micro_batch:
                return  # what is left of it, where micro-batches take turns, is passed when the others come to it
            self._pass(position)

    def complete(self, actions: Set[Action]) -> None:
        """These compute actions are over: end the last one, pass over backwards that no gradient reached."""
        program = self._running_program()
        self._finish_current()
        order = program.by_lane.get(Lane.COMPUTE, ())
        last = max((program.compute_positions.get(action, -1) for action in actions), default=-1)
        while self._cursor < len(order) and order[self._cursor] <= last:
            self._pass(order[self._cursor])

    def skip_micro_batch(self, micro_batch: int) -> None:
        """There is no sample for `micro_batch`: its forwards and backwards are done at once, all else runs."""
        program = self._running_program()
        self._skipped.add(micro_batch)
        order = program.by_lane.get(Lane.COMPUTE, ())
        while self._cursor < len(order):
            position = order[self._cursor]
            if program.instructions[position].action.micro_batch != micro_batch:
                return  # what is left of it, where micro-batches take turns, is passed when the others come to it
            self._pass(position)

    def finish(self) -> Timeline:
        """Run the rest of the compute lane, wait for the other lanes, end the step.

        Raises:
            OutOfOrder: forwards are left that the model did not come to.
        """
        program = self._running_program()
        self._finish_current()
        order = program.by_lane.get(Lane.COMPUTE, ())
        while self._cursor < len(order):
            position = order[self._cursor]
            found = program.instructions[position].action
            if found.kind is Kind.F and found.micro_batch not in self._skipped:
                raise OutOfOrder(f"the program has {found} next, but the model's step is over")
            self._pass(position)
        with self._changed:
            self._wait(lambda: self._idle >= program.by_lane.keys(), "the end of the step")
            self._program = None
        return Timeline(tuple(sorted(self._spans, key=lambda span: span.start_s)))

    def is_done(self, position: int) -> bool:
        """Whether an instruction of the step that ran last was done."""
        return bool(self._done[position])

    def await_lanes(self) -> None:
        """Wait until every lane has left the step that was aborted.

        Raises:
            LaneTimeout: they do not.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: not self._inside, self._deadline_s):
                lanes = ", ".join(sorted(self._inside))
                raise LaneTimeout(
                    f"a step cannot begin: {lanes} did not leave the aborted one within {self._deadline_s:g} s"
                )

    def abort(self, error: BaseException) -> None:
        """Give the step up: every lane stops at its next action, and every wait ends with `error`."""
        with self._changed:
            if self._failure is None:
                self._failure = error
            self._program = None
            self._current = None
            self._changed.notify_all()

    def close(self) -> None:
        """End the lanes. A step that is running is aborted."""
        with self._changed:
            self._closed = True
            if self._program is not None and self._failure is None:
                self._failure = RuntimeError("the executor was closed")
            self._program = None
            self._changed.notify_all()
        for thread in self._threads.values():
            thread.join(timeout=5)
        self._threads.clear()
        if self._failure is not None:  # its traceback holds what the failed step had in memory
            self._failure = RuntimeError("the executor was closed")

    def _running_program(self) -> Program:
        if self._failure is not None:
            raise self._failure
        assert self._program is not None, "no step is running"
        return self._program

    def _finish_current(self) -> None:
        if self._current is not None:
            position, self._current = self._current, None
            self._mark_done(Lane.COMPUTE, position, self._current_start_s)

    def _pass(self, position: int) -> None:
        """Do an instruction of the compute lane here and now; compute actions have nothing left to do."""
        action = self._running_program().instructions[position].action
        self._wait_for(position)
        self._cursor += 1
        if action.kind.is_compute:
            self._mark_done(Lane.COMPUTE, position, None)
        else:
            started = self._clock()
            (self._handlers[action.kind](action) or _done)()
            self._mark_done(Lane.COMPUTE, position, started)

    def _mark_done(self, lane: Lane, position: int, start_s: float | None) -> None:
        program = self._running_program()  # another lane may have failed meanwhile
        if lane is Lane.COMPUTE:
            self._computed()
        if start_s is not None:
            instruction = program.instructions[position]
            end_s = self._clock() - self._start_s
            self._spans.append(
                Span(str(lane), str(instruction.action), start_s - self._start_s, end_s, instruction.num_bytes)
            )
        with self._changed:
            self._done[position] = 1
            self._num_done += 1
            if position in self._awaited:  # whoever is woken for nothing takes time from who computes
                self._changed.notify_all()

    def _wait_for(self, position: int) -> None:
        instruction = self._running_program().instructions[position]
        if self._is_ready(instruction):
            return
        with self._changed:
            self._wait(lambda: self._is_ready(instruction), str(instruction.action), instruction.after)

    def _wait(self, ready: Callable[[], bool], what: str, after: Iterable[int] = ()) -> None:
        """Wait under the lock until `ready`, a failure, or a deadline without any progress."""
        self._awaited.update(after)
        while not ready():
            if self._failure is not None:
                raise self._failure
            before = self._num_done
            if not self._changed.wait(self._deadline_s) and self._num_done == before and not ready():
                raise LaneTimeout(
                    f"{what} waited {self._deadline_s:g} s in which no action finished; {self._pending()}"
                )
        if self._failure is not None:
            raise self._failure

    def _pending(self) -> str:
        """What every lane comes to next and what that waits for, for the message of a deadline."""
        program = self._program
        if program is None:
            return "no step is running"
        words = []
        for lane, order in program.by_lane.items():
            position = next((p for p in order if not self._done[p]), None)
            if position is not None:
                instruction = program.instructions[position]
                missing = [str(program.instructions[b].action) for b in instruction.after if not self._done[b]]
                words.append(f"{lane} is at {instruction.action}, waiting for {', '.join(missing) or 'its end'}")
        return "; ".join(words) or "all lanes are done"

    def _run_lane(self, lane: Lane) -> None:
        seen = 0
        while True:
            with self._changed:
                while not self._closed and (self._program is None or self._step == seen):
                    self._changed.wait()
                if self._closed:
                    return
                program, seen = self._program, self._step
                self._inside.add(lane)
            assert program is not None
            try:
                self._run_lane_step(lane, program)
            except BaseException as error:
                if error is not self._failure:  # else: released from a wait by another lane's failure
                    error.add_note(f"on lane {lane}:\n{''.join(traceback.format_tb(error.__traceback__))}")
                    self.abort(error)
            with self._changed:
                self._inside.remove(lane)
                self._changed.notify_all()

    def _run_lane_step(self, lane: Lane, program: Program) -> None:
        begun: deque[tuple[int, Callable[[], None]]] = deque()
        since_s = self._start_s

        def end_first() -> None:
            nonlocal since_s
            position, end = begun.popleft()
            end()
            with self._changed:
                self._running_program()
                self._mark_done(lane, position, max(started_s[position], since_s))
                since_s = self._clock()  # a lane does one thing at a time: what was begun meanwhile counts from here

        started_s: dict[int, float] = {}
        for position in program.by_lane.get(lane, ()):
            instruction = program.instructions[position]
            while begun and (len(begun) == _NUM_BEGUN or not self._is_ready(instruction)):
                end_first()
            with self._changed:
                if self._program is None:
                    return  # aborted; no other step begins before this lane is out
                self._wait(lambda i=instruction: self._is_ready(i), str(instruction.action), instruction.after)
            started_s[position] = self._clock()
            begun.append((position, self._handlers[instruction.action.kind](instruction.action) or _done))
            if begun[-1][1] is _done:
                while begun:
                    end_first()
        while begun:
            end_first()
        with self._changed:
            self._idle.add(lane)
            self._changed.notify_all()

    def _is_ready(self, instruction: Instruction) -> bool:
        return all(self._done[before] for before in instruction.after)


def _done() -> None:
    """Of an action that its handler has ended."""
