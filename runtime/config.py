"""What a run was asked to do: `RuntimeConfig` (where it runs) and `TrainConfig` (what it trains), frozen and validated.

Owns every check of an argument that needs neither Ray nor the data. It does not own the checks against the machine
(`cluster.py`), nor those against the data (`data.py`). All raise before a process starts.
"""

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..memory.budget import Memory
    from ..scheduler.plan import Plan

__all__ = [
    "DEFAULT_BATCH_SIZE",
    "DEFAULT_STEPS",
    "PRECISIONS",
    "Job",
    "RuntimeConfig",
    "TrainConfig",
    "check_batch_size",
]

PRECISIONS = {"float32": "float32", "fp32": "float32", "bfloat16": "bf16", "bf16": "bf16"}
OFFLOADS = ("none", "host", "optimizer", "all")
ACTIVATIONS = ("keep", "recompute", "offload:host", "offload:disk")
ORDERS = ("sequential", "by-unit")
PLACEMENT_STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")


class _Default(int):
    """An int that knows that nobody asked for it: compared by identity with what was passed."""


DEFAULT_STEPS = _Default(1000)
DEFAULT_BATCH_SIZE = _Default(32)


@dataclass(frozen=True)
class RuntimeConfig:
    """Where runs happen and where they are kept.

    Attributes:
        workers: ranks on Ray; 0 trains in this process, without Ray.
        memory: the budget of each worker; None detects it from the machine or its cgroup.
        address: None starts Ray on this machine (or uses the one this process has already), else as in `ray.init`.
        resources_per_worker: as in Ray Train, e.g. `{"CPU": 2}`; None: a share of this machine's cores, or one CPU.
        placement_strategy: one of PACK, SPREAD, STRICT_PACK, STRICT_SPREAD.
        storage_path: where run folders go, a path or a URI that `pyarrow.fs` opens; None: `runs` in the current folder.
        name: the run folder's name; None makes one of the time.
        progress: show step, loss, speed and memory on the console while a run goes on.
    """

    workers: int
    memory: "Memory | None" = None
    address: str | None = None
    resources_per_worker: Mapping[str, float] | None = None
    placement_strategy: str = "PACK"
    storage_path: str | None = None
    name: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        _check_int("workers", self.workers, at_least=0, hint="0 trains in this process, N >= 1 on N Ray workers")
        if self.memory is not None and not hasattr(self.memory, "host"):
            raise ValueError(f"memory must be outgrow.Memory(...) or None, got {self.memory!r}")
        if self.address is not None and not isinstance(self.address, str):
            raise ValueError(f'address must be None, "auto" or "ray://host:port", got {self.address!r}')
        if self.workers == 0:
            for name in ("address", "resources_per_worker"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} means Ray, but workers=0 trains in this process; "
                        "give workers=1 or more"
                    )
        if self.placement_strategy not in PLACEMENT_STRATEGIES:
            raise ValueError(
                f"placement_strategy must be one of {', '.join(PLACEMENT_STRATEGIES)}, got {self.placement_strategy!r}"
            )
        for resource, amount in (self.resources_per_worker or {}).items():
            if (
                not isinstance(resource, str)
                or isinstance(amount, bool)
                or not isinstance(amount, int | float)
                or amount < 0
            ):
                raise ValueError(f"resources_per_worker must map names to amounts >= 0, got {resource!r}: {amount!r}")
        if (self.name is not None and not re.fullmatch(r"[^/\\\0]+", self.name or "")) or self.name in (".", ".."):
            raise ValueError(f"name must be the name of a folder, without slashes, got {self.name!r}")

    def run_name(self, now: datetime) -> str:
        """The run folder's name: the one given, or one made of the time `now`."""
        return self.name or now.strftime("%Y-%m-%d_%H-%M-%S_%f")[:-3]


@dataclass(frozen=True)
class TrainConfig:
    """What a run trains, all that fits into JSON.

    Attributes:
        batch_size: samples in a global batch, over all ranks and micro-batches.
        shuffle: draw the samples of each epoch in an order that depends on `seed` and epoch alone.
        micro_batches: gradient accumulation; each rank cuts its part of the batch into so many. "auto": as the planner
            finds fastest, which decides how gradients round.
        steps: stop after so many updates (None where `epochs` rules).
        epochs: stop after so many passes over the data (None where `steps` rules).
        clip_grad_norm: the global gradient norm is scaled down to this; None leaves it.
        precision: "float32", or "bf16" (computes in bfloat16 with float32 masters).
        zero: 0 to 3 fixes what is sharded, None leaves it to the planner.
        offload: "none", "host", "optimizer" or "all" fixes what lies elsewhere than it is computed with; None: what
            does not fit into memory.
        activations: "keep", "recompute", "offload:host" or "offload:disk", for all units or a list with a word for
            each; None: "keep" where it fits.
        order: of micro-batches, "sequential" or "by-unit"; None: the leaner one where memory is tight.
        pipeline: ranks that the model is spread over; 1: each has all of it; None: what is fastest.
        schedule, chunks, stages: of the pipeline (`pipeline_words.py`).
        seed: seeds the order of data, the model's initialisation where a function builds it, and dropout.
        weights: a safetensors file, an index of several, or the folder that holds them, by its absolute path; the
            model starts with these values. None: with its own.
    """

    batch_size: int = DEFAULT_BATCH_SIZE
    shuffle: bool = False
    micro_batches: int | str = 1
    steps: int | None = DEFAULT_STEPS
    epochs: int | None = None
    clip_grad_norm: float | None = None
    precision: str = "float32"
    zero: int | None = None
    offload: str | None = None
    activations: str | tuple[str, ...] | None = None
    order: str | None = None
    pipeline: int | None = None
    schedule: str | None = None
    chunks: int | None = None
    stages: tuple[str, ...] | None = None
    seed: int = 0
    weights: str | None = None
    batch_size_given: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        _check_int("batch_size", self.batch_size, at_least=1, hint="it counts the samples of a global batch")
        if self.micro_batches != "auto":
            hint = "or 'auto' for as many as is fastest"
            _check_int("micro_batches", self.micro_batches, at_least=1, hint=hint)
        _check_int("seed", self.seed, at_least=0)
        if not isinstance(self.shuffle, bool):
            raise ValueError(f"shuffle must be True or False, got {self.shuffle!r}")
        if self.epochs is not None:
            _check_int("epochs", self.epochs, at_least=1)
            if self.steps is not None and self.steps is not DEFAULT_STEPS:
                raise ValueError(f"steps={self.steps} and epochs={self.epochs} both say when to stop; give one of them")
            object.__setattr__(self, "steps", None)
        elif self.steps is None:
            raise ValueError("steps=None needs epochs=; give one of them")
        else:
            _check_int("steps", self.steps, at_least=1)
        if self.clip_grad_norm is not None:
            norm = self.clip_grad_norm
            if isinstance(norm, bool) or not isinstance(norm, int | float) or not (norm > 0 and math.isfinite(norm)):
                raise ValueError(f"clip_grad_norm must be a number > 0 or None, got {norm!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.zero is not None and (isinstance(self.zero, bool) or self.zero not in (0, 1, 2, 3)):
            raise ValueError(f"zero must be 0, 1, 2, 3 or None (the planner's choice), got {self.zero!r}")
        if self.weights is not None:
            object.__setattr__(self, "weights", _absolute_path("weights", self.weights))
        words = {"offload": OFFLOADS, "order": ORDERS}
        for name, known in words.items():
            if getattr(self, name) not in (None, *known):
                raise ValueError(f"{name}={getattr(self, name)!r}: there is {', '.join(map(repr, known))}")
        each = (self.activations,) if isinstance(self.activations, str) else self.activations or ()
        for word in each:
            if word not in ACTIVATIONS:
                raise ValueError(f"activations={word!r}: there is {', '.join(map(repr, ACTIVATIONS))}")
        size = 1 if self.pipeline is None else self.pipeline
        if (size, self.schedule, self.chunks, self.stages) != (1, None, None, None):
            from .pipeline_words import PipelineWords

            words = PipelineWords(size, self.schedule, self.chunks, self.stages)
            words.check(self.activations, self.order)
        object.__setattr__(self, "batch_size_given", self.batch_size is not DEFAULT_BATCH_SIZE)
        object.__setattr__(self, "precision", PRECISIONS[self.precision])

    def num_data(self, num_ranks: int) -> int:
        """Among how many ranks the samples are shared out: those of a pipeline all get the same.

        Raises:
            ValueError: ranks that the pipeline does not divide.
        """
        size = self.pipeline or 1
        if num_ranks % size:
            raise ValueError(
                f"pipeline={size}: each pipeline takes so many workers, and workers={num_ranks}; give a "
                "number that divides them, or other workers"
            )
        return num_ranks // size

    def to_json(self) -> dict[str, Any]:
        """The arguments as they go into result.json."""
        fields = {name: value for name, value in asdict(self).items() if name != "batch_size_given"}
        return {name: int(value) if isinstance(value, _Default) else value for name, value in fields.items()}


@dataclass(frozen=True)
class Job:
    """All that one rank needs to train: the configuration, and the user's objects as they were passed to `train`."""

    config: TrainConfig
    model: Any
    data: Any
    loss: Callable[..., Any] | None = None
    optimizer: Callable[..., Any] | None = None
    lr_scheduler: Callable[..., Any] | None = None
    forward: Callable[..., Any] | None = None
    callbacks: tuple[Any, ...] = ()
    units: Any = None
    memory: "Memory | None" = None
    init: Callable[..., Any] | None = None
    plan: "Plan | None" = None
    plans_only: bool = False

    def num_data(self, num_ranks: int) -> int:
        """Among how many ranks the samples are shared out. Raises ValueError as `TrainConfig.num_data`."""
        pipeline = None if self.plan is None else self.plan.pipeline
        config = self.config if pipeline is None else replace(self.config, pipeline=pipeline.num_ranks)
        return config.num_data(num_ranks)

    def with_plan(self, plan: "Plan") -> "Job":
        """The same training with this plan, which decides what the words of the configuration left open or fixed."""
        words = {"zero": None, "offload": None, "activations": None, "order": None, "pipeline": None}
        return replace(self, plan=plan, config=replace(self.config, **words, micro_batches=plan.micro_batches))

    def __post_init__(self) -> None:
        from torch import nn

        if isinstance(self.model, nn.Module):
            if not any(parameter.requires_grad for parameter in self.model.parameters()):
                raise ValueError(
                    f"the model {type(self.model).__name__} has no trainable parameter: every one of its "
                    f"{sum(1 for _ in self.model.parameters())} parameters is frozen; set requires_grad on some"
                )
        elif isinstance(self.model, type) or not callable(self.model):
            raise ValueError(
                f"model must be an nn.Module, or a function without arguments that builds one, got {self.model!r}"
            )
        if self.init is not None and self.config.weights is not None:
            raise ValueError("init= and weights= both say which values the model starts with; give one of them")
        for name in ("loss", "optimizer", "lr_scheduler", "forward", "init"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise ValueError(f"{name} must be a function or None, got {value!r}")
        from .callbacks import Callback

        for callback in self.callbacks:
            if not isinstance(callback, Callback):
                raise ValueError(f"callbacks must be outgrow.Callback objects, got {callback!r}")


def check_batch_size(batch_size: int, num_ranks: int, micro_batches: int | str) -> None:
    """Raise ValueError unless a full batch divides by ranks x micro-batches (a last, smaller one need not)."""
    micro_batches = micro_batches if isinstance(micro_batches, int) else 1
    parts = num_ranks * micro_batches
    if batch_size % parts:
        below, above = batch_size // parts * parts, -(-batch_size // parts) * parts
        choices = f"{below} or {above}" if below else f"{above}"
        raise ValueError(
            f"batch_size={batch_size} does not divide by {num_ranks} ranks x {micro_batches} micro-batches = {parts}; "
            f"the nearest that do: {choices} (only the last batch of an epoch may be smaller)"
        )


def _absolute_path(name: str, path: Any) -> str:
    """Workers may run in another folder than the caller."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ValueError(f"{name} must be a path or None, got {path!r}")
    text = os.fspath(path)
    if not isinstance(text, str) or re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise ValueError(f"{name} must be the path of a file or folder that every worker can open, got {path!r}")
    return os.path.abspath(text)


def _check_int(name: str, value: Any, *, at_least: int, hint: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name} must be an integer >= {at_least}, got {value!r}" + (f"; {hint}" if hint else ""))
