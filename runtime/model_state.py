"""The model's state on one rank: parameters, gradients and optimizer slots, chunk by chunk.

Owns the storage of every chunk and what GATHER, DROP, REDUCE, NORM and STEP do to it. Does not own when they happen
(programs, the executor), the exchange between ranks (`parallel/collectives.py`) or the update rule (`optimizer.py`).

The model keeps its own Parameter objects; their `.data` are views into the chunk's gathered copy.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..memory.chunk import ChunkLayout
from ..parallel.actions import Action
from ..parallel.placement import (
    CommonParameters,
    UploadedParameters,
    WindowParameters,
)
from ..scheduler.moves import DEVICE_COPY
from ..scheduler.plan import Plan, UpdateTime
from .adopting import Adoption, Fill
from .chunk_state import ChunkState, OptimLayout, OwnedPiece, Places
from .device_state import DeviceState
from .gradients import Stash, add_gradients, norm_of, pack_gradients, refuse_sparse, take_gradients
from .offload import OffloadedState
from .optimizer import PiecewiseOptimizer

if TYPE_CHECKING:
    from ..memory.tiers import Tiers
    from ..parallel.collectives import Transport
    from .disk_tier import DiskTier

__all__ = ["ModelState"]


class ModelState:
    """Moves a model's parameters into chunks and carries out the actions on them.

    Args:
        model: its parameters' `.data` are replaced by views; the originals are let go chunk by chunk.
        layouts: the chunks, covering every parameter.
        plan: what is sharded.
        optimizer: made from the model's parameters, before they are moved.
        transport: None on a single rank.
        tier: the disk tier, where the plan uses it.
        optims: per chunk, where its optimizer slots lie on disk, or None.
        fill: gives the values, unit by unit; None: the model has them.
        tiers: host and device, where they are not the same memory.
    """

    def __init__(
        self,
        model: nn.Module,
        layouts: Sequence[ChunkLayout],
        plan: Plan,
        optimizer: PiecewiseOptimizer,
        transport: "Transport | None",
        clip_grad_norm: float | None,
        tier: "DiskTier | None" = None,
        optims: Sequence[OptimLayout | None] = (),
        fill: Fill | None = None,
        tiers: "Tiers | None" = None,
    ) -> None:
        self._plan = plan
        self._optimizer = optimizer
        self._transport = transport
        self._clip_grad_norm = clip_grad_norm
        self._by_name = dict(model.named_parameters())
        self._device = None if tiers is None else DeviceState(tiers, self._point_at_full)
        device = None if self._device is None else self._device.device
        self._placeholders = {layout.dtype: torch.empty(0, dtype=layout.dtype, device=device) for layout in layouts}
        self._nothing = torch.empty(0)
        self.places = Places()
        self._gathered_all = ExitStack()
        self._reduces = plan.sums_gradients
        self.grad_norm: float | None = None
        self.loss = 0.0
        self.micro_loss = 0.0
        self._norms: dict[str, torch.Tensor] = {}
        self._stash = Stash()
        self._offloaded = OffloadedState(tier, optimizer, self._point_at_full) if tier is not None else None
        self.chunks: list[ChunkState] = []
        adoption = Adoption(self._by_name, plan, transport, self._offloaded, optims, self._point_at_full, self._device)
        for chunk in adoption.chunks(layouts, fill):
            self.chunks.append(chunk)
        self._place_of = {
            item.name: (chunk, index) for chunk in self.chunks for index, item in enumerate(chunk.layout.fields)
        }
        self._optimizer.place(self._pieces_by_name())
        trainable = [chunk for chunk in self.chunks if chunk.layout.trainable]
        if transport is not None and trainable:
            dtypes = {chunk.layout.dtype for chunk in trainable}
            transport.prepare_reduce(
                max(chunk.layout.num_elems for chunk in trainable),
                dtypes.pop()
                if len(dtypes) == 1
                else torch.float32,  # mixed: narrower gradients are widened when packed
                max(len(chunk.layout.fields) for chunk in trainable),
            )

    def keep_between_steps(self, names: frozenset[str]) -> None:
        """What is still in its buffer when the next step begins (`Program.kept`)."""
        if self._offloaded is not None:
            self._offloaded.kept = names

    def begin_step(self) -> None:
        """Forget the last step's sums."""
        self.micro_loss = 0.0
        for chunk in self.chunks:
            chunk.squares = 0.0

    # ---- the handlers of a program's actions

    def gather(self, action: Action) -> None:
        (chunk := self._chunk(action)).store.gather()
        if chunk.store.comes_and_goes:  # else parameters are where they were, and each look at one may wait for a lane
            self._point_at_full(chunk)

    def drop(self, action: Action) -> None:
        chunk = self._chunk(action)
        if action.slot == DEVICE_COPY:
            assert self._device is not None
            self._device.drop(chunk)
        elif action.slot is not None:
            assert self._offloaded is not None
            self._offloaded.drop(chunk, action)
        elif chunk.store.comes_and_goes:
            chunk.store.drop()
            self._point_at_full(chunk)

    def up(self, action: Action) -> None:
        assert self._device is not None
        self._device.up(self._chunk(action))

    def down(self, action: Action) -> None:
        assert self._device is not None
        chunk = self._chunk(action)
        chunk.gradients = self._device.down(chunk, take_gradients(chunk, action.micro_batch, self._stash))

    def read(self, action: Action) -> Callable[[], None] | None:
        assert self._offloaded is not None
        return self._offloaded.read(self._chunk(action), action)

    def write(self, action: Action) -> Callable[[], None]:
        assert self._offloaded is not None
        return self._offloaded.write(self._chunk(action), action)

    def reduce(self, action: Action) -> None:
        """Sum this micro-batch's gradients over the ranks, onto those of the micro-batches before it."""
        chunk = self._chunk(action)
        if chunk.gradients is None:
            chunk.gradients = take_gradients(chunk, action.micro_batch, self._stash)
        whole = self._transport is None or not self._plan.chunks[chunk.layout.index].gradients_sharded
        if chunk.sums is None:
            size = chunk.layout.num_elems if whole else chunk.store.stop - chunk.store.start
            chunk.sums = torch.zeros(size, dtype=torch.float32, device=chunk.store.shard.device)
        if self._transport is None:
            used = add_gradients(chunk)
        else:
            chunk.squares, used = self._transport.reduce(
                lambda flat, flags: pack_gradients(chunk, flat, flags),
                chunk.layout.num_elems,
                len(chunk.layout.fields),
                chunk.sums,
                whole,
                accumulate=chunk.used is not None,
            )
        chunk.gradients = None
        chunk.used = used if chunk.used is None else chunk.used | used

    def norm(self, _action: Action) -> None:
        """The global gradient norm, the step's loss, and clipping (ALGORITHMS 1.8)."""
        if self._transport is None:
            self.loss = self.micro_loss
            if self._plan.update is UpdateTime.BACKWARD:  # the gradients are gone, each one's norm was taken before
                norms = [self._norms[name] for name in self._by_name if name in self._norms]
                self.grad_norm = torch.linalg.vector_norm(torch.stack(norms)).item() if norms else 0.0
                self._norms = {}
                return
            named = [self._local_gradient(name) for name in self._by_name]
            gradients = [gradient for gradient in named if gradient is not None]
            self.grad_norm = norm_of(gradients, self._clip_grad_norm)
            return
        squares = sum(chunk.squares for chunk in self.chunks)
        rows = self._transport.gather_rows([squares, self.micro_loss])
        total_squares, self.loss = (sum(column) for column in rows.T.tolist())
        self.grad_norm = norm = total_squares**0.5
        if self._clip_grad_norm is not None:
            factor = min(1.0, self._clip_grad_norm / (norm + 1e-6))
            if factor < 1.0:
                for chunk in self.chunks:
                    if chunk.sums is not None:
                        chunk.sums.mul_(factor)

    def step(self, action: Action) -> None:
        """Update the pieces of a chunk that this rank owns, and forget their gradients."""
        chunk = self._chunk(action)
        if self._transport is None and self._plan.update is UpdateTime.BACKWARD:
            gradients = {item.name: self._local_gradient(item.name) for item in chunk.layout.fields}
            self._norms |= {key: torch.linalg.vector_norm(g) for key, g in gradients.items() if g is not None}
        base = chunk.master if chunk.has_master else chunk.store.shard
        for piece in chunk.pieces:
            tensor = piece.tensor
            if chunk.moves_pieces:
                assert base is not None
                tensor.data = base[piece.start : piece.start + piece.num_elems]
            tensor.grad = self._gradient_of(chunk, piece)
        if not self._reduces:
            for parameter in chunk.parameters:
                parameter.grad = None
        if chunk.optim is not None:  # slots that are made now go to their buffer one after the other
            for piece in chunk.pieces:
                if not self._optimizer.has_slots(piece.tensor):
                    self._optimizer.step_piece(piece.tensor)
                    self._optimizer.move_into(piece.tensor, chunk.slots_of(piece))
        self._optimizer.step(chunk.layout.index)
        for piece in chunk.pieces:
            if chunk.optim is not None:
                self._optimizer.move_into(piece.tensor, chunk.slots_of(piece))
            if chunk.moves_pieces:
                piece.tensor.data = self._nothing
        if chunk.master is not None:
            chunk.store.shard.copy_(chunk.master)
        chunk.used = None
        if self._plan.update is UpdateTime.BACKWARD:
            chunk.sums = None

    def _gradient_of(self, chunk: ChunkState, piece: OwnedPiece) -> torch.Tensor | None:
        if not self._reduces:
            gradient = chunk.parameters[piece.index].grad
            if gradient is None:
                return None
            field = chunk.layout.fields[piece.index]
            start = chunk.store.start + piece.start - field.start
            return gradient.reshape(-1)[start : start + piece.num_elems].view(piece.tensor.shape)
        if chunk.used is None or not chunk.used[piece.index] or chunk.sums is None:
            return None
        start = piece.gradient_start
        return chunk.sums[start : start + piece.num_elems].view(piece.tensor.shape)

    # ---- what others ask

    def gather_all(self) -> None:
        """Gather every chunk: for looking at the model between steps. Collective."""
        if self._transport is not None:
            self._transport.gather_rows([0.0])  # every rank's last update is done
        for chunk in self.chunks:
            self._gathered_all.enter_context(self._in_memory(chunk, with_master=False))
            chunk.store.gather()
            self._point_at_full(chunk)

    def drop_all(self) -> None:
        """Back to what the plan keeps between steps."""
        for chunk in self.chunks:
            chunk.store.drop()
            self._point_at_full(chunk)
        self._gathered_all.close()

    @contextmanager
    def _in_memory(self, chunk: ChunkState, with_master: bool) -> Iterator[None]:
        with ExitStack() as stack:
            if self._offloaded is not None:
                stack.enter_context(self._offloaded.in_memory(chunk, with_master))
            if self._device is not None:
                stack.enter_context(self._device.brought(chunk))
            yield

    def leave(self) -> None:
        """The model keeps the weights that are whole in memory, wherever they are."""
        if self._device is not None:
            for chunk in self.chunks:
                self._device.leave(chunk)

    @contextmanager
    def gathered_chunk(self, index: int) -> Iterator[dict[str, torch.Tensor]]:
        """Gather one chunk; meanwhile its parameters' `.data` are there. Collective, in the same order on every rank.

        Yields parameter name -> its whole value, float32 where a master is kept; valid inside the block only.
        """
        chunk = self.chunks[index]
        was_there = chunk.store.full is not None
        if self._transport is not None:
            self._transport.gather_rows([0.0])  # every rank's last update is done
        with self._in_memory(chunk, with_master=True):
            chunk.store.gather()
            self._point_at_full(chunk)
            try:
                yield dict(self._values(chunk))
            finally:
                if not was_there:
                    chunk.store.drop()
                    self._point_at_full(chunk)

    def stash_gradients(self, chunks: Sequence[int], micro_batch: int) -> None:
        """Put a micro-batch's gradients of these chunks by, while another one has its turn."""
        if self._reduces:
            self._stash.put((self.chunks[index] for index in chunks), micro_batch)

    def restore_gradients(self, chunks: Sequence[int], micro_batch: int) -> None:
        """The micro-batch has its turn again."""
        if self._reduces:
            self._stash.restore((self.chunks[index] for index in chunks), micro_batch)

    def forget_gradients(self) -> None:
        """After a failed step: no gradient is left over for the next."""
        self._norms = {}
        self._stash = Stash()
        for chunk in self.chunks:
            if isinstance(chunk.store, UploadedParameters) and self._device is not None:
                self._device.drop(chunk)
            chunk.used = chunk.gradients = None
            for parameter in chunk.parameters:
                parameter.grad = None

    def forget_buffers(self) -> None:
        """Nothing from disk is in memory any more."""
        for chunk in self.chunks:
            if self._offloaded is not None:
                self._offloaded.drop_all(chunk)

    @property
    def drops_copies(self) -> bool:
        """Whether what units compute with really goes away: tensors that autograd saves must then not hold on to it."""
        return any(chunk.store.comes_and_goes for chunk in self.chunks)

    def masters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and float32 value of every parameter whose master is kept beside it. Collective."""
        for chunk in self.chunks:
            if chunk.has_master:
                with self._in_memory(chunk, with_master=True):
                    yield from self._values(chunk)

    def from_first_rank(self, value: torch.Tensor) -> torch.Tensor:
        """Rank 0's value on every rank: buffers such as running statistics are each rank's own. Collective."""
        return value if self._transport is None else self._transport.broadcast(value)

    @property
    def shared_bytes(self) -> int:
        """Shared memory that this rank holds as its own share."""
        if self._transport is None:
            return 0
        stores = [c.store for c in self.chunks if isinstance(c.store, (CommonParameters, WindowParameters))]
        return sum(store.held_bytes for store in stores) + self._transport.buffer_bytes

    def held_bytes(self) -> dict[str, int]:
        """Slot -> bytes that this rank holds now, read off the storages themselves."""
        for chunk in self.chunks:
            refuse_sparse(chunk)
        sizes = {"param": sum(chunk.store.held_bytes for chunk in self.chunks)}
        grads = sum(p.grad.nbytes for chunk in self.chunks for p in chunk.parameters if p.grad is not None)
        sizes["grad"] = grads + sum(chunk.sums.nbytes for chunk in self.chunks if chunk.sums is not None)
        master = sum(chunk.master.nbytes for chunk in self.chunks if chunk.master is not None)
        if master:
            sizes["master"] = master
        return sizes | self._optimizer.slot_bytes()

    # ---- storage

    def _values(self, chunk: ChunkState) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and whole value of a gathered chunk's parameters, from the master where there is one. Collective."""
        full = chunk.store.full if chunk.master is None else chunk.master
        assert full is not None
        if self._transport is not None and full.numel() < chunk.layout.num_elems:
            full = self._transport.all_gather(full)
        for item in chunk.layout.fields:
            yield item.name, chunk.layout.view(full, item)

    def _chunk(self, action: Action) -> ChunkState:
        assert action.index is not None
        return self.chunks[action.index]

    def _pieces_by_name(self) -> dict[str, list[tuple[int, torch.Tensor]]]:
        pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
        for chunk in self.chunks:
            for piece in chunk.pieces:
                name = chunk.layout.fields[piece.index].name
                pieces.setdefault(name, []).append((chunk.layout.index, piece.tensor))
        return pieces

    def _point_at_full(self, chunk: ChunkState) -> None:
        full = chunk.store.full
        self.places.put(chunk)
        for item, parameter in zip(chunk.layout.fields, chunk.parameters, strict=True):
            data = self._placeholders[chunk.layout.dtype] if full is None else chunk.layout.view(full, item)
            if parameter.data_ptr() != data.data_ptr() or parameter.shape != data.shape:
                parameter.data = data

    def _local_gradient(self, name: str) -> torch.Tensor | None:
        """On a single rank: the step's whole gradient of a parameter."""
        parameter = self._by_name[name]
        if not self._reduces:
            return parameter.grad
        chunk, index = self._place_of[name]
        if chunk.used is None or not chunk.used[index] or chunk.sums is None:
            return None
        return chunk.layout.view(chunk.sums, chunk.layout.fields[index])
