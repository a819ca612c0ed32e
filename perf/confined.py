"""Training runs in processes of their own, each inside a memory cgroup or free: a job in, an outcome out.

Owns `Job`, `Outcome`, starting the process and telling how it ended. It does not own what the process does
(`confined_work.py`) nor the cgroup (`cgroup.py`). It imports no torch: the process joins its group first, so that all
that torch takes is counted.

    parent                                   python -m outgrow.perf.confined
    makes the cgroup -- Job on stdin ------> writes its number to the group, then loads torch
                     <- a line an event ---- {"startup_s": 5.1, ...}, {"step_s": [2.3], ...}, ...
    reads how it ended, the group's peak, whether the kernel killed it; the last line is what it came to

Of several ranks each has a process and a cgroup of its own, with the same limit.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..memory.worker_environment import worker_environment
from .cgroup import MemoryCgroup

__all__ = ["Job", "Outcome", "last_outcome", "run_confined"]

_MIB = 1 << 20
_TIMEOUT_S = 4 * 3600.0
_WORST = ("trained", "refused", "failed", "killed")  # what a killed rank's peers fail with follows from it


@dataclass(frozen=True, slots=True)
class Job:
    """A training to be run.

    Attributes:
        who: "engine", "plain" (PyTorch with the same accumulation) or "deepspeed" (ZeRO-3, all state on disk).
        model: the fields of `GPTConfig`.
        num_steps: to train.
        micro_batches: that the batch is cut into.
        budget_bytes: what the engine is told; None: it is told of no limit.
        folder: for the disk tier, or where DeepSpeed keeps its state; None: none.
        offload, activations: as the engine's arguments; with activations "recompute", peers checkpoint every block.
        join_file: of the cgroup to join; None: none.
        num_ranks: processes that train together; each has its part of the batch.
        rank: which of them a process is.
        meeting_file: over which they find each other.

    Raises:
        ValueError: another `who`, no steps, several ranks of a peer, micro-batches or no folder for DeepSpeed, or
            activations that a peer does not know.
    """

    who: str
    model: dict[str, int]
    num_steps: int
    micro_batches: int = 1
    budget_bytes: int | None = None
    folder: str | None = None
    offload: str | None = None
    activations: str | None = None
    join_file: str | None = None
    num_ranks: int = 1
    rank: int = 0
    meeting_file: str | None = None

    def __post_init__(self) -> None:
        if self.who not in ("engine", "plain", "deepspeed") or self.num_steps < 1:
            raise ValueError(f"a job is of the engine or of a peer and has a step, got {self.who} {self.num_steps}")
        if self.num_ranks < 1 or (self.who != "engine" and self.num_ranks > 1):
            raise ValueError(f"the engine has ranks, a peer is one, got {self.who} on {self.num_ranks}")
        if self.who == "deepspeed" and (self.folder is None or self.micro_batches != 1):
            raise ValueError(
                f"DeepSpeed needs a folder and takes one micro-batch, got {self.folder} {self.micro_batches}"
            )
        if self.who != "engine" and self.activations not in (None, "recompute"):
            raise ValueError(f"a peer keeps its activations or recomputes them, got {self.activations}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a job came to.

    Attributes:
        end: "trained", "refused" (DoesNotFit before step 1), "killed" (by the kernel, for memory), "failed".
        message: the error, where it did not train.
        startup_s: from the process's begin, imports included, to step 1.
        step_s, losses, read_bytes, write_bytes: of every step that was done.
        busy_s: of the last step, by lane.
        resident_peak_bytes: VmHWM of the process.
        group_peak_bytes: of the cgroup; None without one.
        predicted_bytes: what the planner said the peak would be; None where it had nothing to plan.
        plan: what was planned, in words.
    """

    end: str = "failed"
    message: str = ""
    startup_s: float = 0.0
    step_s: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()
    read_bytes: tuple[int, ...] = ()
    write_bytes: tuple[int, ...] = ()
    busy_s: tuple[tuple[str, float], ...] = ()
    resident_peak_bytes: int = 0
    group_peak_bytes: int | None = None
    predicted_bytes: int | None = None
    plan: str = ""

    @property
    def peaks(self) -> str:
        """In words: what the process and the group held at the most, and what was predicted."""
        words = [f"VmHWM {self.resident_peak_bytes / _MIB:,.0f} MiB"]
        if self.group_peak_bytes is not None:
            words.append(f"cgroup {self.group_peak_bytes / _MIB:,.0f} MiB")
        if self.predicted_bytes is not None:
            words.append(f"predicted {self.predicted_bytes / _MIB:,.0f} MiB")
        return ", ".join(words)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Outcome":
        document = json.loads(text)
        document["busy_s"] = tuple((str(lane), float(seconds)) for lane, seconds in document["busy_s"])
        for name in ("step_s", "losses", "read_bytes", "write_bytes"):
            document[name] = tuple(document[name])
        return cls(**document)


def run_confined(job: Job, limit_bytes: int | None = None) -> Outcome:
    """Run a job, each of its ranks in a process and a fresh cgroup of `limit_bytes` of its own, or free. Of several
    ranks: rank 0's outcome, or that of the one that fared worst, with the greatest peaks of all.

    Raises:
        CgroupUnavailable: no group can be made.
    """
    if job.num_ranks == 1:
        return _run_rank(job, limit_bytes)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(job.num_ranks) as pool:
        ranks = [replace(job, rank=rank, meeting_file=f"{folder}/meeting") for rank in range(job.num_ranks)]
        outcomes = list(pool.map(lambda each: _run_rank(each, limit_bytes), ranks))
    groups = [outcome.group_peak_bytes for outcome in outcomes if outcome.group_peak_bytes is not None]
    return replace(
        max(outcomes, key=lambda outcome: _WORST.index(outcome.end)),
        resident_peak_bytes=max(outcome.resident_peak_bytes for outcome in outcomes),
        group_peak_bytes=max(groups, default=None),
    )


def _run_rank(job: Job, limit_bytes: int | None) -> Outcome:
    if limit_bytes is None:
        return _run(job)[0]
    with MemoryCgroup(limit_bytes) as group:
        outcome, status = _run(replace(job, join_file=str(group.join_file)))
        outcome = replace(outcome, group_peak_bytes=group.peak_bytes())
        if status == -signal.SIGKILL and group.num_killed():
            outcome = replace(outcome, end="killed", message=f"by the kernel, at the limit of {limit_bytes:,} bytes")
        return outcome


def _run(job: Job) -> tuple[Outcome, int]:
    with tempfile.TemporaryFile() as errors:
        done = subprocess.run(
            [sys.executable, "-m", f"{__package__}.confined"],
            input=json.dumps(asdict(job)).encode(),
            stdout=subprocess.PIPE,
            stderr=errors,
            timeout=_TIMEOUT_S,
            check=False,
            env={
                **os.environ,
                "OMP_NUM_THREADS": str(max(2 // job.num_ranks, 1)),
                "GLOO_SOCKET_IFNAME": "lo",
                **(worker_environment() if job.who == "engine" else {}),  # as workers of a run have them
            },
        )
        errors.seek(0)
        tail = errors.read().decode(errors="replace").strip()[-1000:]
    outcome = last_outcome(done.stdout.decode(errors="replace"))
    if done.returncode:
        outcome = replace(outcome, end="failed", message=f"ended with {done.returncode}: {tail or 'no output'}")
    return outcome, done.returncode


def last_outcome(output: str) -> Outcome:
    """The last whole line of a process's output that is an outcome; one of nothing where there is none."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            try:
                return Outcome.from_json(line)
            except (ValueError, KeyError, TypeError):
                continue
    return Outcome()


def main() -> None:
    job = Job(**json.loads(sys.stdin.read()))
    if job.join_file is not None:
        Path(job.join_file).write_text(str(os.getpid()))
    from .confined_work import work  # torch: only now that the group counts

    for outcome in work(job):
        sys.stdout.write(outcome.to_json() + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
