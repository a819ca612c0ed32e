"""Finding the units of a model: the smallest pieces that are scheduled.

Owns the choice of units and of the chunk that each parameter belongs to. Does not own the order in which units run
(`scheduler/trace.py` records it) or where bytes lie.

Units are, in this order of preference: the ones given by name; the elements of the model's repeated blocks (a
`ModuleList`, `ModuleDict` or `Sequential` whose elements are alike) with everything beside these blocks as units of
their own; the top-level children; the model itself. Parameters that belong to no unit lie in the chunks of `ROOT`,
which the whole model needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..memory.chunk import ChunkLayout, layout_chunk

__all__ = ["ROOT", "Unit", "assign_chunks", "find_units", "named_trainable"]

ROOT = "<model>"

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece of the model that is scheduled as one. `name` is the module's name in the model."""

    name: str
    module: nn.Module


def find_units(model: nn.Module, given: Sequence[str] | None = None) -> tuple[Unit, ...]:
    """The units of `model`, in the order of registration, without units that have no parameter.

    Raises:
        ValueError: no name given, a name that is no module of the model, or units of which one lies inside another.
    """
    if given is not None:
        return _given_units(model, given)
    names: list[str] = []
    _collect(model, "", names)
    modules = dict(model.named_modules())
    units = tuple(Unit(name, modules[name]) for name in names if _has_parameters(modules[name]))
    return units or (Unit(ROOT, model),)  # a model without children is one unit


def _given_units(model: nn.Module, given: Sequence[str]) -> tuple[Unit, ...]:
    modules = dict(model.named_modules())
    if not given:
        raise ValueError("units: the list is empty; name at least one module, or give None to have them found")
    for name in given:
        if name not in modules or name == "":
            known = ", ".join(list(modules)[1:13])
            raise ValueError(f"units: {name!r} is no module of this {type(model).__name__}; it has {known}, ...")
    for name in given:
        for other in given:
            if other != name and other.startswith(name + "."):
                raise ValueError(f"units: {other!r} lies inside {name!r}; give one of the two")
    if len(set(given)) != len(given):
        raise ValueError(f"units: a name is given twice: {', '.join(given)}")
    return tuple(Unit(name, modules[name]) for name in given)


def _collect(module: nn.Module, prefix: str, names: list[str]) -> None:
    """Append the names of the units below `module`: descend only where repeated blocks lie."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(module, _CONTAINERS):
            descend = isinstance(child, _CONTAINERS) and _holds_repeated(child)
        else:
            descend = isinstance(child, _CONTAINERS) or _holds_repeated(child)
        if descend and any(True for _ in child.children()):
            _collect(child, path + ".", names)
        else:
            names.append(path)


def _holds_repeated(module: nn.Module) -> bool:
    """Whether a container of at least two like blocks lies in `module`."""
    return any(isinstance(part, _CONTAINERS) and _is_repeated(part) for part in module.modules())


def _is_repeated(container: nn.Module) -> bool:
    kinds = [
        (type(child), tuple(tuple(parameter.shape) for parameter in child.parameters()))
        for child in container.children()
        if _has_parameters(child)
    ]
    return len(kinds) != len(set(kinds))


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def named_trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Every trainable parameter once, under its first name."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def assign_chunks(
    model: nn.Module, units: Sequence[Unit], num_shards: int, compute_dtypes: dict[str, torch.dtype] | None = None
) -> tuple[ChunkLayout, ...]:
    """Cut the model's parameters into chunks: one per unit, dtype and trainability; tied parameters lie in the chunk of
    the unit that names them first.

    Args:
        compute_dtypes: parameter name -> dtype that the model computes with; those left out keep their own.
    """
    owner: dict[str, str] = {}
    for unit in units:
        for name, _ in unit.module.named_parameters(prefix=unit.name, remove_duplicate=False):
            owner[name] = unit.name
    groups: dict[tuple[str, torch.dtype, bool], list[tuple[str, torch.Tensor]]] = {}
    for name, parameter in model.named_parameters():
        dtype = (compute_dtypes or {}).get(name, parameter.dtype)
        groups.setdefault((owner.get(name, ROOT), dtype, parameter.requires_grad), []).append((name, parameter))
    rank_of_unit = {unit.name: position for position, unit in enumerate(units)} | {ROOT: -1}
    ordered = sorted(groups.items(), key=lambda item: rank_of_unit[item[0][0]])
    return tuple(
        layout_chunk(index, unit, parameters, dtype, trainable, num_shards)
        for index, ((unit, dtype, trainable), parameters) in enumerate(ordered)
    )
