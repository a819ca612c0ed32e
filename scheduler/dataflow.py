"""What flows between the units of a model: where it may be cut into stages, and what crosses such a cut.

Owns one pass over a structural copy of the model, in which every tensor is followed from where it was made to the unit
that is given it, and the check of stage borders against what was found. Does not own the copies (`twin.py`), the order
of units (`trace.py`) nor the choice of borders (`stages.py`).

A stage runs the model's own forward with the units of earlier stages left out. That gives the same result only where
everything that a stage takes from earlier ones is what the last unit before it returned: this is what `check_borders`
makes sure of. The batch, constants and the code between units are on every rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

from ..parallel.units import Unit
from .twin import Shapes, fake_twin, meta_twin

__all__ = ["Flow", "Output", "Source", "TensorSpec", "check_borders", "may_begin", "trace_flow"]

Forward = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Output:
    """What a unit run returned.

    Attributes:
        leaves: a TensorSpec for each tensor; what is no tensor, itself.
        structure: that the leaves are put back into.
    """

    leaves: tuple[Any, ...]
    structure: TreeSpec

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """Of the tensors alone."""
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, TensorSpec))

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.specs)

    def built(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The structure with these tensors in the places of the specs."""
        rest = iter(tensors)
        leaves = [next(rest) if isinstance(leaf, TensorSpec) else leaf for leaf in self.leaves]
        return tree_unflatten(leaves, self.structure)


@dataclass(frozen=True, slots=True)
class Source:
    """Where something that is read was made: by unit run `run`, and whether it is part of what that returned."""

    run: int
    is_output: bool


@dataclass(frozen=True, slots=True)
class Flow:
    """What one forward pass showed, unit run by unit run.

    Attributes:
        inputs: what each was given: (arguments, keyword arguments).
        outputs: what each returned.
        reads: for each, the runs that its inputs depend on, without any other run between; one more at the end: what
            the model's output depends on.
        parameters: for each, names of the parameters that code between units made its inputs of; one more at the end.
    """

    inputs: tuple[Output, ...]
    outputs: tuple[Output, ...]
    reads: tuple[frozenset[Source], ...]
    parameters: tuple[frozenset[str], ...]


def trace_flow(
    model: nn.Module, units: Sequence[Unit], forward: Forward, micro_batch: Any, shapes: Shapes | None = None
) -> Flow:
    """Follow one forward pass of `forward(model, micro_batch)`.

    Args:
        shapes: as in `trace_model`.

    Raises:
        ValueError: the model cannot run without values.
    """
    failures = []
    for make in (fake_twin, meta_twin):
        try:
            twin = make(model, shapes)
            with torch.random.fork_rng(devices=[]):
                return _trace(twin, units, forward, micro_batch)
        except Exception as error:  # any model code may fail without values, in any way: then the next kind decides
            failures.append(f"{type(error).__name__}: {error}")
    raise ValueError(
        f"a pipeline needs to know what flows between the units, and this {type(model).__name__} does not run on "
        f"tensors without values ({'; '.join(failures)}): let its code ask for shapes, not for values"
    )


def _trace(twin: Any, units: Sequence[Unit], forward: Forward, micro_batch: Any) -> Flow:
    modules = dict(twin.model.named_modules())
    follower = _Follower(twin.names)
    handles = []
    for unit in units:
        module = modules.get(unit.name, twin.model)
        handles.append(module.register_forward_pre_hook(follower.enter, with_kwargs=True))
        handles.append(module.register_forward_hook(follower.leave))
    try:
        with twin.mode():
            batch = twin.convert(micro_batch)
            for name, parameter in twin.model.named_parameters():
                follower.know(parameter, frozenset({name}))
            with follower:
                output = forward(twin.model, batch)
            follower.note(output)
    finally:
        for handle in handles:
            handle.remove()
    return Flow(tuple(follower.inputs), tuple(follower.outputs), tuple(follower.reads), tuple(follower.parameters))


class _Follower(TorchDispatchMode):
    """Knows, for every storage, which unit runs and parameters its content was made of."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.inputs: list[Output] = []
        self.outputs: list[Output] = []
        self.reads: list[frozenset[Source]] = []
        self.parameters: list[frozenset[str]] = []
        self._names = names
        self._origins: dict[int, tuple[Any, frozenset[Source | str]]] = {}  # address of a storage -> itself, origins
        self._inside = False

    def know(self, tensor: torch.Tensor, origins: frozenset[Source | str]) -> None:
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            self._origins[storage._cdata] = (storage, origins)

    def note(self, value: Any) -> None:
        """A unit run, or the caller, is given `value`."""
        origins = frozenset().union(*(self._of(leaf) for leaf in tree_leaves(value)))
        self.reads.append(frozenset(origin for origin in origins if isinstance(origin, Source)))
        self.parameters.append(frozenset(origin for origin in origins if isinstance(origin, str)))

    def enter(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        self.note((args, kwargs))
        self.inputs.append(_described((args, kwargs)))
        self._inside = True

    def leave(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        run = len(self.outputs)
        self.outputs.append(_described(output))
        self._inside = False

        def marked(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            own = leaf.clone()  # apart from what the unit keeps, and from inputs that it passes on
            self.know(own, frozenset({Source(run, is_output=True)}))
            return own

        return tree_map(marked, output)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = frozenset().union(*(self._of(leaf) for leaf in tree_leaves((args, kwargs))))
        before = {self._address(leaf) for leaf in tree_leaves((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if not isinstance(leaf, torch.Tensor):
                continue
            if self._inside and self._address(leaf) not in before:
                self.know(leaf, frozenset({Source(len(self.outputs), is_output=False)}))
            elif not self._inside:
                self.know(leaf, given)
        return result

    def _of(self, leaf: Any) -> frozenset[Source | str]:
        found = self._origins.get(self._address(leaf))
        return frozenset() if found is None else found[1]

    def _address(self, leaf: Any) -> int:
        if not isinstance(leaf, torch.Tensor) or leaf.layout is not torch.strided:
            return 0
        return leaf.untyped_storage()._cdata


def _described(value: Any) -> Output:
    leaves, structure = tree_flatten(value)
    described = [
        TensorSpec(tuple(leaf.shape), leaf.dtype, leaf.requires_grad) if isinstance(leaf, torch.Tensor) else leaf
        for leaf in leaves
    ]
    return Output(tuple(described), structure)


def may_begin(flow: Flow, names: Sequence[str], run: int) -> bool:
    """Whether a stage may begin at a unit run, wherever else the model is cut."""
    if run == 0:
        return True
    try:
        check_borders(flow, names, [0, run])
    except ValueError:
        return False
    return True


def check_borders(flow: Flow, names: Sequence[str], starts: Sequence[int]) -> None:
    """Whether the model can be cut into stages there.

    Args:
        names: of each run's unit.
        starts: first run of each stage.

    Raises:
        ValueError: something reaches over a border that is not what the last unit before it returned; names both units.
    """
    ends = [*starts[1:], len(flow.outputs)]
    stage_of = [stage for stage, (start, end) in enumerate(zip(starts, ends, strict=True)) for _ in range(start, end)]
    for run, sources in enumerate(flow.reads):
        stage = stage_of[run] if run < len(stage_of) else len(starts) - 1
        reader = names[run] if run < len(stage_of) else "the model's output"
        for source in sorted(sources, key=lambda each: each.run):
            there = stage_of[source.run]
            if there == stage or (source.is_output and source.run == starts[stage] - 1):
                continue
            what = "the output" if source.is_output else "something kept inside"
            raise ValueError(
                f"{reader} in stage {stage} uses {what} of {names[source.run]} in stage {there}: only what the last "
                f"unit before a stage returns ({names[starts[stage] - 1]}) gets there. Put both into one stage "
                "(stages=[...]) or into one unit (units=[...]), or let the units between them pass it on"
            )
    for start in starts[1:]:
        for leaf in flow.outputs[start - 1].leaves:
            if not isinstance(leaf, TensorSpec | int | float | str | bool | None):
                raise ValueError(
                    f"{names[start - 1]} returns a {type(leaf).__name__}, which cannot go from one stage to the next; "
                    "return tensors, in tuples, lists or dictionaries, or move the border"
                )
