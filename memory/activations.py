"""The activation store: tensors that autograd saved for backward, moved out of memory and back.

Owns what autograd is given instead of a saved tensor, the copies into and out of buffers that the caller planned, and
the count of the bytes. Does not own which unit's activations move, nor when, nor between which tiers (programs), nor
the buffers (arenas), nor parameters (`elsewhere` finds those again).

Everything saved during one run of a unit on one micro-batch is a *group*, `a7.0` in actions:

    hooks   -> open      the original tensors live; unpacking gives them
    save    -> away      their bytes lie in a staging buffer, the originals are let go; unpacking is a bug
    load    -> here      their bytes lie in a (perhaps other) buffer; unpacking gives views of it
    release -> gone      the buffer may be used for something else; unpacking is a bug

A storage is stored once, however many views of it were saved, and only from the first to the last byte that was saved.
Nothing here keeps memory alive that autograd has let go: a group knows its tensors weakly, autograd's graph owns them.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from typing import Any
from weakref import WeakSet, WeakValueDictionary

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .errors import DoesNotFit, OutgrowError

__all__ = ["ALIGN_BYTES", "ActivationStatistics", "ActivationStore", "Elsewhere"]

ALIGN_BYTES = 64  # of every storage in a staging buffer, as torch's own allocator gives: kernels may round by alignment

Elsewhere = Callable[[torch.Tensor], Callable[[], torch.Tensor] | None]
"""f(saved tensor) -> None, or how to find it again in backward: for views of chunks, which have a home of their own."""


@dataclass(frozen=True, slots=True)
class ActivationStatistics:
    """A snapshot.

    Attributes:
        num_groups: groups that were not released.
        open_bytes: of the originals that groups not yet saved refer to (what saving all of them would need).
        away_bytes: saved and not yet loaded.
        here_bytes: loaded and not yet released.
    """

    num_groups: int
    open_bytes: int
    away_bytes: int
    here_bytes: int


class _State(Enum):
    OPEN = "its forward is not over or not yet saved"
    AWAY = "saved, and not loaded"
    HERE = "loaded"
    GONE = "released"


class _Entry:
    """One storage of a group. Alive as long as a saved tensor in it is."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage: torch.UntypedStorage | None = storage  # until saved: its address stays its own that long
        self.start_bytes = 0  # first byte that was stored, counted in the storage
        self.position_bytes = -1  # where that byte lies in the buffer; -1: not stored


class _Saved:
    """One tensor that autograd saved: where it lies in its storage, and the version at which it was saved."""

    def __init__(self, tensor: torch.Tensor, group: "_Group", entry: _Entry) -> None:
        self.group = group
        self.entry = entry
        # Shares the version counter with the original, even after its bytes were let go. Not the tensor itself: that
        # may be the output of the very node that saves it, and the two would keep each other alive.
        self.guard = tensor.detach()
        self.version = tensor._version
        self.dtype = tensor.dtype
        self.shape = tensor.shape
        self.stride = tensor.stride()
        self.start_bytes = int(tensor.storage_offset()) * tensor.itemsize
        self.conjugated = tensor.is_conj()
        self.negated = tensor.is_neg()

    @property
    def stop_bytes(self) -> int:
        """The end of the last byte that belongs to the tensor, counted in its storage."""
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        return self.start_bytes + (last + 1) * self.dtype.itemsize

    def view_of(self, buffer: torch.Tensor) -> torch.Tensor:
        """The tensor in the buffer that its group was loaded into."""
        position = self.entry.position_bytes + self.start_bytes - self.entry.start_bytes
        view = torch.empty(0, dtype=self.dtype, device=buffer.device)
        offset = (int(buffer.storage_offset()) + position) // self.dtype.itemsize
        view.set_(buffer.untyped_storage(), offset, self.shape, self.stride)
        if self.negated:
            view = torch._neg_view(view)
        return view.conj() if self.conjugated else view


class _Kept:
    """A tensor that stays where it is: small, a leaf that gets a gradient, or of a kind that has no plain bytes."""

    def __init__(self, tensor: torch.Tensor) -> None:
        # A leaf itself: its data may be pointed elsewhere until backward, and is then looked for there.
        stays = isinstance(tensor, torch.nn.Parameter) or (tensor.is_leaf and tensor.requires_grad)
        self.guard = tensor if stays else tensor.detach()
        self.version = tensor._version

    @property
    def shape(self) -> torch.Size:
        return self.guard.shape


class _Group:
    """What one run of a unit on one micro-batch saved."""

    def __init__(self, run: int, micro_batch: int) -> None:
        self.run = run
        self.micro_batch = micro_batch
        self.state = _State.OPEN
        self.saved: WeakSet[_Saved] = WeakSet()
        self.entries: WeakValueDictionary[int, _Entry] = WeakValueDictionary()  # by address of the storage object
        self.num_bytes = 0  # in the staging buffer, once saved
        self.buffer: torch.Tensor | None = None

    @property
    def name(self) -> str:
        return f"a{self.run}.{self.micro_batch}"

    def layout(self) -> tuple[list[tuple[_Entry, int, int, int]], int]:
        """(entry, first byte and end in its storage, position in the buffer) of what is alive, and the whole size."""
        spans: dict[_Entry, tuple[int, int]] = {}
        for saved in list(self.saved):
            start, stop = saved.start_bytes, saved.stop_bytes
            if saved.entry in spans:
                first, last = spans[saved.entry]
                start, stop = min(start, first), max(stop, last)
            spans[saved.entry] = start, stop
        placed = []
        end = 0
        for entry, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
            assert entry.storage is not None
            # Every address keeps its remainder, so that kernels find the alignment that they had.
            position = -(-end // ALIGN_BYTES) * ALIGN_BYTES + (entry.storage.data_ptr() + start) % ALIGN_BYTES
            placed.append((entry, start, stop, position))
            end = position + stop - start
        return placed, end


class ActivationStore:
    """The saved tensors of units whose activations move. Made for one compute thread and one thread that moves bytes.

    Args:
        device: where the units compute; tensors on other devices stay where they are.
        elsewhere: knows the tensors that have a home of their own (views of chunks, buffers that live anyway).
        threshold_bytes: storages smaller than this stay where they are.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        elsewhere: Elsewhere | None = None,
        threshold_bytes: int = 1024,
    ) -> None:
        self._device_type = torch.device(device).type
        self._elsewhere = elsewhere
        self._threshold_bytes = threshold_bytes
        self._lock = threading.RLock()
        self._groups: dict[tuple[int, int], _Group] = {}

    def hooks(self, run: int, micro_batch: int) -> AbstractContextManager[None]:
        """A context for the forward of unit run `run` on `micro_batch`: all that autograd saves in it is the group's.

        Of nested saved-tensor hooks torch asks the innermost alone: what outer hooks would do belongs in `elsewhere`.
        """
        group = _Group(run, micro_batch)
        with self._lock:
            assert (run, micro_batch) not in self._groups, f"{group.name} was not released before its next forward"
            self._groups[run, micro_batch] = group
        return torch.autograd.graph.saved_tensors_hooks(lambda tensor: self._pack(group, tensor), self._unpack)

    def holds(self, run: int, micro_batch: int) -> bool:
        """Whether there is such a group: not where a rank has no samples for a micro-batch, nor after `release`."""
        with self._lock:
            return (run, micro_batch) in self._groups

    def bytes_needed(self, run: int, micro_batch: int) -> int:
        """Bytes of staging that `save` needs, 0 where nothing is to be stored. Final once its forward is over."""
        with self._lock:
            group = self._find(run, micro_batch)
            return group.layout()[1] if group.state is _State.OPEN else group.num_bytes

    def save(self, run: int, micro_batch: int, staging: torch.Tensor) -> int:
        """Copy the group's bytes into `staging` and let the originals go.

        A tensor that was modified in place since it was saved is noticed when backward asks for it, as in plain
        autograd. On CUDA the copies are queued on the current stream, which must be behind the unit's forward.

        Args:
            staging: flat uint8, starting at a multiple of 64 bytes.

        Returns:
            bytes used of `staging`, from its start.

        Raises:
            DoesNotFit: `staging` is too small; nothing was changed.
        """
        _check_buffer(staging)
        with self._lock:
            group = self._find(run, micro_batch)
            assert group.state is _State.OPEN, f"SAVE {group.name}: it is {group.state.value}"
            placed, num_bytes = group.layout()
        if num_bytes > staging.numel():
            raise DoesNotFit(
                f"SAVE {group.name}: what unit run {run} saved for backward on micro-batch {micro_batch} has "
                f"{num_bytes:,} bytes, its buffer {staging.numel():,}, {num_bytes - staging.numel():,} too few. "
                "Larger samples than in the first step need larger buffers: begin with the largest batch"
            )
        for entry, start, stop, position in placed:
            assert entry.storage is not None
            source = torch.empty(0, dtype=torch.uint8, device=entry.storage.device)
            source.set_(entry.storage, start, (stop - start,), (1,))
            target = staging[position : position + stop - start]
            if not source.is_cuda and not staging.is_cuda:
                # By this thread alone: torch would take helpers from those that compute meanwhile.
                np.copyto(target.numpy(), source.numpy())
                continue
            target.copy_(source, non_blocking=True)
            if source.is_cuda:
                source.record_stream(torch.cuda.current_stream(source.device))
        with self._lock:
            for entry, start, _, position in placed:
                entry.start_bytes, entry.position_bytes, entry.storage = start, position, None
            for saved in list(group.saved):
                saved.guard.data = saved.guard.new_empty(0)  # the version counter stays the original's
            group.state, group.num_bytes = _State.AWAY, num_bytes
        return num_bytes

    def load(self, run: int, micro_batch: int, staging: torch.Tensor) -> None:
        """The group's bytes lie in `staging` now, as `save` left them: backward finds them there until `release`.

        Args:
            staging: as for `save`, on the device where the unit computes.
        """
        _check_buffer(staging)
        with self._lock:
            group = self._find(run, micro_batch)
            assert group.state is _State.AWAY, f"LOAD {group.name}: it is {group.state.value}"
            assert staging.numel() >= group.num_bytes, (
                f"LOAD {group.name}: {staging.numel()} of {group.num_bytes} bytes"
            )
            if group.num_bytes:  # a storage object of its own over the same bytes, to see who still holds it
                group.buffer = torch.from_dlpack(staging[: group.num_bytes])
            group.state = _State.HERE

    def release(self, run: int, micro_batch: int) -> None:
        """The unit's backward is over: forget the group, whatever its state; its buffer is free.

        Raises:
            OutgrowError: something still refers to the loaded bytes, which would change under its hands.
        """
        with self._lock:
            group = self._find(run, micro_batch)
            del self._groups[run, micro_batch]
            group.state = _State.GONE
            if group.buffer is None:
                return
            reference = StorageWeakRef(group.buffer.untyped_storage())
            group.buffer = None
        if not reference.expired():
            raise OutgrowError(
                f"after the backward of unit run {run} on micro-batch {micro_batch}, something still holds tensors "
                f"that were saved in its forward ({group.name}), and their memory is about to be used again. A custom "
                "autograd function that returns a saved tensor as a gradient does this: let it return a copy, or keep "
                "or recompute this unit's activations"
            )

    def clear(self) -> None:
        """Forget every group, after a failed step."""
        with self._lock:
            for group in self._groups.values():
                group.state, group.buffer = _State.GONE, None
            self._groups.clear()

    def statistics(self) -> ActivationStatistics:
        with self._lock:
            groups = list(self._groups.values())
            return ActivationStatistics(
                len(groups),
                sum(group.layout()[1] for group in groups if group.state is _State.OPEN),
                sum(group.num_bytes for group in groups if group.state is _State.AWAY),
                sum(group.num_bytes for group in groups if group.state is _State.HERE),
            )

    def _find(self, run: int, micro_batch: int) -> _Group:
        group = self._groups.get((run, micro_batch))
        assert group is not None, f"there is no a{run}.{micro_batch}: no forward made it, or it was released"
        return group

    def _pack(self, group: _Group, tensor: torch.Tensor) -> Any:
        if self._elsewhere is not None:
            found = self._elsewhere(tensor)
            if found is not None:
                return found
        if not self._moves(tensor):
            return _Kept(tensor)
        if tensor.numel() == 0:  # no bytes, but perhaps a view that would keep a large storage alive
            return _Kept(torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device))
        storage = tensor.untyped_storage()
        with self._lock:
            assert group.state is _State.OPEN, f"{group.name} is {group.state.value}, but its forward goes on"
            entry = group.entries.get(storage._cdata)
            if entry is None:
                entry = group.entries[storage._cdata] = _Entry(storage)
            saved = _Saved(tensor, group, entry)
            group.saved.add(saved)
        return saved

    def _moves(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor has plain bytes that are worth moving and that nobody else owns."""
        return (
            type(tensor) is torch.Tensor
            and not isinstance(tensor._base, torch.nn.Parameter)  # a view of a weight, which lives on anyway
            and tensor.layout is torch.strided
            and tensor.device.type == self._device_type
            and not (tensor.is_leaf and tensor.requires_grad)
            and not tensor.is_quantized
            and not tensor.is_nested
            and tensor.untyped_storage().nbytes() >= self._threshold_bytes
        )

    def _unpack(self, packed: Any) -> torch.Tensor:
        if not isinstance(packed, (_Saved, _Kept)):
            return packed()
        if packed.guard._version != packed.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{packed.guard.dtype} {list(packed.shape)}], is at version {packed.guard._version}; expected "
                f"version {packed.version} instead. "
                "Hint: enable anomaly detection to find the operation that failed to compute its gradient, with "
                "torch.autograd.set_detect_anomaly(True)."
            )
        if isinstance(packed, _Kept):
            return packed.guard
        with self._lock:
            group = packed.group
            if group.state is _State.OPEN:
                return packed.guard
            assert group.state is not _State.AWAY, f"backward needs {group.name} before LOAD {group.name}"
            assert group.buffer is not None, f"backward needs {group.name}, which was released"
            return packed.view_of(group.buffer)


def _check_buffer(staging: torch.Tensor) -> None:
    assert staging.dtype is torch.uint8, f"a staging buffer is uint8, not {staging.dtype}"
    assert staging.dim() == 1, f"a staging buffer is flat, not {tuple(staging.shape)}"
    assert staging.is_contiguous(), "a staging buffer is contiguous"
    assert staging.data_ptr() % ALIGN_BYTES == 0, f"a staging buffer starts at a multiple of {ALIGN_BYTES} bytes"
