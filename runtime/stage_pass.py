"""Micro-batches through the stages of one rank: the model's own forward with the other stages' units left out.

Owns a stage's pass: placeholders for what earlier stages compute, what was received in the place of the last unit
before the stage, the end of the forward after its last unit, and the backward from received gradients to those that are
sent on. Does not own the order (programs, schedules), the transport (`parallel/mail.py`) nor what happens around units
(`unit_hooks.py`).
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves

from ..memory.errors import OutgrowError
from ..memory.live_bytes import LiveBytes
from ..parallel.actions import Action, Kind
from ..parallel.mail import Mail
from ..parallel.units import Unit
from ..scheduler.dataflow import Flow, TensorSpec
from ..scheduler.pipeline_program import Stages
from .direct_layers import DirectLayers
from .executor import Executor
from .model_state import ModelState
from .moving import MovingActivations
from .passage import Passage
from .saved_tensors import saved_by_place, watched
from .split_backward import Deferred, run_backward
from .stage_ends import LeftOut, Receive
from .unit_hooks import Pass, StageEnd, UnitHooks

__all__ = ["MicroBatch", "StagePasses"]

_At = tuple[int, int]  # stage, micro-batch


@dataclass(frozen=True)
class MicroBatch:
    """One part of a rank's batch.

    Attributes:
        part: the samples; None: there are none.
        weight: its share of the global batch's samples.
        flow: what goes from unit to unit in it.
    """

    part: Any
    weight: float
    flow: Flow | None


@dataclass
class _Opened:
    """A stage's pass between its forward and its backward."""

    current: Pass
    deferred: Deferred
    edges: list[GradientEdge | None] = field(default_factory=list)  # of what it returned; None: no gradient
    received: dict[int, torch.Tensor] = field(default_factory=dict)  # gradients of what was received, by place
    loss: torch.Tensor | None = None


class StagePasses:
    """The passes of one rank, step after step.

    Args:
        split: whether the schedule has backward passes in two parts.
        has_backward: whether gradients flow into each unit run.
        chunks: of each stage, for its unit runs in the order of the backward pass, the chunks that a run is the first
            to come to and that no other stage of this rank uses.
    """

    def __init__(
        self,
        passage: Passage,
        units: Sequence[Unit],
        hooks: UnitHooks,
        executor: Executor,
        stages: Stages,
        mail: Mail,
        split: bool,
        has_backward: Sequence[bool],
        chunks: Sequence[Mapping[int, Sequence[int]]],
    ) -> None:
        self._passage = passage
        self._units = units
        self._hooks = hooks
        self._executor = executor
        self._stages = stages
        self._mail = mail
        self._split = split
        self._has_backward = has_backward
        self._chunks = chunks
        self._state: ModelState | None = None
        self.moving: MovingActivations | None = None
        self._step = 0
        self._micro: Sequence[MicroBatch] = ()
        self._opened: dict[_At, _Opened] = {}
        self._arrived: dict[tuple[Kind, int, int], list[torch.Tensor | None]] = {}
        self._leaving: dict[tuple[Kind, int, int], list[torch.Tensor | None]] = {}
        self._layers = DirectLayers(passage.model)
        self._live = LiveBytes()
        self._is_watching = True
        self._flows: tuple[int, ...] = ()
        self._known: dict[tuple[int, ...], tuple[tuple[Action, int], ...]] = {}
        self.losses: dict[int, float] = {}
        """Micro-batch -> its mean loss, where this rank has the last stage."""
        self.levels: list[tuple[Action, int]] = []
        """Each stage-level action of the step, and the bytes that were kept for backward passes behind it: as it was in
        the first step with micro-batches of these shapes, where activations stay where they are."""

    def install(self) -> None:
        """Let units of other stages be left out, and layers defer their weight gradients."""
        self._layers.install()
        for unit in self._units:
            own = unit.module.__dict__
            own["forward"] = LeftOut(unit.module, unit.module.forward, self._hooks, self._stand_in)

    def remove(self) -> None:
        """Put the units' forwards back."""
        for unit in self._units:
            own = unit.module.__dict__
            if isinstance(own.get("forward"), LeftOut):
                own["forward"].put_back()
        self._layers.remove()

    def begin(self, step: int, micro: Sequence[MicroBatch], state: ModelState) -> None:
        """A step begins."""
        self.forget()
        self._step, self._micro, self._state = step, micro, state
        batches = [leaf for each in micro for leaf in tree_leaves(each.part) if isinstance(leaf, torch.Tensor)]
        # What is kept follows from the shapes of the micro-batches: one look is enough, where nothing moves meanwhile.
        self._flows = tuple(id(each.flow) for each in micro)
        known = self._known.get(self._flows) if self.moving is None else None
        self._is_watching = known is None
        self._live.begin([*self._passage.model.buffers(), *batches])
        self.levels = list(known or ())

    def end(self) -> None:
        """All actions of the step are done."""
        self._known[self._flows] = tuple(self.levels)

    def forget(self) -> None:
        """What a step that failed has left."""
        self._opened, self._arrived, self._leaving, self.losses = {}, {}, {}, {}

    def run(self, action: Action) -> None:
        """One stage-level action.

        Raises: what the model raises; NotFinite; OutgrowError where outputs have other shapes than recorded.
        """
        stage, number = action.index, action.micro_batch
        assert stage is not None
        assert number is not None
        if self._micro[number].part is None:
            return
        try:
            match action.kind:
                case Kind.F:
                    self._forward(stage, number)
                case Kind.B | Kind.I:
                    self._backward(stage, number, action.kind)
                case Kind.W:
                    self._weights(stage, number)
                case _:
                    return
        finally:
            self._hooks.end()
        if not self._is_watching:
            return
        loaded_bytes = self.moving.loaded_bytes() if self.moving is not None else 0
        self.levels.append((action, self._live.num_bytes() + loaded_bytes))

    def show(self, tensor: torch.Tensor) -> None:
        """Something keeps a tensor for a backward pass."""
        if self._is_watching:
            self._live.show(tensor)

    @property
    def peak_bytes(self) -> int:
        """The most that was kept for backward passes between two actions of the step that ran last."""
        return max((num_bytes for _, num_bytes in self.levels), default=0)

    # ---- transfers: on the net lane

    def send(self, action: Action) -> None:
        stage, number = _place(action)
        if self._micro[number].part is None:
            return
        forward = action.kind is Kind.SEND_F
        tensors = self._leaving.pop((action.kind, stage, number))
        specs = self._specs(stage + 1 if forward else stage, number, forward)
        target = self._stages.placement[stage + 1 if forward else stage - 1]
        key = (str(Kind.SEND_F if forward else Kind.SEND_B), stage + 1 if forward else stage - 1, number)
        self._mail.send(target, key, tensors, [_like(spec) for spec in specs])

    def receive(self, action: Action) -> None:
        stage, number = _place(action)
        if self._micro[number].part is None:
            return
        forward = action.kind is Kind.RECV_F
        specs = self._specs(stage if forward else stage + 1, number, forward)
        source = self._stages.placement[stage - 1 if forward else stage + 1]
        key = (str(Kind.SEND_F if forward else Kind.SEND_B), stage, number)
        self._arrived[action.kind, stage, number] = self._mail.receive(source, key, [_like(spec) for spec in specs])

    def _specs(self, stage: int, number: int, forward: bool) -> tuple[TensorSpec, ...]:
        """Of what goes into `stage`, or, backwards, of the gradients that come out of it."""
        flow = self._micro[number].flow
        assert flow is not None
        specs = flow.outputs[self._stages.starts[stage] - 1].specs
        return specs if forward else tuple(spec for spec in specs if spec.requires_grad)

    # ---- passes: on the compute lane

    def _forward(self, stage: int, number: int) -> None:
        micro, runs = self._micro[number], self._stages.runs(stage)
        deferred = Deferred(not self._split, self.show)
        self._executor.await_next()  # what was received, and chunks that code outside of units uses
        current = self._hooks.begin_forward(self._step, number, runs)
        opened = self._opened[stage, number] = _Opened(current, deferred)
        deferred.run_of = lambda: current.backward
        with self._saving(), self._deferring(stage, number, deferred):
            if stage > 0:
                self._inputs = self._taken_in(stage, number, opened)
            try:
                output = self._passage.forward(self._passage.model, micro.part)
                loss = self._passage.call_loss(output, micro.part)
            except StageEnd as end:
                self._hand_on(stage, number, opened, end.output)
            else:
                del output
                opened.loss = loss
                self.losses[number] = self._passage.checked(loss, self._hooks, self._step, number)
        self._inputs = None
        self._hooks.end_forward()
        self._executor.complete({Action(Kind.F, run, number) for run in runs})

    def _backward(self, stage: int, number: int, kind: Kind) -> None:
        opened = self._opened[stage, number]
        actions = self._actions(kind, stage, number)
        if actions:
            self._executor.await_next()
        roots, gradients = self._roots(stage, number, opened)
        self._hooks.begin_backward(opened.current, kind)
        if roots:
            with self._deferring(stage, number, opened.deferred):
                run_backward(roots, gradients)
        self._hooks.end_backward()
        if kind is Kind.B:
            opened.deferred.finish()
            del self._opened[stage, number]
            self._release(stage, number)
        else:
            opened.edges, opened.loss = [], None
            self._put_by(stage, number)
        if stage > 0 and self._stages.with_gradient[stage]:
            specs = self._specs(stage, number, forward=True)
            places = [place for place, spec in enumerate(specs) if spec.requires_grad]
            out = [opened.received.get(place) for place in places]
            key = Kind.RECV_B if self._stages.is_local(stage) else Kind.SEND_B
            if key is Kind.RECV_B:
                self._arrived[key, stage - 1, number] = out
            else:
                self._leaving[key, stage, number] = out
            opened.received = {}
        self._executor.complete(actions)

    def _weights(self, stage: int, number: int) -> None:
        opened = self._opened.pop((stage, number))
        for run in reversed(self._stages.runs(stage)):
            if self._has_backward[run]:
                self._executor.advance_to(Action(Kind.W, run, number))  # the micro-batch before has been reduced
                self._take_back(stage, run, number)
                opened.deferred.finish(run)
                if self.moving is not None:
                    self.moving.release(run, number)
        opened.deferred.finish()
        self._release(stage, number)
        self._executor.complete(self._actions(Kind.W, stage, number))

    def _release(self, stage: int, number: int) -> None:
        """The stage's pass is over: also activations that no gradient reached are forgotten."""
        if self.moving is not None:
            for run in self._stages.runs(stage):
                self.moving.release(run, number)

    def _put_by(self, stage: int, number: int) -> None:
        """Where gradients are reduced after each micro-batch: those that are there already wait for the rest, apart
        from the next micro-batch's."""
        assert self._state is not None
        for chunks in self._chunks[stage].values():
            self._state.stash_gradients(chunks, self._key(stage, number))

    def _take_back(self, stage: int, run: int, number: int) -> None:
        """Not before the run's turn: a chunk that is not in memory yet has no place for a gradient."""
        assert self._state is not None
        self._state.restore_gradients(self._chunks[stage].get(run, ()), self._key(stage, number))

    def _key(self, stage: int, number: int) -> int:
        return -1 - (number * len(self._stages.starts) + stage)  # no number of a micro-batch

    def _actions(self, kind: Kind, stage: int, number: int) -> set[Action]:
        return {Action(kind, run, number) for run in self._stages.runs(stage) if self._has_backward[run]}

    def _roots(self, stage: int, number: int, opened: _Opened) -> tuple[list[Any], list[torch.Tensor]]:
        if opened.loss is not None:
            weight = torch.tensor(self._micro[number].weight, dtype=opened.loss.dtype)
            return ([opened.loss], [weight]) if opened.loss.requires_grad else ([], [])
        if stage + 1 == len(self._stages.starts) or not self._stages.with_gradient[stage + 1]:
            return [], []
        gradients = self._arrived.pop((Kind.RECV_B, stage, number))
        specs = self._specs(stage + 1, number, forward=True)
        edges = [edge for edge, spec in zip(opened.edges, specs, strict=True) if spec.requires_grad]
        pairs = [(e, g) for e, g in zip(edges, gradients, strict=True) if e is not None and g is not None]
        return [edge for edge, _ in pairs], [gradient for _, gradient in pairs]

    def _taken_in(self, stage: int, number: int, opened: _Opened) -> Any:
        """What the last unit before the stage returned, as the model gets it."""
        flow = self._micro[number].flow
        assert flow is not None
        output = flow.outputs[self._stages.starts[stage] - 1]
        tensors = self._arrived.pop((Kind.RECV_F, stage, number))
        present = [tensor for tensor in tensors if tensor is not None]
        assert len(present) == len(output.specs)
        wanted = [place for place, spec in enumerate(output.specs) if spec.requires_grad]
        if wanted:
            anchor = torch.empty(0, requires_grad=True)
            made = Receive.apply(opened.received, wanted, anchor, *(present[place] for place in wanted))
            for place, tensor in zip(wanted, made, strict=True):
                present[place] = tensor
        return output.built(present)

    def _hand_on(self, stage: int, number: int, opened: _Opened, output: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        specs = self._specs(stage + 1, number, forward=True)
        found = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        expected = [(spec.shape, spec.dtype) for spec in specs]
        if found != expected:
            raise OutgrowError(
                f"{self._hooks.name_of(self._stages.starts[stage + 1] - 1)} returned tensors {found}, and {expected} "
                "were recorded: between stages, shapes must follow from the shapes of the batch alone"
            )
        opened.edges = [get_gradient_edge(tensor) if tensor.requires_grad else None for tensor in tensors]
        values: list[torch.Tensor | None] = [tensor.detach() for tensor in tensors]
        if self._stages.is_local(stage + 1):
            self._arrived[Kind.RECV_F, stage + 1, number] = values
        else:
            self._leaving[Kind.SEND_F, stage, number] = values

    def _stand_in(self, current: Pass, run: int) -> Any:
        """What a unit run that is left out returns."""
        if run == current.runs.start - 1:
            return self._inputs
        flow = self._micro[current.micro_batch].flow
        assert flow is not None
        output = flow.outputs[run]
        return output.built([torch.zeros((), dtype=spec.dtype).expand(spec.shape) for spec in output.specs])

    def _saving(self) -> Any:
        assert self._state is not None
        if self._is_watching:
            return watched(self._state, self._live)
        return saved_by_place(self._state) if self._state.drops_copies else nullcontext()

    def _deferring(self, stage: int, number: int, deferred: Deferred) -> Any:
        return self._layers.deferring(deferred, (stage, id(self._micro[number].flow)))

    _inputs: Any = None


def _place(action: Action) -> _At:
    assert action.index is not None
    assert action.micro_batch is not None
    return action.index, action.micro_batch


def _like(spec: TensorSpec) -> torch.Tensor:
    return torch.empty(spec.shape, dtype=spec.dtype, device="meta")
