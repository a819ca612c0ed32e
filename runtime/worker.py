"""The training loop of one rank, the same in this process and under Ray Train.

Owns the order of things: data, model, engine, steps, callbacks, weights. It does not own what a step does
(`engine.py`), which rows are a rank's (`data.py`), nor processes (`cluster.py`).
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..memory.allocator import return_blocks_at_once, return_freed_blocks
from ..memory.budget import Memory, format_bytes
from ..memory.cores import keep_process_to_share
from ..memory.errors import DoesNotFit
from ..memory.process import read_process_memory
from ..scheduler.drift import DriftWatch, busy_seconds
from .building import Built, build_model, fits_beside, meta_buffers, with_placeholders
from .config import Job, TrainConfig
from .data import DataError, Share, Source, may_open_anew, open_data
from .engine import Engine, StepResult
from .events import Drifted, Failure, Finished, MemoryHeld, Rows, Sink, Started
from .filling import Filler, make_filler
from .plan_only import PlannedEngine
from .run_folder import weights_target
from .typical_step import TypicalStep

__all__ = ["Place", "metrics_row", "shares", "train_on_ray", "train_rank"]


@dataclass(frozen=True)
class Place:
    """Where a rank stands. `num_local`: ranks on this machine, which share its memory."""

    rank: int = 0
    num_ranks: int = 1
    num_local: int = 1


class RankFailed(RuntimeError):
    """What Ray Train gets to see of a failure; the failure itself went to the monitor."""


def train_rank(job: Job, place: Place, sink: Sink, run_path: str) -> None:
    """Train to the end; leave the weights in the run folder `run_path`.

    Raises what the user's code or the engine raises, after it was sent to `sink` as a Failure.
    """
    progress = _Progress()
    try:
        _train(job, place, sink, run_path, progress)
    except Exception as error:
        if place.rank == 0:
            for callback in job.callbacks:
                callback.on_error(error)
        if progress.engine is not None and place.rank == 0 and progress.step:
            sink.send(_finished(place, progress.engine, progress.typical))
        sink.send(Failure.of(error, place.rank, progress.step + 1 if progress.engine is not None else 0))
        raise
    finally:
        if progress.engine is not None:
            progress.engine.close()


@dataclass
class _Progress:
    """How far a rank has come: what a failure report needs to know."""

    engine: Engine | None = None
    step: int = 0  # finished steps
    typical: TypicalStep = dataclasses.field(default_factory=TypicalStep)


def _train(job: Job, place: Place, sink: Sink, run_path: str, progress: _Progress) -> None:
    config = job.config
    return_freed_blocks()  # of whatever this process did before
    base_bytes = read_process_memory().resident_bytes
    memory = (job.memory or Memory()).filled(place.num_local)
    if memory.disk is not None:
        return_blocks_at_once()  # from the first block on: a heap that has grown does not shrink

    def opened(num_data: int) -> tuple[Source, Iterator[Share]]:
        source = open_data(job.data, config, place.rank % num_data, num_data)
        return source, shares(source, config)

    source, parts = opened(job.num_data(place.num_ranks))
    first = next(parts)  # the plan is made for it, before anything is moved
    looks = config.pipeline is None and job.plan is None and place.num_ranks > 1 and may_open_anew(job.data)
    share = (lambda num_data: next(opened(num_data)[1]).samples) if looks else None
    engine = progress.engine = _engine(job, memory, Path(run_path).name, first.samples, share)
    if (better := engine.better) is not None:  # the ranks of a pipeline are given the same samples
        engine.close()
        job = job.with_plan(better.plan)
        source, parts = opened(job.num_data(place.num_ranks))
        first = next(parts)
        engine = progress.engine = _engine(job, memory, Path(run_path).name, first.samples)
        engine.foresee(better)
    prediction = engine.prediction if place.rank == 0 else None
    sink.send(
        Started(
            place.rank,
            place.num_ranks,
            num_steps(source, config),
            {"host": memory.host_bytes} if memory.host_bytes else {},
            base_bytes,
            engine.plan,
            None if prediction is None else prediction.to_json(),
            engine.prediction_note,
        )
    )
    if job.plans_only:
        sink.flush()
        return
    callbacks = job.callbacks if place.rank == 0 else ()
    for callback in callbacks:
        callback.on_start(engine)
    peak_bytes: dict[str, int] = {}
    step: StepResult | None = None
    watch = DriftWatch(engine.prediction if engine.plan.pipeline is None else None)
    for share in itertools.chain([first], parts):
        step = engine.step(share.samples)
        progress.step = step.step
        if place.rank == 0:
            progress.typical.note(step)
        peak_bytes = {tier: max(held, peak_bytes.get(tier, 0)) for tier, held in step.peak_bytes.items()}
        sink.send(MemoryHeld(place.rank, step.step, peak_bytes))
        if place.rank == 0:
            sink.send(Rows((metrics_row(step, share),)))
        for finding in watch.note(step.step, step.timeline, step.peak_bytes):
            sink.send(Drifted(place.rank, finding))
        for callback in callbacks:
            callback.on_step(engine, step)
    assert step is not None, "shares() yields at least one share or raises"
    for callback in callbacks:
        callback.on_end(engine, step)
    with weights_target(run_path) if place.rank == 0 else nullcontext(run_path) as target:
        engine.export(target)
    sink.send(_finished(place, engine, progress.typical))
    sink.flush()


def _finished(place: Place, engine: Engine, typical: TypicalStep) -> Finished:
    trace = None
    if place.rank == 0 and typical.step is not None:
        notes = {"step": typical.step.step, "step_s": typical.step.step_s, "units": list(engine.unit_names)}
        trace = typical.step.timeline.to_chrome() | {"otherData": notes}
    return Finished(place.rank, trace, engine.statistics().peak_bytes_by_slot)


def _engine(
    job: Job, memory: Memory, run_name: str, example: Any = None, share: Callable[[int], Any] | None = None
) -> Engine:
    """Args:
    share: f(data ranks) -> this rank's samples of the first batch where so many share it out; None: no pipelines
        are looked at.
    """
    config = job.config
    built = _built(job, memory)
    try:
        return (PlannedEngine if job.plans_only else Engine)(
            built.model,
            optimizer=job.optimizer,
            lr_scheduler=job.lr_scheduler,
            loss=job.loss,
            forward=job.forward,
            memory=memory,
            micro_batches=config.micro_batches,
            clip_grad_norm=config.clip_grad_norm,
            precision=config.precision,
            zero=config.zero,
            seed=config.seed,
            units=job.units,
            pipeline=config.pipeline or 1,
            schedule=config.schedule,
            chunks=config.chunks,
            stages=config.stages,
            run_name=run_name,
            filler=_filler(job, built, memory),
            offload=config.offload,
            activations=config.activations,
            order=config.order,
            example=example,
            plan=job.plan,
            predict=True,
            shares=share,
        )
    except ValueError as error:
        error.outgrow_argument = True  # type: ignore[attr-defined]  # an argument was refused: the caller gets this very error
        raise


def _built(job: Job, memory: Memory) -> Built:
    """The model, with its values where the user's function gives them and they fit beside the process."""
    if isinstance(job.model, nn.Module):
        return with_placeholders(job.model)

    def build() -> nn.Module:
        model = job.model()
        if not isinstance(model, nn.Module):
            raise _argument_error(f"the model function must return an nn.Module, got {type(model).__name__}")
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise _argument_error(f"the model {type(model).__name__} has no trainable parameter")
        return model

    process_bytes = read_process_memory().resident_bytes
    return build_model(
        build, job.config.seed, lambda needed: fits_beside(needed, process_bytes, memory.host_bytes), job.units
    )


def _filler(job: Job, built: Built, memory: Memory) -> Filler | None:
    """What gives the model its first values; None: it has them.

    Raises:
        DoesNotFit: a model that its function could not build in full, and nothing else that gives values.
        ValueError: a model on meta without anything that gives values.
    """
    kind = type(built.model).__name__
    filler = make_filler(job.init, job.config.weights, job.config.seed, built.model)
    if filler is None and not built.has_values:
        if isinstance(job.model, nn.Module):
            raise ValueError(
                f"parameters of this {kind} are on torch's meta device, so they have no values; give init=f(module) or "
                "weights='folder'"
            )
        budget = format_bytes(memory.host_bytes or 0)
        raise DoesNotFit(
            f"this {kind} takes {format_bytes(built.num_bytes)} as its function builds it, and the host budget of "
            f"{budget} does not have that beside the process and one more copy of the largest unit, so its own "
            "initialisation cannot run. Give init=f(module), which initialises one unit at a time, weights='folder' "
            "with safetensors files, or more memory"
        )
    bare = meta_buffers(built.model)
    if bare:
        raise ValueError(
            f"buffers of this {kind} are on torch's meta device, and nothing gives them values: {', '.join(bare[:4])}"
            f"{', ...' if len(bare) > 4 else ''}; build the model by a function without torch.device('meta'), which "
            "leaves buffers real, or give weights= that hold them"
        )
    return filler


def _argument_error(message: str) -> ValueError:
    error = ValueError(message)
    error.outgrow_argument = True  # type: ignore[attr-defined]
    return error


def shares(source: Source, config: TrainConfig) -> Iterator[Share]:
    """This rank's shares, epoch after epoch, until `steps` or `epochs` are done. Raises DataError where none come."""
    num_steps = 0
    for epoch in itertools.count() if config.epochs is None else range(config.epochs):
        before = num_steps
        for share in source.epoch(epoch):
            yield share
            num_steps += 1
            if num_steps == config.steps:
                return
        if num_steps == before:
            raise DataError(
                f"the data yielded nothing in epoch {epoch}: it gave {num_steps} batches before and then no sample; "
                "a stream that can be read only once must be given as a function that opens it anew"
                if num_steps
                else "the data yielded nothing: not one sample came out of it"
            )


def num_steps(source: Source, config: TrainConfig) -> int | None:
    """Steps of the whole run, or None where only the end of the data will tell."""
    if config.steps is not None:
        return config.steps
    return source.num_batches * config.epochs if source.num_batches is not None and config.epochs else None


def metrics_row(step: StepResult, share: Share) -> dict[str, Any]:
    """One row of the metrics: seconds, tokens and samples are of the global step, peak bytes and the seconds in which
    each lane was busy of rank 0."""
    return {
        "step": step.step,
        "epoch": share.epoch,
        "loss": step.loss,
        "tokens_per_s": step.num_tokens / step.step_s if step.step_s else 0.0,
        "grad_norm": step.grad_norm,
        "lr": step.lr,
        "num_samples": step.num_samples,
        "num_tokens": step.num_tokens,
        "step_s": step.step_s,
        **{f"peak_{tier}_bytes": held for tier, held in step.peak_bytes.items()},
        **({} if step.saved_bytes is None else {"peak_saved_bytes": step.saved_bytes}),
        **{f"busy_{lane}_s": seconds for lane, seconds in busy_seconds(step.timeline).items()},
    }


def train_on_ray(config: Mapping[str, Any]) -> None:
    """The function that Ray Train calls on every worker.

    Args:
        config: `job` (a reference to the Job), `monitor` (the actor), `run_path`, `num_threads`, `data_in_ray`.
    """
    import ray
    import ray.train

    from .monitor import MonitorSink

    context = ray.train.get_context()
    place = Place(context.get_world_rank(), context.get_world_size(), context.get_local_world_size())
    monitor = config["monitor"]
    if not ray.get(monitor.register.remote(place.rank, ray.get_runtime_context().current_actor)):
        raise RankFailed(f"rank {place.rank} did not start: the run was cancelled")
    torch.set_num_threads(config["num_threads"])
    if not torch.cuda.is_available():  # beside a GPU, what a rank's core does is not what a step waits for
        keep_process_to_share(context.get_local_rank(), place.num_local)
    sink = MonitorSink(monitor)
    try:
        job: Job = ray.get(config["job"][0])
        if config["data_in_ray"]:
            job = dataclasses.replace(job, data=ray.train.get_dataset_shard("train"))
    except Exception as error:  # what travelled here cannot be unpacked: a module is missing on this machine, say
        sink.send(Failure.of(error, place.rank, 0))
        raise RankFailed(f"rank {place.rank} could not unpack its job: {type(error).__name__}") from None
    try:
        train_rank(job, place, sink, config["run_path"])
    except Exception as error:
        # The monitor has the failure with all that is known; Ray Train only has to know that there is one.
        raise RankFailed(f"rank {place.rank} failed: {type(error).__name__}") from None
