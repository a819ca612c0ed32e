"""Weight files in the Hugging Face layout, read tensor by tensor.

Owns finding the files behind a path, checking all of them before anything is read, and reading one tensor straight
into memory that is there already. Does not own whose weights these are (`runtime/filling.py`), nor writing
(`runtime/weights.py`).

    folder/model.safetensors                                  one file
    folder/model.safetensors.index.json + its shards          many; the index says which tensor lies in which
    any.safetensors, any.index.json                           given by name
"""

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..memory.errors import DiskFault
from .weights import DTYPES

__all__ = ["StoredTensor", "WeightFiles", "find_weights", "open_weights"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_LARGEST_HEADER_BYTES = 100_000_000  # the format's own limit
_PIECE_BYTES = 4 << 20
_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `num_bytes` from `offset_bytes` of `path`, row after row."""

    name: str
    path: Path
    offset_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def read_into(self, target: torch.Tensor) -> None:
        """Read the values into `target` [shape], on the CPU; another dtype is converted piece by piece.

        Raises:
            DiskFault: the file cannot be read, or is shorter than it was.
        """
        assert target.shape == self.shape, f"{self.name}: {tuple(target.shape)} is not {self.shape}"
        if not target.numel():
            return
        straight = target.is_contiguous()
        flat = target.view(-1) if straight else torch.empty(target.shape, dtype=target.dtype).view(-1)
        try:
            with self.path.open("rb", buffering=0) as file:
                if flat.dtype is self.dtype:
                    self._read(file.fileno(), flat, 0)
                else:
                    self._read_converted(file.fileno(), flat)
        except OSError as error:
            raise DiskFault(
                f"{self.path}: {self.name} cannot be read: {error}; look after the disk and start again"
            ) from error
        if not straight:
            target.copy_(flat.view(target.shape))

    def same_values(self, other: torch.Tensor) -> bool:
        """Whether `other` [shape] holds what this tensor gives in its dtype; read piece by piece."""
        flat, start = other.reshape(-1), 0
        with self.path.open("rb", buffering=0) as file:
            while start < flat.numel():
                piece = torch.empty(min(_PIECE_BYTES // self.dtype.itemsize, flat.numel() - start), dtype=self.dtype)
                self._read(file.fileno(), piece, start)
                if not torch.equal(piece.to(flat.dtype), flat[start : start + piece.numel()]):
                    return False
                start += piece.numel()
        return True

    def _read_converted(self, descriptor: int, flat: torch.Tensor) -> None:
        buffer = torch.empty(min(_PIECE_BYTES // self.dtype.itemsize, flat.numel()), dtype=self.dtype)
        for start in range(0, flat.numel(), buffer.numel()):
            piece = buffer[: min(buffer.numel(), flat.numel() - start)]
            self._read(descriptor, piece, start)
            flat[start : start + piece.numel()].copy_(piece)

    def _read(self, descriptor: int, flat: torch.Tensor, first: int) -> None:
        """Fill `flat`, of the stored dtype, with the elements from number `first` on."""
        rest = flat.view(torch.uint8).numpy().data
        offset = self.offset_bytes + first * self.dtype.itemsize
        while rest:
            num_bytes = os.preadv(descriptor, [rest], offset)
            if num_bytes == 0:
                raise DiskFault(
                    f"{self.path} ended at byte {offset}, in the middle of {self.name}: it became shorter while it was "
                    "read; restore the file and start again"
                )
            rest, offset = rest[num_bytes:], offset + num_bytes


@dataclass(frozen=True)
class WeightFiles:
    """All tensors behind a path.

    Attributes:
        path: as it was given.
        tensors: name -> where it lies.
        aliases: further name -> the name that its value is stored under, where the files say so (ours do).
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    aliases: Mapping[str, str]


def find_weights(path: str | os.PathLike[str]) -> Path:
    """The file that says what lies where: a safetensors file, or an index of several.

    Raises:
        ValueError: there is none; says what there is.
    """
    place = Path(path)
    if place.is_file():
        if place.name.endswith((".safetensors", ".index.json")):
            return place
        raise ValueError(f"weights={str(path)!r} is no safetensors file; give one, or the folder that holds it")
    if not place.is_dir():
        raise ValueError(f"weights={str(path)!r}: there is no such file or folder on this machine")
    for name in (_SINGLE, _INDEX):
        if (place / name).is_file():
            return place / name
    found = sorted(place.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"weights={str(path)!r} holds {len(found)} safetensors files ({_few(p.name for p in found)}) but no "
            f"{_INDEX} that says which belong together; give one file, or add the index"
        )
    others = sorted(entry.name for entry in place.iterdir() if entry.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    hint = f"; it holds {_few(others)}, which must be saved as safetensors first" if others else ""
    raise ValueError(f"weights={str(path)!r} holds neither {_SINGLE} nor {_INDEX}{hint}")


def open_weights(path: str | os.PathLike[str]) -> WeightFiles:
    """Read and check the headers of all files behind `path`; no values are read.

    Raises:
        ValueError: no files, or one that is broken or truncated; names the file, the tensor, and what to do.
    """
    place = find_weights(path)
    if not place.name.endswith(".json"):
        tensors, aliases = _read_header(place)
        return WeightFiles(Path(path), tensors, aliases)
    weight_map = _read_index(place)
    headers: dict[str, dict[str, StoredTensor]] = {}
    aliases = {}
    for shard in dict.fromkeys(weight_map.values()):
        if not (place.parent / shard).is_file():
            raise ValueError(f"{place} names the shard {shard}, which is not there; download or copy it again")
        headers[shard], more = _read_header(place.parent / shard)
        aliases |= more
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise ValueError(
                f"{place} says that {name} lies in {shard}, but it does not; index and shards do not match"
            )
    return WeightFiles(Path(path), {name: headers[shard][name] for name, shard in weight_map.items()}, aliases)


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        if not all(isinstance(key, str) and isinstance(value, str) for key, value in weight_map.items()):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{path} is no index of safetensors files: {{"weight_map": {{name: file}}}} was expected; get it again'
        ) from error
    return weight_map


def _read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Name -> tensor, and the aliases, of one safetensors file."""
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
        if file_bytes < 8 or length > _LARGEST_HEADER_BYTES or length < 2:
            raise _broken(path, "its first 8 bytes are no length of a header")
        if 8 + length > file_bytes:
            raise _broken(path, f"its header has {length} bytes, the file has {file_bytes}: it is truncated")
        text = file.read(length)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        aliases = json.loads(metadata.get("aliases", "{}"))
        start = 8 + length
        tensors = {name: _stored(path, name, entry, start) for name, entry in header.items()}
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, TypeError) as error:
        raise _broken(path, f"its header cannot be read ({error})") from error
    end = max((tensor.offset_bytes + tensor.num_bytes for tensor in tensors.values()), default=start)
    if end != file_bytes:
        last = max(tensors.values(), key=lambda tensor: tensor.offset_bytes).name if tensors else "nothing"
        raise _broken(
            path,
            f"by its header it ends with {last} at byte {end}, but it has {file_bytes} bytes"
            + (": it is truncated" if file_bytes < end else ""),
        )
    return tensors, aliases


def _stored(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    try:
        kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        raise _broken(path, f"its header says nothing useful of {name}: {entry!r}") from None
    if kind not in _BY_NAME:
        raise ValueError(
            f"{path}: {name} has the dtype {kind}, which cannot be converted to a parameter's; save it in one of "
            f"{', '.join(_BY_NAME)}"
        )
    tensor = StoredTensor(name, path, start + begin, _BY_NAME[kind], shape) if whole else None
    if tensor is None or end - begin != tensor.num_bytes:
        raise _broken(path, f"{name} of shape {list(shape)} in {kind} does not fill bytes {begin} to {end}")
    return tensor


def _broken(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} is broken: {what}; download or write it again")


def _few(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
