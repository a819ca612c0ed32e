"""Contestants of a benchmark: groups of rank processes that are started once and then take turns.

Owns starting the processes, asking them, rotating the turns and ending them. It does not own what a contestant does
(`peers.py`, `ours.py`: a *member* is built in each of its processes by `rank.py`) nor what is made of the answers
(`case_*.py`). It does not import torch.

         parent                              contestant "DDP", rank 0        rank 1
    start ---- builder, arguments ---------> init_process_group, build model  (alike)
    round 0:   "step" 0 -------------------> barrier, step                    barrier, step
               <--- StepReport ------------- seconds, loss, peak bytes        (alike)
               ... the next contestant's turn; these ranks sleep in a read of their pipe
    close ---- end of file ----------------> leave

In round i the first turn goes to contestant i mod n. While one steps, the processor time of the others is added up: one
that does not sleep between its turns would slow the rest, and `Group.idle_shares` shows it.
"""

import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from ..memory.errors import OutgrowError

__all__ = ["Contestant", "ContestantFailed", "Group", "StepReport"]


class ContestantFailed(OutgrowError):
    """A contestant's process raised, died or did not answer in time; the message has its name, rank and traceback."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way of doing the work that a case measures.

    Attributes:
        name: as in tables.
        builder: `module:function` of this package; called in every rank's process as `function(context, **arguments)`.
        num_ranks: processes. Two and more form a gloo process group.
        num_threads: of torch, a rank.
        arguments: for the builder; must pickle.
        requires: importable names without which the contestant is reported as missing.
        environment: variables set for its processes alone.

    Raises:
        ValueError: no rank or no thread.
    """

    name: str
    builder: str
    num_ranks: int = 1
    num_threads: int = 1
    arguments: dict[str, Any] = field(default_factory=dict)
    requires: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_ranks < 1 or self.num_threads < 1:
            raise ValueError(f"{self.name} needs a rank and a thread, got {self.num_ranks} and {self.num_threads}")

    @property
    def missing(self) -> tuple[str, ...]:
        """What it requires and this Python cannot import."""
        return tuple(name for name in self.requires if find_spec(name) is None)


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a rank answers after one training step.

    Attributes:
        seconds: from behind a barrier of all ranks to this rank's end of the step.
        loss: mean over the global batch.
        peak_rss_bytes: the process's greatest resident set during the step, shared pages included.
    """

    seconds: float
    loss: float
    peak_rss_bytes: int


class _Running:
    """The processes of one contestant."""

    def __init__(self, contestant: Contestant, folder: Path) -> None:
        self.contestant = contestant
        self._logs: list[Path] = []
        self.connections: list[Connection] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        store = folder / "store"
        folder.mkdir(parents=True)
        for rank in range(contestant.num_ranks):
            ours, theirs = socket.socketpair()
            log = folder / f"rank{rank}.log"
            with theirs, log.open("wb") as output:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", f"{__package__}.rank", str(theirs.fileno())],
                        pass_fds=[theirs.fileno()],
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        env={
                            **os.environ,
                            "OMP_NUM_THREADS": str(contestant.num_threads),
                            "GLOO_SOCKET_IFNAME": "lo",
                            **contestant.environment,
                        },
                    )
                )
            self._logs.append(log)
            self.connections.append(Connection(ours.detach()))
            self._send(rank, (contestant, rank, str(store)))

    def _send(self, rank: int, message: object) -> None:
        with suppress(OSError):  # the process is gone; collecting its answer says how
            self.connections[rank].send(message)

    def ask(self, method: str, arguments: tuple[object, ...]) -> None:
        for rank in range(len(self.connections)):
            self._send(rank, (method, arguments))

    def collect(self, timeout_s: float) -> list[Any]:
        """One answer of every rank, in their order; the first failure raises without waiting for the rest."""
        deadline = time.monotonic() + timeout_s
        answers: dict[int, Any] = {}
        while len(answers) < len(self.connections):
            waiting = {self.connections[rank]: rank for rank in range(len(self.connections)) if rank not in answers}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise ContestantFailed(
                    f"{self.contestant.name}: no answer of rank {sorted(waiting.values())} in {timeout_s:.0f} s; "
                    f"last output: {self._tail(min(waiting.values()))}"
                )
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting[connection]
                answers[rank] = self._receive(connection, rank)
        return [answers[rank] for rank in sorted(answers)]

    def _receive(self, connection: Connection, rank: int) -> Any:
        try:
            is_ok, answer = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            raise ContestantFailed(
                f"{self.contestant.name}: the process of rank {rank} ended with {self.processes[rank].wait(10)}; "
                f"last output: {self._tail(rank)}"
            ) from None
        if not is_ok:
            raise ContestantFailed(f"{self.contestant.name}, rank {rank}:\n{answer}")
        return answer

    def _tail(self, rank: int) -> str:
        return self._logs[rank].read_text(errors="replace")[-2000:].strip() or "none"

    def cpu_s(self) -> float:
        """Processor seconds that its processes have used so far."""
        total = 0.0
        for process in self.processes:
            try:
                times = psutil.Process(process.pid).cpu_times()
            except psutil.Error:
                continue
            total += times.user + times.system
        return total

    def close(self, grace_s: float) -> None:
        for connection in self.connections:
            connection.close()
        deadline = time.monotonic() + grace_s
        for process in self.processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class Group:
    """Contestants that stand ready at the same time and take turns. A context manager: leaving it ends their processes.

    Args:
        contestants: distinct names. Those with something `missing` are left out.
        timeout_s: for one answer, the first (which includes imports and building the model) among them.
        say: is given a short line at every turn.

    Raises:
        ContestantFailed: by every method, when a process raises, dies or is late.
        ValueError: two contestants of one name.
    """

    def __init__(
        self,
        contestants: Sequence[Contestant],
        *,
        timeout_s: float = 600.0,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        names = [contestant.name for contestant in contestants]
        if len(set(names)) < len(names):
            raise ValueError(f"contestants of one group need names of their own, got {names}")
        self.contestants = tuple(contestant for contestant in contestants if not contestant.missing)
        self._timeout_s = timeout_s
        self._say = say
        self._running: dict[str, _Running] = {}
        self._idle_cpu_s: dict[str, float] = {}
        self._idle_s: dict[str, float] = {}

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="outgrow-perf-", ignore_cleanup_errors=True)
        try:
            for index, contestant in enumerate(self.contestants):
                self._say(f"starting {contestant.name}")
                running = _Running(contestant, Path(self._folder.name) / str(index))
                self._running[contestant.name] = running
            for running in self._running.values():
                self._say(f"building {running.contestant.name}")
                running.collect(self._timeout_s)
        except BaseException:
            self._close(grace_s=0.0)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close(grace_s=10.0 if kind is None else 0.0)

    def _close(self, grace_s: float) -> None:
        for running in self._running.values():
            running.close(grace_s)
        self._running.clear()
        self._folder.cleanup()

    def ask(self, name: str, method: str, *arguments: object) -> list[Any]:
        """Call `method(*arguments)` of the contestant's member in every rank; their answers in their order."""
        others = {key: running.cpu_s() for key, running in self._running.items() if key != name}
        started = time.monotonic()
        self._running[name].ask(method, arguments)
        answers = self._running[name].collect(self._timeout_s)
        elapsed_s = time.monotonic() - started
        for key, before_s in others.items():
            self._idle_cpu_s[key] = self._idle_cpu_s.get(key, 0.0) + self._running[key].cpu_s() - before_s
            self._idle_s[key] = self._idle_s.get(key, 0.0) + elapsed_s
        return answers

    def rounds(self, num_rounds: int, method: str = "step", first: int = 0) -> dict[str, list[list[Any]]]:
        """Let everyone take one turn a round: name -> for every round, the answers of its ranks.

        The method is called with the number of the round, which counts from `first`.
        """
        answers: dict[str, list[list[Any]]] = {contestant.name: [] for contestant in self.contestants}
        for turn in range(first, first + num_rounds):
            for place in range(len(self.contestants)):
                name = self.contestants[(turn + place) % len(self.contestants)].name
                self._say(f"round {turn + 1 - first} of {num_rounds}: {name}")
                answers[name].append(self.ask(name, method, turn))
        return answers

    def idle_shares(self) -> dict[str, float]:
        """Name -> processor seconds for each second in which it was not its turn. 1 is a whole core."""
        return {key: self._idle_cpu_s[key] / self._idle_s[key] for key in self._idle_s if self._idle_s[key] > 0}
