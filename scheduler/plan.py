"""The plan: every decision about one run, small, frozen and JSON. It holds no bytes and no processes.

Owns the decisions and their text. Does not own how they are carried out (`scheduler/passes.py` compiles a plan into a
program) nor how they are found.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from ..memory.chunk import ChunkLayout

__all__ = [
    "Activations",
    "ChunkPlan",
    "GatheredFor",
    "Home",
    "MicroBatchOrder",
    "PipelinePlan",
    "Plan",
    "UpdateTime",
    "plan_for_zero",
    "with_zero",
]


class GatheredFor(StrEnum):
    """How long the gathered copy of a sharded chunk lives."""

    USE = "use"  # dropped after each use: ZeRO-3
    PASS = "pass"  # kept from a micro-batch's forward to its backward
    STEP = "step"  # never dropped: ZeRO-0, 1, 2


class Home(StrEnum):
    """The tier on which a slot of a chunk lies between its uses. Where device and host are the same bytes, it is
    called `host`."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


class Activations(StrEnum):
    """What happens, between forward and backward, to the tensors that autograd saves inside a unit."""

    KEEP = "keep"
    RECOMPUTE = "recompute"  # all but the unit's inputs
    OFFLOAD_HOST = "offload:host"
    OFFLOAD_DISK = "offload:disk"
    SELECTIVE = "recompute:selective"  # all but its inputs and the outputs of matrix products and attention

    @property
    def is_offloaded(self) -> bool:
        return self in (Activations.OFFLOAD_HOST, Activations.OFFLOAD_DISK)

    @property
    def is_recomputed(self) -> bool:
        """Whether units run again, whole or in part, before their backward."""
        return self in (Activations.RECOMPUTE, Activations.SELECTIVE)


class MicroBatchOrder(StrEnum):
    """How the micro-batches of a step follow each other."""

    SEQUENTIAL = "sequential"  # one micro-batch after the other through all units
    BY_UNIT = "by-unit"  # all micro-batches of a unit before the next unit (ALGORITHMS 2.8)


class UpdateTime(StrEnum):
    """When a chunk's optimizer step runs."""

    AFTER = "after"  # after the whole backward pass: where the global gradient norm is needed first
    BACKWARD = "backward"  # as soon as the chunk's gradients are complete


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """What is decided for one chunk.

    Attributes:
        gathered_for: how long the gathered parameters live.
        gradients_sharded: whether a rank keeps the summed gradients of its shard alone (ZeRO-2, 3) or of all (0, 1).
        optimizer_sharded: whether a rank updates its shard alone (ZeRO-1, 2, 3) or everything (0).
        parameter_home: where the rank's part of the parameters lies between uses.
        optimizer_home: where its optimizer slots and masters lie between updates. The update runs on the device where
            they are at home there, else on the host.

    Raises:
        ValueError: parameters or gradients sharded where the optimizer is not (outside ALGORITHMS 1.10's useful cone);
            parameters on the device and optimizer slots elsewhere, or the other way round.
    """

    gathered_for: GatheredFor = GatheredFor.STEP
    gradients_sharded: bool = False
    optimizer_sharded: bool = False
    parameter_home: Home = Home.HOST
    optimizer_home: Home = Home.HOST

    def __post_init__(self) -> None:
        if self.gradients_sharded and not self.optimizer_sharded:
            raise ValueError("a chunk's gradients are sharded but its optimizer slots are not: shard both, or neither")
        if self.parameters_sharded and not self.gradients_sharded:
            raise ValueError("a chunk's parameters are sharded but its gradients are not: shard both, or neither")
        if self.parameter_home is Home.DISK and self.optimizer_sharded and not self.parameters_sharded:
            raise ValueError("a chunk whose gathered copy is never dropped cannot have its parameters at home on disk")
        if (self.parameter_home is Home.DEVICE) != (self.optimizer_home is Home.DEVICE):
            raise ValueError(
                f"a chunk's parameters are at home on the {self.parameter_home} and its optimizer slots on the "
                f"{self.optimizer_home}: what an update reads and writes lies on the device together, or not at all"
            )

    @property
    def parameters_sharded(self) -> bool:
        return self.gathered_for is not GatheredFor.STEP


@dataclass(frozen=True, slots=True)
class PipelinePlan:
    """How the model is cut into stages, and in which order they work.

    Attributes:
        num_ranks: of each pipeline.
        schedule: one of `scheduler/pipelines.NAMES`.
        placement: rank of each stage.
        starts: first unit run of each stage.
        seconds: of F, I and W for each stage, as measured while all ranks compute; empty: equal ones.
        saved_bytes: of one micro-batch's activations in each stage, where they were measured; else empty.
        room_bytes: for activations on each rank, where memory is limited; else empty.
        copies_to_disk: whether the copies of activations that the schedule has are made, to the disk. Where they are
            not, everything stays in memory, as if the schedule had none.
        backward_s: of B for each stage, likewise; empty: as long as I and W.
        alone_s: of F, I, W and B for each stage while no other rank computes; empty: as long as while all do.
        hosts: of each rank: those of one host slow each other down when they compute. Empty: no two do.

    Raises:
        ValueError: stages, starts and seconds that do not belong together.
    """

    num_ranks: int
    schedule: str
    placement: tuple[int, ...]
    starts: tuple[int, ...]
    seconds: tuple[tuple[float, float, float], ...] = ()
    saved_bytes: tuple[int, ...] = ()
    room_bytes: tuple[int, ...] = ()
    copies_to_disk: bool = False
    backward_s: tuple[float, ...] = ()
    alone_s: tuple[tuple[float, float, float, float], ...] = ()
    hosts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if set(self.placement) != set(range(self.num_ranks)):
            raise ValueError(f"stages are placed on ranks {self.placement}, and there are {self.num_ranks}")
        if len(self.starts) != len(self.placement) or len(self.seconds) not in (0, len(self.placement)):
            raise ValueError(
                f"{len(self.placement)} stages have {len(self.starts)} starts and seconds of {len(self.seconds)}"
            )
        if len(self.saved_bytes) not in (0, len(self.placement)) or len(self.room_bytes) not in (0, self.num_ranks):
            raise ValueError(
                f"{len(self.placement)} stages have saved bytes of {len(self.saved_bytes)}, and {self.num_ranks} ranks "
                f"room for {len(self.room_bytes)}"
            )
        if {len(self.backward_s), len(self.alone_s)} - {0, len(self.seconds)} or len(self.hosts) not in (
            0,
            self.num_ranks,
        ):
            raise ValueError(
                f"seconds of {len(self.seconds)} stages come with {len(self.backward_s)} of whole backward passes and "
                f"{len(self.alone_s)} of ranks alone, and hosts of {len(self.hosts)} ranks of {self.num_ranks}"
            )
        if self.room_bytes and not self.saved_bytes:
            raise ValueError("room for activations is given, and not how many bytes they have")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run.

    Attributes:
        world_size: ranks that share the model's state.
        zero: the ZeRO stage that the chunks' decisions amount to.
        micro_batches: per step and rank.
        precision: of the computation, `float32` or `bf16` (with float32 masters).
        clips_gradients: whether the update waits for the global gradient norm.
        prefetch: how many units ahead of their use chunks are gathered.
        chunks: one decision per chunk.
        activations: one decision per unit, in the order in which units are found; empty: all are kept.
        order: of micro-batches.
        update: when chunks are updated.
        unified: whether device and host are the same bytes, so that moving between them is free.
        pipeline: the stages; None: every rank has all of the model. `world_size` counts the ranks of one stage.
        cache_bytes: bound of the host memory for what moves between it and the disk: more than `prefetch` wants lets
            parameters stay, less puts off what is needed last. What one unit needs is always given. 0: what is wanted.
        device_cache_bytes: likewise device memory for copies of parameters whose home is not the device.
        keeps_freed: whether the process keeps blocks that units free for those that come after, also in the next step;
            they are given back to the kernel where the next unit would not fit beside them.

    Raises:
        ValueError: updates inside the backward pass where they wait for the global gradient norm; a home on the device
            where device and host are the same bytes.
    """

    world_size: int
    zero: int
    micro_batches: int
    precision: str
    clips_gradients: bool
    prefetch: int
    chunks: tuple[ChunkPlan, ...]
    activations: tuple[Activations, ...] = ()
    order: MicroBatchOrder = MicroBatchOrder.SEQUENTIAL
    update: UpdateTime = UpdateTime.AFTER
    unified: bool = True
    cache_bytes: int = 0
    device_cache_bytes: int = 0
    pipeline: PipelinePlan | None = None
    keeps_freed: bool = False

    def __post_init__(self) -> None:
        if self.clips_gradients and self.update is UpdateTime.BACKWARD:
            raise ValueError(
                "update='backward' cannot be with clip_grad_norm: no chunk can be updated before the norm of all "
                "gradients is known; use update='after', or train without clipping"
            )
        if self.unified and any(Home.DEVICE in (chunk.parameter_home, chunk.optimizer_home) for chunk in self.chunks):
            raise ValueError(
                "a chunk is at home on the device, and the plan is for a machine whose device and host are the same "
                "bytes: that home is called 'host' there"
            )

    @property
    def uses_disk(self) -> bool:
        """Whether anything of this plan lies on the disk tier."""
        on_disk = any(Home.DISK in (chunk.parameter_home, chunk.optimizer_home) for chunk in self.chunks)
        copies = self.pipeline is not None and self.pipeline.copies_to_disk
        return on_disk or copies or Activations.OFFLOAD_DISK in self.activations

    @property
    def sums_gradients(self) -> bool:
        """Whether a micro-batch's gradients are added to float32 sums that lie elsewhere, instead of where autograd
        makes them."""
        return self.world_size > 1 or self.precision != "float32" or not self.unified

    def brings_up(self, chunk: int) -> bool:
        """Whether a chunk's parameters are on the device as a copy that comes and goes; their home is farther away."""
        return not self.unified and self.chunks[chunk].parameter_home is not Home.DEVICE

    def updates_on_host(self, chunk: int) -> bool:
        """Whether a chunk is updated in another memory than the one its gradients are made in."""
        return not self.unified and self.chunks[chunk].optimizer_home is not Home.DEVICE

    def moves_activations(self, unit: int) -> bool:
        """Whether what a unit saves leaves the memory that it computes in, until its backward."""
        word = self.activations_of(unit)
        return word is Activations.OFFLOAD_DISK or (word is Activations.OFFLOAD_HOST and not self.unified)

    def activations_of(self, unit: int) -> Activations:
        """The decision for a unit, by its place among the units."""
        return self.activations[unit] if self.activations else Activations.KEEP

    def to_json(self) -> str:
        """The plan as JSON text; `from_json` reads it back."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read a plan.

        Raises:
            ValueError: text that is no plan: keys missing, unknown, or values that cannot hold.
        """
        try:
            fields: dict[str, Any] = json.loads(text)
            chunks = tuple(_chunk_from(chunk) for chunk in fields["chunks"])
            activations = tuple(Activations(word) for word in fields.get("activations", ()))
            words = {"order": MicroBatchOrder, "update": UpdateTime}
            choices: dict[str, Any] = {name: kind(fields[name]) for name, kind in words.items() if name in fields}
            choices |= {"pipeline": _pipeline_from(fields["pipeline"])} if fields.get("pipeline") else {}
            return cls(**{**fields, "chunks": chunks, "activations": activations, **choices})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no plan: {type(error).__name__}: {error}") from error


def _chunk_from(fields: dict[str, Any]) -> ChunkPlan:
    kinds = {"gathered_for": GatheredFor, "parameter_home": Home, "optimizer_home": Home}
    if "gathered_for" not in fields:
        raise KeyError("gathered_for")
    return ChunkPlan(**{name: kinds[name](value) if name in kinds else value for name, value in fields.items()})


def _pipeline_from(fields: dict[str, Any]) -> PipelinePlan:
    lists = {name: tuple(fields[name]) for name in ("placement", "starts")}
    others = ("saved_bytes", "room_bytes", "backward_s", "hosts")
    lists |= {name: tuple(fields[name]) for name in others if name in fields}
    tables = {name: tuple(tuple(each) for each in fields.get(name, ())) for name in ("seconds", "alone_s")}
    return PipelinePlan(**{**fields, **lists, **tables})


def plan_for_zero(
    chunks: Iterable[ChunkLayout],
    zero: int,
    world_size: int,
    micro_batches: int = 1,
    precision: str = "float32",
    clips_gradients: bool = False,
    prefetch: int = 1,
) -> Plan:
    """The plan that a ZeRO stage stands for: every chunk treated alike (ALGORITHMS 1.1).

    Raises:
        ValueError: a stage outside 0..3.
    """
    if zero not in (0, 1, 2, 3):
        raise ValueError(
            f"zero={zero!r}: the stages are 0 (replicate), 1 (shard optimizer), 2 (+ gradients), 3 (+ parameters)"
        )
    plan = Plan(
        world_size, zero, micro_batches, precision, clips_gradients, prefetch, tuple(ChunkPlan() for _ in chunks)
    )
    return with_zero(plan, zero)


def with_zero(plan: Plan, zero: int, gathered_for: GatheredFor = GatheredFor.USE) -> Plan:
    """The plan with another ZeRO stage; homes and all else stay.

    Args:
        gathered_for: how long the copies of stage 3 live.
    """
    sharding: dict[str, Any] = {
        "gathered_for": gathered_for if zero == 3 else GatheredFor.STEP,
        "gradients_sharded": zero >= 2,
        "optimizer_sharded": zero >= 1,
    }
    return replace(plan, zero=zero, chunks=tuple(replace(chunk, **sharding) for chunk in plan.chunks))
