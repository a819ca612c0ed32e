"""What happens around every run of a unit: the program is advanced, random numbers are seeded, outputs are watched.

Owns the hooks on the model's units and the check that they run in the recorded order. Does not own what the program
does between them (`runtime/executor.py`).

Random numbers are seeded for every run of a unit by (seed, rank, step, unit run, micro-batch): masks then do not depend
on the order in which a plan runs units or on what it recomputes.
"""

import hashlib
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._pytree import tree_leaves

from ..memory.errors import OutOfOrder
from ..parallel.actions import Action, Kind
from ..parallel.units import Unit
from ..scheduler.trace import Phase, Trace
from .batch import cast_floats
from .executor import Executor

__all__ = ["Moving", "Pass", "StageEnd", "UnitHooks", "seed_for"]


def seed_for(*parts: int) -> int:
    """A 63-bit seed from a few numbers: the same on every machine, unrelated for neighbours."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


class Moving(Protocol):
    """Moves the activations of some units away and back."""

    def saving(self, run: int, micro_batch: int) -> AbstractContextManager[None] | None:
        """A context for the forward of a unit run whose activations move; None for those that stay."""
        ...

    def release(self, run: int, micro_batch: int) -> None:
        """The backward of a unit run is over."""
        ...


class StageEnd(BaseException):
    """The last unit of a stage has run: what follows in the model's forward is for other stages.

    Attributes:
        output: of that unit.
    """

    def __init__(self, output: Any) -> None:
        super().__init__("the last unit of a stage has run")
        self.output = output


@dataclass
class Pass:
    """One micro-batch on its way through the model, in a thread of its own where micro-batches take turns."""

    micro_batch: int
    runs: range  # unit runs that compute in this pass; those before are left out, those after are not come to
    num_runs: int  # of the model
    next: int = 0  # unit run that comes
    phase: str = "forward"
    backward_kind: Kind = Kind.B
    backward: int | None = None  # unit run whose backward goes on
    saving: AbstractContextManager[None] | None = None  # open while a unit runs whose activations move
    outputs: list[tuple[int, list[torch.Tensor]]] = field(default_factory=list)


class UnitHooks:
    """Installed on every unit's module; they do nothing while no micro-batch runs.

    Args:
        cast_inputs: parameter-dtype per unit that floating inputs are cast to, or None to leave them alone.
        advance: comes to a compute action, waiting for its turn; None: the executor's own, without turns.
        entering: told each phase that begins (`scheduler/trace.py`), when it is its turn.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        executor: Executor,
        seeds: tuple[int, ...],
        cast_inputs: Callable[[nn.Module], torch.dtype | None],
        advance: Callable[[Action], None] | None = None,
        entering: Callable[[Phase], None] = lambda phase: None,
    ) -> None:
        self.moving: Moving | None = None
        self._units = units
        self._advance = advance or executor.advance_to
        self._entering = entering
        self._executor = executor
        self._seeds = seeds
        self._trace: Trace | None = None
        self._runs_of: dict[int, list[int]] = {}
        self._step = 0
        self._local = threading.local()
        self._handles: list[Any] = []
        for index, unit in enumerate(units):
            dtype = cast_inputs(unit.module)
            self._handles.append(
                unit.module.register_forward_pre_hook(self._before(index, dtype), with_kwargs=True, prepend=True)
            )
            after = unit.module.register_forward_hook(self._after(index), always_call=True)
            self._handles.append(after)

    def follow(self, trace: Trace) -> None:
        """Expect units to run in the order of `trace`."""
        self._trace = trace
        self._runs_of = {}
        for run, call in enumerate(trace.calls):
            self._runs_of.setdefault(call.unit, []).append(run)

    def begin_forward(self, step: int, micro_batch: int, runs: range | None = None) -> Pass:
        """This thread takes a micro-batch through the model, or through one stage of it.

        Args:
            runs: of the stage. After its last unit, where that is not the model's last, `StageEnd` is raised.
        """
        assert self._trace is not None
        self._step = step
        num_runs = len(self._trace.calls)
        current = self._local.current = Pass(micro_batch, runs or range(num_runs), num_runs)
        self._entering(("before", 0))
        self._seed(-1, micro_batch)
        return current

    def end_forward(self) -> None:
        """Every unit has run.

        Raises:
            OutOfOrder: fewer units ran than were recorded.
        """
        current = self._current
        assert current is not None
        if current.next < current.runs.stop:
            raise self._out_of_order(None, current)
        current.outputs = []

    def begin_backward(self, earlier: Pass | None = None, kind: Kind = Kind.B) -> None:
        """The backward of this thread's micro-batch begins, or that of an earlier pass.

        Raises:
            OutOfOrder: fewer units ran than were recorded.
        """
        if earlier is not None:
            self._local.current = earlier
        self.end_forward()
        current = self._current
        assert current is not None
        current.backward = None
        current.phase = "backward"
        current.backward_kind = kind
        self._entering(("loss", 1))

    def end_backward(self) -> None:
        """The backward of this thread's micro-batch is over."""
        if self._current is not None:
            self._leave_backward(self._current)

    def end(self) -> None:
        """The micro-batch is over, or was given up."""
        current = self._current
        if current is not None:
            current.outputs = []  # a hook of the graph holds on to `current`, so these would keep the graph alive
            if current.saving is not None:  # its unit raised
                current.saving.__exit__(None, None, None)
        self._local.current = None

    @property
    def _current(self) -> Pass | None:
        return getattr(self._local, "current", None)

    def run_in_forward(self) -> tuple[Pass, int] | None:
        """The pass and the unit run that this thread is in, where it is in a forward."""
        current = self._current
        return None if current is None or current.phase != "forward" else (current, current.next - 1)

    def first_not_finite(self) -> str | None:
        """Name of the first unit whose output in this forward pass holds a NaN or an infinity."""
        current = self._current
        for run, tensors in current.outputs if current is not None else ():
            if any(not torch.isfinite(tensor).all() for tensor in tensors):
                return self.name_of(run)
        return None

    def name_of(self, run: int) -> str:
        assert self._trace is not None
        return self._units[self._trace.calls[run].unit].name

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before(self, unit: int, dtype: torch.dtype | None) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> Any:
            current = self._current
            if current is not None and current.phase == "forward":
                assert self._trace is not None
                run = current.next
                if run >= len(self._trace.calls) or self._trace.calls[run].unit != unit:
                    raise self._out_of_order(unit, current)
                current.next += 1
                if run not in current.runs:
                    return None  # left out
                self._advance(Action(Kind.F, run, current.micro_batch))
                self._entering(("F", run))
                self._seed(run, current.micro_batch)
                if self.moving is not None and torch.is_grad_enabled():
                    current.saving = self.moving.saving(run, current.micro_batch)
                    if current.saving is not None:
                        current.saving.__enter__()
            elif current is not None:  # recomputed by a checkpoint in the model's own code
                running = self._executor.running
                runs = self._runs_of[unit]
                run = running.index if running and running.index in runs else runs[0]
                self._seed(run, current.micro_batch)
            if dtype is None:
                return None
            return cast_floats(args, dtype), cast_floats(kwargs, dtype)

        return hook

    def _after(self, unit: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, output: Any) -> None:
            current = self._current
            if current is None or current.phase != "forward":
                return
            saving, current.saving = current.saving, None
            if saving is not None:
                saving.__exit__(None, None, None)
            if output is None:  # the unit raised
                return
            assert self._trace is not None
            run = current.next - 1
            if run >= current.runs.start - 1:  # what is drawn between units that are left out is left out, too
                self._seed(run, current.micro_batch, after=True)  # for code between units
            if run not in current.runs:
                return
            inputs = {id(leaf) for leaf in tree_leaves(args)}
            tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
            floats = [tensor.detach() for tensor in tensors if tensor.is_floating_point()]
            if saving is not None:  # the outputs themselves may go away; a sum is finite only where they are
                floats = [tensor.sum() for tensor in floats]
            current.outputs.append((run, floats))
            # A tensor that went through unchanged has the hook of the unit that made it.
            reached = [tensor for tensor in tensors if tensor.requires_grad and id(tensor) not in inputs]
            if reached and self._trace.calls[run].has_backward:
                register_multi_grad_hook(reached, lambda _grad: self._enter_backward(current, run), mode="any")
            if run + 1 == current.runs.stop < current.num_runs:
                raise StageEnd(output)

        return hook

    def _enter_backward(self, current: Pass, run: int) -> None:
        self._leave_backward(current)
        self._advance(Action(current.backward_kind, run, current.micro_batch))
        self._entering(("B", run))
        current.backward = run

    def _leave_backward(self, current: Pass) -> None:
        """Before the program takes note of the end of a unit's backward: its loaded activations are forgotten."""
        if current.backward is not None and self.moving is not None and current.backward_kind is not Kind.I:
            self.moving.release(current.backward, current.micro_batch)
        current.backward = None

    def _seed(self, run: int, micro_batch: int, after: bool = False) -> None:
        parts = (*self._seeds, self._step, run, micro_batch, *([1] if after else []))
        torch.random.default_generator.manual_seed(seed_for(*parts))
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(seed_for(*parts))

    def _out_of_order(self, unit: int | None, current: Pass) -> OutOfOrder:
        assert self._trace is not None
        recorded = [self.name_of(run) for run in range(len(self._trace.calls))]
        now = [*recorded[: current.next], "the end of the forward pass" if unit is None else self._units[unit].name]
        return OutOfOrder(
            f"the model runs its units in another order than recorded. Recorded: {_excerpt(recorded, current.next)}. "
            f"Now: {_excerpt(now, current.next)}. A model whose order depends on its inputs needs larger units: give "
            "`units=[...]` so that each contains one whole branch."
        )


def _excerpt(names: list[str], around: int, width: int = 3) -> str:
    """The names near a place, with dots where some are left out."""
    start, stop = max(0, around - width), around + width
    return ", ".join([*(["..."] if start else []), *names[start:stop], *(["..."] if stop < len(names) else [])])
