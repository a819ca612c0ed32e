"""Full weights out of sharded state: state dicts and safetensors files, by the model's own names.

Owns the names (tied ones included) and the file format's frame. Does not own gathering (`runtime/model_state.py`), nor
reading files of others (`runtime/weight_files.py`). Weights come chunk by chunk: while a file is written, no more than
one chunk of them is gathered.
"""

import json
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from .model_state import ModelState
from .stage_state import StageState

__all__ = ["DTYPES", "aliases_of", "full_state_dict", "load_weights", "write_safetensors", "write_weights"]

DTYPES = {
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
"""dtype -> its name in safetensors files."""


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
    """Copies of all weights and persistent buffers, under every name: one copy, and one chunk beside it. Collective.

    Args:
        dtypes: parameter name -> dtype that the model had when it was given.
    """
    stored = {
        name: value.to("cpu", dtypes.get(name, value.dtype), copy=True)
        for name, value in _values_by_chunk(model, state)
    }
    return {name: stored[source] for name, source in _sources(model).items()}


def write_weights(
    path: Path | str | None, model: nn.Module, state: ModelState, dtypes: Mapping[str, torch.dtype]
) -> None:
    """Write what `full_state_dict` would give, tied tensors once, one chunk after the other. Collective.

    Args:
        path: of the file, or None on the ranks that write nothing.

    Raises:
        ValueError: a dtype that the format does not have.
        OSError: the file cannot be written; the other ranks are not kept waiting, and an old file stays.
    """
    shapes = _shapes(state)  # the chunk may not be here
    buffers = dict(model.named_buffers(remove_duplicate=False))
    sources = _sources(model)
    frame = {
        name: (dtypes[name], shapes[name]) if name in shapes else (buffers[name].dtype, tuple(buffers[name].shape))
        for name in dict.fromkeys(sources.values())
    }
    aliases = {name: source for name, source in sources.items() if name != source}
    values = _values_by_chunk(model, state)
    try:
        if path is not None:
            write_safetensors(path, frame, values, {"format": "pt", "aliases": json.dumps(aliases)})
    except Exception:
        deque(values, maxlen=0)  # the other ranks wait for this one in what is left of the exchange
        raise
    deque(values, maxlen=0)  # what ranks that write nothing take part in


def write_safetensors(
    path: Path | str,
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    values: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file one tensor at a time.

    Args:
        tensors: name -> dtype and shape, in the order of the file, known before any value.
        values: every one of these names once, in any order, with its value; none is held on to.

    Raises:
        ValueError: a dtype that the format does not have; nothing is written.
        OSError: what a full or broken disk says; a file of that name from before is still there.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offsets: dict[str, int] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        if dtype not in DTYPES:
            raise ValueError(f"{name} is {dtype}, which safetensors files cannot hold; give the model another dtype")
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [end, end + num_bytes]}
        offsets[name] = end
        end += num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    partial = Path(path).with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(start + end)
            for name, value in values:
                file.seek(start + offsets.pop(name))
                value = value.detach().to("cpu", tensors[name][0]).contiguous()
                assert value.shape == tensors[name][1], f"{name} is {tuple(value.shape)}, not {tensors[name][1]}"
                file.write(value.reshape(-1).view(torch.uint8).numpy().data)
        assert not offsets, f"no value came for {', '.join(offsets)}"
        partial.replace(path)  # a reader never sees half a file
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def load_weights(path: Path | str) -> dict[str, torch.Tensor]:
    """The tensors of a file written by this project, aliases included (they share storage)."""
    with safe_open(str(path), framework="pt") as file:
        names: Iterable[str] = file.offset_keys()  # the model's order
        state = {name: file.get_tensor(name) for name in names}
        aliases = json.loads((file.metadata() or {}).get("aliases", "{}"))
    return state | {alias: state[name] for alias, name in aliases.items()}


def _values_by_chunk(model: nn.Module, state: ModelState) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of every parameter, chunk by chunk, then of every persistent buffer, each under the name that it
    is stored under. A value is there until the next one is asked for. Collective."""
    if isinstance(state, StageState):
        yield from state.everything(frozenset(_sources(model).values()))
        return
    for index in range(len(state.chunks)):
        with state.gathered_chunk(index) as values:
            for name, value in values.items():
                yield name, value.detach()
    stored = set(_sources(model).values())
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name in stored:
            yield name, state.from_first_rank(buffer.detach())


def _shapes(state: ModelState) -> dict[str, tuple[int, ...]]:
    """Of every parameter of the model."""
    if isinstance(state, StageState):
        return {name: tuple(shape) for name, (shape, _) in state.parts.shapes.items()}
    return {item.name: item.shape for chunk in state.chunks for item in chunk.layout.fields}


def _sources(model: nn.Module) -> dict[str, str]:
    """Every name of the model's state dict -> the name that its value is stored under."""
    parameters = {name: id(tensor) for name, tensor in model.named_parameters(remove_duplicate=False)}
    buffers = {name: id(tensor) for name, tensor in model.named_buffers(remove_duplicate=False)}
    first: dict[int, str] = {id(tensor): name for name, tensor in model.named_parameters()}
    sources: dict[str, str] = {}
    for name in model.state_dict(keep_vars=True):
        if name in parameters:
            sources[name] = first[parameters[name]]
        elif name in buffers:
            sources[name] = first.setdefault(buffers[name], name)
    return sources
