"""What one rank holds while a program goes on, action by action: which update of which slot lies where.

Owns the meaning of every action and what it needs, told without looking at how programs are made. Does not own lanes
and dependencies (`verify.py`): here the actions happen in the order in which they are written.

Slots have *versions*, the number of updates since the step began. Computing needs version 0 of a chunk, wherever it
lies; an update makes version 1; and when the step is over, everything is at home with it, but for the writes that the
next step carries.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from ..parallel.actions import Action, Kind
from .plan import Activations, GatheredFor, Home, MicroBatchOrder, Plan, UpdateTime
from .program import StepShape

__all__ = ["Holdings", "Refused", "is_gathered", "needs"]


class Refused(Exception):
    """An action that cannot be here; says why."""


def is_gathered(chunk: int, plan: Plan) -> bool:
    """Whether units compute with a copy that is put together from all ranks' shards."""
    return plan.world_size > 1 and plan.chunks[chunk].optimizer_sharded


def needs(unit: int, shape: StepShape) -> tuple[int, ...]:
    """Chunks that a unit run computes with."""
    return tuple(sorted({*shape.held, *shape.units[unit].chunks}))


def _refuse_unless(holds: bool, why: str) -> None:
    if not holds:
        raise Refused(why)


@dataclass
class Holdings:
    """The state of one rank in one step. `apply` each action, then `finish`.

    Args:
        carried: slots (`c3:optim`) whose last update the step before has left in memory, to be written in this one.
        leaves: those that this step leaves to the next one.
        kept: those of them that stay in their buffer when they are written: their first READ moves nothing.
    """

    one_by_one: ClassVar[bool] = True  # whether a micro-batch is over before the next one begins, if the plan says so
    shape: StepShape
    plan: Plan
    carried: frozenset[str] = frozenset()
    leaves: frozenset[str] = frozenset()
    kept: frozenset[str] = frozenset()
    memory: dict[str, int | None] = field(default_factory=dict)  # slot -> version; None: it is not there
    disk: dict[str, int] = field(default_factory=dict)
    full: dict[int, int | None] = field(default_factory=dict)  # chunk -> version of its gathered copy
    device: dict[int, int | None] = field(default_factory=dict)  # chunk -> version of the copy that was brought up
    down: dict[int, int | None] = field(default_factory=dict)  # chunk -> micro-batch whose gradients came down
    taken: dict[int, int] = field(default_factory=dict)  # chunk -> micro-batches whose gradients went elsewhere
    away: set[tuple[int, int]] = field(default_factory=set)  # activations that were saved and not loaded
    loaded: set[tuple[int, int]] = field(default_factory=set)
    done: dict[tuple[Kind, int], int] = field(default_factory=dict)  # micro-batches that (kind, unit) has had
    reduced: dict[int, int] = field(default_factory=dict)  # chunk -> micro-batches
    updated: dict[int, int] = field(default_factory=dict)  # chunk -> updates
    normed: bool = False
    _found: set[str] = field(default_factory=set)  # of what was kept
    micro_batch: int = 0  # the last one that was computed with

    def __post_init__(self) -> None:
        for c, (chunk, decision) in enumerate(zip(self.shape.chunks, self.plan.chunks, strict=True)):
            self.full[c] = self.device[c] = self.down[c] = None
            self.taken[c] = self.reduced[c] = self.updated[c] = 0
            homes = {"param": decision.parameter_home, "optim": decision.optimizer_home}
            for slot, home in homes.items():
                name = f"c{c}:{slot}"
                if home is not Home.DISK:
                    self.memory[name] = 0
                elif slot == "param" or chunk.optim_bytes:
                    self.disk[name] = -1 if name in self.carried else 0
                    self.memory[name] = 0 if name in self.carried else None
        self._handlers = {
            Kind.F: self._forward,
            Kind.B: self._backward,
            Kind.I: self._backward,
            Kind.W: self._weight_gradient,
            Kind.R: self._recompute,
            Kind.READ: self._read,
            Kind.WRITE: self._write,
            Kind.DROP: self._drop,
            Kind.GATHER: self._gather,
            Kind.UP: self._up,
            Kind.DOWN: self._down,
            Kind.SAVE: self._save,
            Kind.LOAD: self._load,
            Kind.REDUCE: self._reduce,
            Kind.NORM: self._norm,
            Kind.STEP: self._step,
        }

    def apply(self, action: Action) -> None:
        """Do one action. Raises `Refused`."""
        handler = self._handlers.get(action.kind)
        _refuse_unless(handler is not None, "no rank that computes all units knows this action")
        assert handler is not None
        limit = len(self.shape.units) if action.kind.is_compute else len(self.shape.chunks)
        if action.kind in (Kind.SAVE, Kind.LOAD):
            limit = len(self.shape.units)
        _refuse_unless(action.index is None or action.index < limit, f"there are {limit} of what it counts")
        in_range = action.micro_batch is None or action.micro_batch < self.plan.micro_batches
        _refuse_unless(in_range, f"a step has {self.plan.micro_batches} micro-batches")
        handler(action)

    def finish(self) -> None:
        """The step is over. Raises `Refused` where something is left over or was left out."""
        self._all_computed()
        for c, chunk in enumerate(self.shape.chunks):
            _refuse_unless(self.updated[c] == chunk.trainable, f"chunk {c} was not updated")
            _refuse_unless(self.device[c] is None, f"the copy of chunk {c} on the device is never dropped")
            stays = self.plan.chunks[c].gathered_for is GatheredFor.STEP
            _refuse_unless(self.full[c] is None or stays, f"the gathered copy of chunk {c} is never dropped")
        _refuse_unless(self.normed, "there is no NORM")
        _refuse_unless(not self.away, f"activations stay away: {sorted(self.away)}")
        for name, version in self.disk.items():
            due = self.updated[_chunk_of(name)]
            if name in self.leaves:
                _refuse_unless(self.memory[name] == due, f"{name} is to be written in the next step and is not there")
            else:
                _refuse_unless(self.memory[name] is None, f"{name} is left in memory")
                _refuse_unless(version == due, f"{name} on disk misses an update")

    def live_buffers(self) -> set[str]:
        """Names of buffers that hold something."""
        names = {name for name in self.disk if self.memory[name] is not None}
        names |= {f"c{c}:device" for c, version in self.device.items() if version is not None}
        names |= {f"c{c}:grad" for c, micro_batch in self.down.items() if micro_batch is not None}
        names |= {f"a{run}.{m}" for run, m in self.away if self._waits_on_host(run)}
        return names | {f"a{run}.{m}" + ("" if self.plan.unified else ":device") for run, m in self.loaded}

    def _waits_on_host(self, run: int) -> bool:
        """Whether activations that are away stay in their buffer."""
        word = self.plan.activations_of(self.shape.units[run].unit)
        return not self.plan.unified and word is Activations.OFFLOAD_HOST

    # ---- compute

    def _count(self, action: Action, *before: tuple[Kind, int]) -> tuple[int, int]:
        """Micro-batches come to a unit in order, once each, and after `before`."""
        u, m = action.index, action.micro_batch
        assert u is not None
        assert m is not None
        had = self.done.get((action.kind, u), 0)
        _refuse_unless(had == m, f"it comes after {had} micro-batches, in the order 0, 1, 2, ... it is number {m}")
        for kind, unit in before:
            _refuse_unless(self.done.get((kind, unit), 0) > m, f"it needs {Action(kind, unit, m)}, which comes later")
        if self.one_by_one and self.plan.order is MicroBatchOrder.SEQUENTIAL:
            _refuse_unless(m >= self.micro_batch, f"micro-batches go one by one, and {self.micro_batch} has begun")
            self.micro_batch = m
        self.done[action.kind, u] = had + 1
        for chunk in needs(u, self.shape):
            self._find_parameters(chunk)
        return u, m

    def _find_parameters(self, chunk: int) -> None:
        if is_gathered(chunk, self.plan):
            where, found = "gathered", self.full[chunk]
        elif self.plan.brings_up(chunk):
            where, found = "on the device", self.device[chunk]
        else:
            where, found = "in memory", self.memory[f"c{chunk}:param"]
        _refuse_unless(found is not None, f"chunk {chunk} is not {where}")
        _refuse_unless(found == 0, f"chunk {chunk} {where} is of another step ({found} updates later)")

    def _forward(self, action: Action) -> None:
        u = action.index
        assert u is not None
        self._count(action, *([(Kind.F, u - 1)] if u else []))

    def _backward(self, action: Action) -> None:
        u, m = action.index, action.micro_batch
        assert u is not None
        assert m is not None
        _refuse_unless(self.shape.units[u].has_backward, "no gradient reaches this unit")
        other = Kind.I if action.kind is Kind.B else Kind.B
        _refuse_unless(not self.done.get((other, u)), f"this unit has {other} already")
        self._count(action, *self._before_backward(u, m))
        _refuse_unless((u, m) not in self.away, f"the activations of {Action(Kind.F, u, m)} are away")
        if action.kind is Kind.B:
            self.loaded.discard((u, m))
            self._begin_gradients(u, m)

    def _before_backward(self, u: int, _m: int) -> list[tuple[Kind, int]]:
        later = [v for v in range(u + 1, len(self.shape.units)) if self.shape.units[v].has_backward][:1]
        split = [Kind.I if self.done.get((Kind.I, v)) else Kind.B for v in later]
        return [(Kind.F, len(self.shape.units) - 1), *zip(split, later, strict=True)]

    def _weight_gradient(self, action: Action) -> None:
        u = action.index
        assert u is not None
        _, m = self._count(action, (Kind.I, u))
        self.loaded.discard((u, m))
        self._begin_gradients(u, m)

    def _recompute(self, action: Action) -> None:
        u, m = action.index, action.micro_batch
        assert u is not None
        assert m is not None
        gone = [kind for kind in (Kind.B, Kind.I) if self.done.get((kind, u), 0) > m]
        _refuse_unless(not gone, "its backward is over")
        self._count(action, (Kind.F, u))

    def _begin_gradients(self, u: int, m: int) -> None:
        """A finished micro-batch's gradients must have been taken before the next one's run into them."""
        for chunk in needs(u, self.shape) if self.plan.sums_gradients else ():
            if self.shape.chunks[chunk].trainable and self.shape.last_backward_of(chunk) == u:
                _refuse_unless(
                    self.taken[chunk] == m, f"gradients of chunk {chunk} still are of the micro-batch before"
                )

    def _runs(self) -> Sequence[int]:
        """Unit runs that this rank computes."""
        return range(len(self.shape.units))

    def _all_computed(self) -> None:
        for u in self._runs():
            self._all(Kind.F, u)
            if self.shape.units[u].has_backward:
                self._all(Kind.I if self.done.get((Kind.I, u)) else Kind.B, u)
                if self.done.get((Kind.I, u)):
                    self._all(Kind.W, u)

    def _all(self, kind: Kind, u: int, micro_batches: int | None = None) -> None:
        due = self.plan.micro_batches if micro_batches is None else micro_batches
        had = self.done.get((kind, u), 0)
        _refuse_unless(had >= due, f"{Action(kind, u, had)} is missing")

    def _has_gradients(self, chunk: int, micro_batches: int) -> None:
        """Raise where gradients of `micro_batches` are not complete."""
        for u in self._runs():
            if chunk in self.shape.held:
                self._all(Kind.F, u, micro_batches)
            if self.shape.units[u].has_backward and chunk in needs(u, self.shape):
                self._all(Kind.W if self.done.get((Kind.I, u)) else Kind.B, u, micro_batches)

    # ---- gradients and updates

    def _reduce(self, action: Action) -> None:
        c, m = _index(action), action.micro_batch
        _refuse_unless(self.plan.sums_gradients, "one rank sums float32 gradients where they are")
        _refuse_unless(self.shape.chunks[c].trainable, "this chunk is not trained")
        _refuse_unless(self.reduced[c] == m, f"{self.reduced[c]} micro-batches were summed, the next is another")
        _refuse_unless(not self.updated[c], "the chunk is updated already")
        self.reduced[c] += 1
        if self.plan.updates_on_host(c):
            _refuse_unless(self.down[c] == m, "the gradients are not on the host")
            self.down[c] = None
        else:
            self.taken[c] += 1
        self._has_gradients(c, self.reduced[c])

    def _down(self, action: Action) -> None:
        c, m = _index(action), action.micro_batch
        _refuse_unless(self.shape.chunks[c].trainable, "this chunk is not trained")
        _refuse_unless(self.plan.updates_on_host(c), "the chunk is updated where its gradients are made")
        _refuse_unless(self.taken[c] == m, f"gradients of {self.taken[c]} micro-batches came down, the next is another")
        _refuse_unless(self.down[c] is None, "those of the micro-batch before are not summed yet")
        self.taken[c] += 1
        self.down[c] = m
        self._has_gradients(c, self.taken[c])

    def _complete(self, c: int) -> None:
        if self.plan.sums_gradients:
            had = self.reduced[c]
            _refuse_unless(
                had == self.plan.micro_batches, f"gradients of chunk {c} are summed over {had} micro-batches only"
            )
        self._has_gradients(c, self.plan.micro_batches)

    def _norm(self, _action: Action) -> None:
        _refuse_unless(not self.normed, "the norm is taken once a step")
        self.normed = True
        self._all_computed()  # the loss goes with it, and is known when the last backward is over
        trainable = [c for c, chunk in enumerate(self.shape.chunks) if chunk.trainable]
        for c in trainable:
            self._complete(c)
            if self.plan.clips_gradients or (self.plan.world_size == 1 and self.plan.update is UpdateTime.AFTER):
                _refuse_unless(not self.updated[c], f"chunk {c} is updated already, its gradients are gone")
            elif self.plan.world_size == 1:
                _refuse_unless(self.updated[c] == 1, f"the update of chunk {c} has not taken its norm yet")

    def _step(self, action: Action) -> None:
        c = _index(action)
        _refuse_unless(self.shape.chunks[c].trainable, "this chunk is not trained")
        _refuse_unless(not self.updated[c], "the chunk is updated already")
        self._complete(c)
        _refuse_unless(self.device[c] is None, "a copy on the device would miss the update")
        early = not self.normed and self.plan.clips_gradients
        _refuse_unless(not early, "gradients are clipped before the norm is known")
        for name in (f"c{c}:param", f"c{c}:optim"):
            if name in self.memory:
                _refuse_unless(self.memory[name] is not None, f"{name} is not in memory")
                self.memory[name] = 1
        self.updated[c] = 1

    # ---- moves

    def _slot(self, action: Action) -> str:
        name = f"c{action.index}:{action.slot}"
        _refuse_unless(name in self.disk, f"{name} is not at home on disk")
        return name

    def _read(self, action: Action) -> None:
        name = self._slot(action)
        _refuse_unless(self.memory[name] is None, f"{name} is in memory already")
        _refuse_unless(self.disk[name] == self.updated[_index(action)], f"{name} on disk misses an update")
        self.memory[name] = self.disk[name]

    def _write(self, action: Action) -> None:
        name = self._slot(action)
        version = self.memory[name]
        _refuse_unless(version is not None, f"{name} is not in memory")
        assert version is not None
        stays = name in self.kept and version == 0  # what the step before left, and this one uses
        self.disk[name], self.memory[name] = version, version if stays else None

    def find_kept(self, action: Action) -> None:
        """A READ that moves nothing, as what it brings is still there. Raises `Refused`."""
        name = self._slot(action)
        _refuse_unless(name in self.carried, f"{name} was not left in memory by the step before")
        _refuse_unless(name not in self._found, f"{name} is found for the second time")
        _refuse_unless(self.memory[name] == self.disk[name] == 0, f"{name} is no longer what the step before left")
        self._found.add(name)

    def _drop(self, action: Action) -> None:
        c = _index(action)
        if action.slot is None:
            _refuse_unless(self.full[c] is not None, f"chunk {c} is not gathered")
            self.full[c] = None
            return
        if action.slot == "device":
            _refuse_unless(self.device[c] is not None, f"chunk {c} is not on the device")
            self.device[c] = None
            return
        name = self._slot(action)
        _refuse_unless(self.memory[name] is not None, f"{name} is not in memory")
        _refuse_unless(self.memory[name] == self.disk[name], f"an update of {name} is lost")
        self.memory[name] = None

    def _gather(self, action: Action) -> None:
        c = _index(action)
        _refuse_unless(is_gathered(c, self.plan), "the ranks share nothing of this chunk")
        _refuse_unless(self.full[c] is None, f"chunk {c} is gathered already")
        version = self.device[c] if self.plan.brings_up(c) else self.memory[f"c{c}:param"]
        _refuse_unless(version is not None, f"this rank's part of chunk {c} is not there")
        self.full[c] = version

    def _up(self, action: Action) -> None:
        c = _index(action)
        _refuse_unless(self.plan.brings_up(c), "the parameters are where units compute")
        _refuse_unless(self.device[c] is None, f"chunk {c} is on the device already")
        _refuse_unless(self.memory[f"c{c}:param"] is not None, f"c{c}:param is not in host memory")
        self.device[c] = self.memory[f"c{c}:param"]

    def _save(self, action: Action) -> None:
        place = (_index(action), action.micro_batch or 0)
        unit, m = place
        _refuse_unless(self.done.get((Kind.F, unit), 0) > m, "nothing was computed yet")
        _refuse_unless(place not in self.away and place not in self.loaded, "it is away already, or was")
        gone = [kind for kind in (Kind.B, Kind.I) if self.done.get((kind, unit), 0) > m]
        _refuse_unless(not gone, "its backward is over")
        self.away.add(place)

    def _load(self, action: Action) -> None:
        place = (_index(action), action.micro_batch or 0)
        _refuse_unless(place in self.away, "it is not away")
        self.away.discard(place)
        self.loaded.add(place)


def _index(action: Action) -> int:
    assert action.index is not None
    return action.index


def _chunk_of(name: str) -> int:
    return int(name[1:].split(":")[0])
