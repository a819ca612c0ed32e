"""Full weights out of sharded state: state dicts and safetensors files, by the model's own names.

Owns the names (tied ones included) and the file format's frame. Does not own gathering (`runtime/model_state.py`).
A file is written tensor by tensor, so that no second copy of the weights exists while it is.
"""

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from .model_state import ModelState

__all__ = ["aliases_of", "full_state_dict", "load_weights", "write_safetensors", "write_weights"]

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def aliases_of(model: nn.Module) -> dict[str, str]:
    """Further names of tied parameters and shared buffers -> the name they are stored under (the first)."""
    first: dict[int, str] = {}
    aliases = {}
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in named:
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
    return aliases


def full_state_dict(model: nn.Module, state: ModelState, dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.Tensor]:
    """Copies of all weights and persistent buffers, under every name. All chunks are gathered. Collective.

    Args:
        dtypes: parameter name -> dtype that the model had when it was given.
    """
    masters = dict(state.masters())
    result = {}
    persistent = dict.fromkeys(model.state_dict(keep_vars=True))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    aliases = aliases_of(model)
    for name in persistent:
        if name in aliases and aliases[name] in result:
            result[name] = result[aliases[name]]
        elif name in parameters:
            value = masters.get(name, parameters[name].data)
            result[name] = value.detach().to(dtypes[aliases.get(name, name)], copy=True)
        elif name in buffers:
            result[name] = state.from_first_rank(buffers[name].detach().clone())
    return result


def write_weights(
    path: Path | str | None, model: nn.Module, state: ModelState, dtypes: Mapping[str, torch.dtype]
) -> None:
    """Write what `full_state_dict` would give, tied tensors once. All chunks are gathered. Collective.

    Args:
        path: of the file, or None on the ranks that write nothing.
    """
    aliases = aliases_of(model)
    persistent = set(model.state_dict(keep_vars=True))
    parameters = dict(model.named_parameters())
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    frame = {name: (dtypes[name], tuple(parameter.shape)) for name, parameter in parameters.items()}
    frame |= {name: (buffer.dtype, tuple(buffer.shape)) for name, buffer in buffers.items()}
    if state.has_masters:
        values = dict(state.masters())
    else:
        values = {}
    if path is not None:
        write_safetensors(
            path,
            frame,
            lambda name: values.get(name, parameters[name] if name in parameters else buffers[name]),
            {"format": "pt", "aliases": json.dumps({a: n for a, n in aliases.items() if a in persistent})},
        )


def write_safetensors(
    path: Path | str,
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    value_of: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file one tensor at a time.

    Args:
        tensors: name -> dtype and shape, known before any value.
        value_of: name -> the tensor, asked for once, in the order of `tensors`.

    Raises:
        ValueError: a dtype that the format does not have; nothing is written.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        if dtype not in _DTYPES:
            raise ValueError(f"{name} is {dtype}, which safetensors files cannot hold; give the model another dtype")
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + num_bytes]}
        offset += num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    partial = Path(path).with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, (dtype, _) in tensors.items():
            value = value_of(name).detach().to("cpu", dtype).contiguous()
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)
    partial.replace(path)  # a reader never sees half a file


def load_weights(path: Path | str) -> dict[str, torch.Tensor]:
    """The tensors of a file written by this project, aliases included (they share storage)."""
    with safe_open(str(path), framework="pt") as file:
        names: Iterable[str] = file.offset_keys()  # the model's order
        state = {name: file.get_tensor(name) for name in names}
        aliases = json.loads((file.metadata() or {}).get("aliases", "{}"))
    return state | {alias: state[name] for alias, name in aliases.items()}
