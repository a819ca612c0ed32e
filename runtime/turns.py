"""Micro-batches that take turns at unit borders: each runs the model's own code in a thread, one of them at a time.

Owns whose turn it is. The order is the program's: a thread that comes to a compute action waits until all compute
actions before it are done, and meanwhile the thread of the next one runs. Any model can be run unit by unit over all
micro-batches in this way, without knowing of it. Does not own what the actions are (programs) nor what they do.

The state of torch's default random generator belongs to the micro-batch whose turn it is.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from ..memory.cores import keep_to_own_cores
from ..memory.errors import LaneTimeout
from ..parallel.actions import Action
from .executor import Executor

__all__ = ["Turns"]


class Turns:
    """The turns of one step.

    Args:
        executor: a step has begun on it when `run` is called.
        leave, enter: called with a micro-batch's number when its turn ends before the program is done with it, and when
            its next one begins.
        deadline_s: how long a turn may last.
    """

    def __init__(
        self,
        executor: Executor,
        leave: Callable[[int], None] = lambda number: None,
        enter: Callable[[int], None] = lambda number: None,
        deadline_s: float = 1800.0,
    ) -> None:
        self._executor = executor
        self._leave = leave
        self._enter = enter
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._awaited: dict[int, threading.Condition] = {}  # one for each: only whose turn it is wakes up
        self._holder: int | None = None
        self._numbers: set[int] = set()
        self._finished: set[int] = set()
        self._failure: BaseException | None = None
        self._local = threading.local()
        # Kept from step to step: kernels have a team of helpers for each thread that computes, which is costly to make.
        self._threads: ThreadPoolExecutor | None = None
        self._num_threads = 0

    def run(self, bodies: Sequence[tuple[int, Callable[[], None]]]) -> None:
        """Run each micro-batch's body, in turns, to the end.

        Args:
            bodies: number of the micro-batch, and what takes it through the model and back.

        Raises: what the first body to fail raised; the others are ended.
        """
        if not bodies:
            return
        self._numbers = {number for number, _ in bodies}
        self._awaited = {number: threading.Condition(self._lock) for number in self._numbers}
        self._holder = min(self._numbers)
        self._finished = set()
        threads = self._threads_for(len(bodies))
        for ended in [threads.submit(self._run_body, *body) for body in bodies]:
            ended.result()
        failure, self._failure = self._failure, None  # the next step begins without it
        if failure is not None:
            raise failure

    def close(self) -> None:
        """End the threads; another step makes new ones."""
        if self._threads is not None:
            self._threads.shutdown()
        self._threads, self._num_threads = None, 0

    def _threads_for(self, num_bodies: int) -> ThreadPoolExecutor:
        if self._threads is None or self._num_threads < num_bodies:
            self.close()
            self._threads = ThreadPoolExecutor(num_bodies, initializer=_begin, initargs=(torch.get_num_threads(),))
            self._num_threads = num_bodies
        return self._threads

    def advance_to(self, action: Action) -> None:
        """Come to a compute action, when it is its turn.

        Raises: what `Executor.advance_to` raises; the failure of another micro-batch.
        """
        me = getattr(self._local, "number", None)
        if me is None:
            self._executor.advance_to(action)
            return
        if self._executor.next_compute(self._finished) == action:  # the turn goes on, or the first one begins
            self._local.has_begun = True
            self._executor.advance_to(action)
            return
        random_state = torch.get_rng_state()
        if self._local.has_begun:
            self._leave(me)
        while True:
            following = self._await_turn(me, action)
            if following is None or following == action:
                break
            self._executor.pass_over(following)  # no gradient reached it
        self._executor.advance_to(action)  # what comes before may still need what the last turn left
        if self._local.has_begun:
            self._enter(me)
        self._local.has_begun = True
        torch.set_rng_state(random_state)

    def _await_turn(self, me: int, action: Action) -> Action | None:
        """Hand over to whose compute action comes next, and wait until that is this micro-batch's own: returned."""
        with self._lock:
            self._hand_over(me)
            if not self._awaited[me].wait_for(
                lambda: self._holder == me or self._failure is not None, self._deadline_s
            ):
                raise LaneTimeout(
                    f"{action} waited {self._deadline_s:g} s for its turn; micro-batch {self._holder} has it"
                )
            if self._failure is not None:
                raise _Ended
            return self._executor.next_compute(self._finished)

    def _hand_over(self, me: int) -> None:
        """Give the turn to the micro-batch that the program has next; those that are over need none. Under the lock."""
        following = self._executor.next_compute(self._finished)
        self._holder = me if following is None or following.micro_batch is None else following.micro_batch
        if self._holder in self._awaited:
            self._awaited[self._holder].notify_all()

    def _leave_unfinished(self, me: int) -> None:
        """The program goes on with this micro-batch later, past backward actions that no gradient reached."""
        with self._lock:
            following = self._executor.next_compute(self._numbers - {me})
        if following is not None:
            self._leave(me)

    def _run_body(self, number: int, body: Callable[[], None]) -> None:
        threading.current_thread().name = f"micro-batch-{number}"
        self._local.number = number
        self._local.has_begun = False
        try:
            with self._lock:
                self._awaited[number].wait_for(lambda: self._holder == number or self._failure is not None)
                if self._failure is not None:
                    return
            body()
            self._leave_unfinished(number)
        except _Ended:
            return
        except BaseException as error:
            with self._lock:
                if self._failure is None:
                    self._failure = error
                for awaited in self._awaited.values():
                    awaited.notify_all()
        else:
            with self._lock:
                self._finished.add(number)
                self._hand_over(number)


def _begin(num_threads: int) -> None:
    """A thread that is to compute with so many threads."""
    torch.set_num_threads(num_threads)  # torch keeps it for each thread
    keep_to_own_cores()


class _Ended(BaseException):
    """Another micro-batch has failed: unwind this one's thread."""
