"""Giving a model its values one unit at a time: from a function of the user's, or from weight files.

Owns which value goes where, and the checks before the first one. Does not own where the memory lies that is filled
(`runtime/model_state.py` hands it in), nor the files (`runtime/weight_files.py`).

Whatever a filler does depends on the model, the seed and the files alone: not on ranks, budget or where bytes lie.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

from ..parallel.units import ROOT
from .building import is_placeholder, twin_of
from .weight_files import StoredTensor, open_weights

__all__ = ["Filler", "InitFiller", "WeightsFiller", "make_filler"]

_PIECE_ELEMS = 1 << 20


class Filler(Protocol):
    """Gives values to parameters, one unit at a time, in any order of units."""

    def fill(self, unit_name: str, module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        """Fill `tensors` in place.

        Args:
            unit_name: of the unit, or ROOT for the parameters outside of all units.
            module: the unit's; for ROOT the model.
            tensors: first name of each parameter that the unit owns -> a tensor [its shape] on the CPU, of the
                parameter's own dtype. A tied parameter belongs to the unit that names it first, and to no other.
        """
        ...


def make_filler(
    init: Callable[[nn.Module], object] | None, weights: str | os.PathLike[str] | None, seed: int, model: nn.Module
) -> Filler | None:
    """The filler that was asked for, or None; buffers found in weight files are loaded into the model at once.

    Raises:
        ValueError: both were asked for, or the files are not the model's (see `WeightsFiller`).
    """
    if init is not None and weights is not None:
        raise ValueError("init= and weights= both say where values come from; give one of them")
    if init is not None:
        return InitFiller(init, seed, model)
    if weights is not None:
        filler = WeightsFiller(weights, model)
        filler.load_buffers()
        return filler
    return None


class InitFiller:
    """Initialises as `model.apply(init)` does, one unit at a time.

    For a unit, `init` is called with each of its modules, children first, then with the modules around it up to the
    model itself: so it may look at a module's own parameters only (`module.weight`), at all below it
    (`module.parameters()`), or set some from further up. What it writes to parameters of other units meanwhile goes
    nowhere: each unit has its turn. A tied parameter gets what the module gives it that names it first. Modules that
    hold units are therefore passed to `init` several times.

    Each call runs under a seed of its own, made of `seed` and the module's name, without gradients.
    """

    def __init__(self, init: Callable[[nn.Module], object], seed: int, model: nn.Module) -> None:
        self._init = init
        self._seed = seed
        self._model = model
        self._modules = dict(model.named_modules())
        self._elsewhere: dict[int, nn.Parameter] = {}  # id of a parameter -> its stand-in on meta, where writes vanish

    def fill(self, unit_name: str, module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        """As in `Filler`.

        Raises:
            ValueError: a parameter without values before is left without them; names it. Or one of another shape.
            Whatever `init` raises, with a note that names the module.
        """
        parameters = {name: self._model.get_parameter(name) for name in tensors}
        bare = [name for name, parameter in parameters.items() if is_placeholder(parameter)]
        for name, tensor in tensors.items():
            if name not in bare:
                if tensor.data_ptr() != parameters[name].data_ptr():
                    tensor.copy_(parameters[name].data)  # `init` may leave what is there
            elif tensor.is_floating_point() or tensor.is_complex():
                tensor.fill_(float("nan"))
        with torch.no_grad(), self._in_place(parameters, tensors):
            for name, part, seed in self._calls_for(unit_name, tensors):
                with torch.random.fork_rng(devices=()):
                    torch.manual_seed(seed)
                    try:
                        self._init(part)
                    except Exception as error:
                        error.add_note(
                            f"in init= for {name or 'the model'} ({type(part).__name__}), while unit {unit_name} was "
                            "filled: parameters of other units are on meta then, and have no values to read"
                        )
                        raise
        empty = [name for name in bare if _has_nan(tensors[name])]
        if empty:
            raise ValueError(
                f"init= left {_few(empty)} of unit {unit_name} without values, or gave NaN: it is called for every "
                "module, as by model.apply, and must initialise all parameters that a module has (many modules do so "
                "in reset_parameters())"
            )

    def _calls_for(self, unit_name: str, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, nn.Module, int]]:
        """What `init` is called with for a unit: its own modules, children first, then those around it; with seeds.

        The seeds of a unit's own modules know nothing of units: other units, the same values.
        """
        if unit_name == ROOT:
            own = {name.rpartition(".")[0] for name in tensors}
        else:
            own = {name for name in self._modules if name == unit_name or name.startswith(unit_name + ".")}
        around = {outer for name in own for outer in _around(name)} - own
        for name in _children_first(self._modules):
            if name in own or name in around:
                yield name, self._modules[name], _seed_of(self._seed, name, unit_name if name in around else "")

    @contextmanager
    def _in_place(self, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Meanwhile these parameters lie in `tensors`, and all others of the model on meta."""
        places = [
            (module, name, parameter, f"{path}.{name}" if path else name)
            for path, module in self._modules.items()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        before = {name: parameter.data for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.data = tensors[name]
            for module, name, parameter, path in places:
                if path not in tensors:  # of another unit, or a further name of a tied one
                    module._parameters[name] = self._stand_in(parameter)
            yield
            for module, name, _, path in places:
                tensor, found = tensors.get(path), module._parameters.get(name)
                if tensor is not None and (found is None or found.data_ptr() != tensor.data_ptr()):
                    _take_over(tensor, found, name, module)
        finally:
            for module, name, parameter, _ in places:
                module._parameters[name] = parameter
            for name, parameter in parameters.items():
                parameter.data = before[name]

    def _stand_in(self, parameter: nn.Parameter) -> nn.Parameter:
        if id(parameter) not in self._elsewhere:
            data = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            self._elsewhere[id(parameter)] = twin_of(parameter, data)
        return self._elsewhere[id(parameter)]


class WeightsFiller:
    """Reads values from safetensors files, tensor by tensor, straight into their places.

    A tied parameter may be stored under any of its names. Every parameter must be there; of the buffers, those that
    are part of the model's state dict are read where they are there, else what the model computed for them stays.
    Floating dtypes are converted to the model's, others must be the same.

    Args:
        path: of a file, an index or a folder (`weight_files.find_weights`).

    Raises:
        ValueError: files that are missing or broken, names that are missing or unknown, shapes or dtypes that do not
            match; names file and tensors. Nothing was read into the model then.
    """

    def __init__(self, path: str | os.PathLike[str], model: nn.Module) -> None:
        self._model = model
        files = open_weights(path)
        stored = {a: files.tensors[n] for a, n in files.aliases.items() if n in files.tensors} | dict(files.tensors)
        parameters = _by_tensor(model.named_parameters(remove_duplicate=False))
        kept = set(model.state_dict(keep_vars=True))
        buffers = _by_tensor(model.named_buffers(remove_duplicate=False))
        known = {name for names, _ in (*parameters, *buffers) for name in names}
        missing = [names[0] for names, _ in parameters if not any(name in stored for name in names)]
        unknown = [name for name in files.tensors if name not in known]
        if missing or unknown:
            raise ValueError(_not_the_models(files.path, missing, unknown))
        self._parameters = {names[0]: _found(stored, names, tensor) for names, tensor in parameters}
        self._buffers = [
            (names, _found(stored, names, tensor))
            for names, tensor in buffers
            if any(name in stored for name in names) and (tensor.is_meta or any(name in kept for name in names))
        ]

    def fill(self, unit_name: str, module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        """As in `Filler`.

        Raises:
            ValueError: names of one tied parameter hold different values in the files.
            DiskFault: a file cannot be read, or changed since it was checked.
        """
        for name, tensor in tensors.items():
            _read(self._parameters[name], tensor)

    def load_buffers(self) -> None:
        """Read the buffers that the files hold into the model's; those on meta become real."""
        for names, sources in self._buffers:
            buffer = self._model.get_buffer(names[0])
            if buffer.is_meta:
                buffer = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
                for name in names:
                    owner, _, last = name.rpartition(".")
                    self._model.get_submodule(owner)._buffers[last] = buffer
            _read(sources, buffer)


# ---- initialising


def _seed_of(seed: int, module_name: str, unit_name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}\0{module_name}\0{unit_name}".encode()).digest()[:8], "little") >> 1


def _around(name: str) -> list[str]:
    """Names of the modules around one, up to the model (the empty name); none for the model itself."""
    return [name[:end] for end in range(len(name)) if name[end] == "."] + [""] if name else []


def _children_first(names: Iterable[str]) -> list[str]:
    """Names of modules in the order of `nn.Module.apply`, given in the order of `named_modules`."""
    order: list[str] = []
    open_names: list[str] = []
    for name in names:
        while open_names and not _is_below(name, open_names[-1]):
            order.append(open_names.pop())
        open_names.append(name)
    return order + open_names[::-1]


def _is_below(name: str, other: str) -> bool:
    return other == "" or name.startswith(other + ".")


def _take_over(tensor: torch.Tensor, found: nn.Parameter | None, name: str, module: nn.Module) -> None:
    """`init` put another tensor into a parameter's place: its values are what was meant."""
    if found is None or found.shape != tensor.shape:
        now = "nothing" if found is None else f"shape {tuple(found.shape)}"
        raise ValueError(
            f"init= replaced {name} of a {type(module).__name__} of shape {tuple(tensor.shape)} by {now}; it may set "
            "values only"
        )
    tensor.copy_(found.data)


def _has_nan(tensor: torch.Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return False
    pieces = tensor.reshape(-1).split(_PIECE_ELEMS)
    return any(bool(torch.isnan(piece.float() if piece.itemsize == 1 else piece).any()) for piece in pieces)


# ---- weight files


def _by_tensor(named: Iterable[tuple[str, torch.Tensor]]) -> list[tuple[list[str], torch.Tensor]]:
    """Tensors with all their names, the first one first."""
    found: dict[int, tuple[list[str], torch.Tensor]] = {}
    for name, tensor in named:
        found.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(found.values())


def _found(stored: Mapping[str, StoredTensor], names: list[str], target: torch.Tensor) -> list[StoredTensor]:
    """What the files hold under these names, each place once."""
    found = list({id(stored[name]): stored[name] for name in names if name in stored}.values())
    for tensor in found:
        if tensor.shape != tuple(target.shape):
            raise ValueError(
                f"{tensor.path}: {tensor.name} has the shape {list(tensor.shape)}, the model's {names[0]} "
                f"{list(target.shape)}; these are the weights of another model or configuration"
            )
        if tensor.dtype is not target.dtype and not (tensor.dtype.is_floating_point and target.dtype.is_floating_point):
            raise ValueError(
                f"{tensor.path}: {tensor.name} is {tensor.dtype}, the model's {names[0]} {target.dtype}; only floating "
                "dtypes are converted into one another; quantized weights must be saved in full first"
            )
    return found


def _read(sources: list[StoredTensor], target: torch.Tensor) -> None:
    sources[0].read_into(target)
    for other in sources[1:]:
        if not other.same_values(target):
            raise ValueError(
                f"{sources[0].name} and {other.name} are one tied parameter in the model, but differ in "
                f"{other.path}: build the model without the tie, or remove one of them from the file"
            )


def _not_the_models(path: object, missing: list[str], unknown: list[str]) -> str:
    parts = [f"weights={str(path)!r} are not those of this model."]
    if missing:
        parts.append(f"Without values: {_few(missing)}.")
    if unknown:
        parts.append(f"Not in the model: {_few(unknown)}.")
    prefix = _prefix(missing, unknown)
    if prefix:
        parts.append(prefix)
    parts.append("Rename the tensors or change the model, so that every parameter has its name in the files.")
    return " ".join(parts)


def _prefix(missing: list[str], unknown: list[str]) -> str | None:
    """A hint where names differ by a prefix only."""
    for ours in missing[:1]:
        for theirs in unknown:
            if ours.endswith("." + theirs):
                return f"The model's names have the prefix {ours.removesuffix(theirs)!r}, those in the files do not."
            if theirs.endswith("." + ours):
                return f"The names in the files have the prefix {theirs.removesuffix(ours)!r}, the model's do not."
    return None


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
