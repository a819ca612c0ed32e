"""Where a measurement was taken: machine, system, versions, commit and date.

Owns the fingerprint that every report stores, so that two reports can be told apart before they are compared. It
measures no speed. It imports none of the packages whose versions it names.
"""

import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

__all__ = ["Environment", "ProcessorTime", "installed_version"]


def installed_version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@dataclass(frozen=True, slots=True)
class Environment:
    """A machine and its software at the time of a run.

    Attributes:
        cpu: model name.
        num_cores: cores that this process may use.
        memory_bytes: of the machine.
        kernel: system and release.
        python: version.
        packages: distribution name -> version, None where it is not installed.
        commit: of the project's repository with `+changes` where the tree was not clean; None outside a repository.
        date: UTC, ISO 8601.
    """

    cpu: str
    num_cores: int
    memory_bytes: int
    kernel: str
    python: str
    packages: dict[str, str | None]
    commit: str | None
    date: str

    @classmethod
    def detect(cls) -> "Environment":
        return cls(
            cpu=_cpu_model(),
            num_cores=len(os.sched_getaffinity(0)),
            memory_bytes=psutil.virtual_memory().total,
            kernel=f"{platform.system()} {platform.release()}",
            python=platform.python_version(),
            packages={name: installed_version(name) for name in ("torch", "ray", "numpy", "numba", "deepspeed")},
            commit=_commit(Path(__file__).resolve().parent),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def __str__(self) -> str:
        packages = ", ".join(f"{name} {found}" for name, found in self.packages.items() if found)
        return (
            f"{self.cpu}, {self.num_cores} cores, {self.memory_bytes / 2**30:.1f} GiB, {self.kernel}; "
            f"Python {self.python}, {packages}; commit {self.commit or 'unknown'}; {self.date}"
        )


@dataclass(frozen=True, slots=True)
class ProcessorTime:
    """Seconds of all processors since the machine started.

    Attributes:
        used_s: that it computed for anyone.
        lost_s: that it would have, had the host not given them to other machines ("steal"); 0 where nobody says.
    """

    used_s: float
    lost_s: float

    @classmethod
    def now(cls) -> "ProcessorTime":
        times = psutil.cpu_times()
        idle_s = times.idle + getattr(times, "iowait", 0.0)
        lost_s = getattr(times, "steal", 0.0)
        guests_s = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # in user and nice already
        return cls(sum(times) - idle_s - lost_s - guests_s, lost_s)

    def lost_since(self, before: "ProcessorTime") -> float:
        """The part of what was asked for since `before` that was not given."""
        used_s, lost_s = self.used_s - before.used_s, self.lost_s - before.lost_s
        return lost_s / (used_s + lost_s) if used_s + lost_s > 0 else 0.0


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit(folder: Path) -> str | None:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.SubprocessError):
        return None
