"""The model's state on one rank of a pipeline: that of its own stages.

Owns what differs from a rank that has all of the model: parameters of other stages are placeholders without memory,
gradients of parameters that several stages use are summed over the ranks that hold them, the gradient norm and the loss
are everyone's, and whole weights are collected from all ranks. Does not own the rest (`model_state.py`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..parallel.actions import Action
from ..parallel.mail import Mail
from ..scheduler.pipeline_program import TIED
from ..scheduler.plan import UpdateTime
from .chunk_state import ChunkState
from .gradients import pack_gradients, refuse_sparse, take_gradients
from .model_state import ModelState

__all__ = ["StageParts", "StageState"]


@dataclass(frozen=True)
class StageParts:
    """Who has what.

    Attributes:
        mail: between the ranks of the pipeline.
        peers: chunk -> all ranks of the pipeline that hold it, for chunks that several hold; this one among them.
        shapes: every parameter of the model -> its shape and dtype.
        buffers: names of the buffers that this rank keeps up to date.
    """

    mail: Mail
    peers: Mapping[int, tuple[int, ...]]
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    buffers: frozenset[str]


class StageState(ModelState):
    """See `ModelState`; `model` is the whole model, `layouts` are the chunks of this rank's stages."""

    def __init__(self, parts: StageParts, model: nn.Module, *arguments: Any, **named: Any) -> None:
        self.parts = parts
        self._buffers = dict(model.named_buffers(remove_duplicate=False))
        super().__init__(model, *arguments, **named)

    def reduce(self, action: Action) -> None:
        if action.slot == TIED:
            self._sum_over_stages(self._chunk(action))
        else:
            super().reduce(action)

    def norm(self, _action: Action) -> None:
        """The global gradient norm, the step's loss, and clipping. What several ranks hold counts once."""
        counted = [
            chunk
            for chunk in self.chunks
            if self.parts.peers.get(chunk.layout.index, (self.parts.mail.rank,))[0] == self.parts.mail.rank
        ]
        totals = [sum(self._squares(chunk) for chunk in counted), self.micro_loss]
        if self._transport is not None:
            totals = self._transport.gather_rows(totals).sum(dim=0).tolist()
        squares, self.loss = self.parts.mail.exchange("NORM", totals).sum(dim=0).tolist()
        self.grad_norm = norm = squares**0.5
        if self._clip_grad_norm is not None:
            factor = min(1.0, self._clip_grad_norm / (norm + 1e-6))
            if factor < 1.0:
                for gradient in self._gradients():
                    gradient.mul_(factor)

    def _squares(self, chunk: ChunkState) -> float:
        if self._transport is not None:
            return chunk.squares
        names = [item.name for item in chunk.layout.fields]
        if self._plan.update is UpdateTime.BACKWARD:  # the gradients are gone, each one's norm was taken before
            norms = [self._norms.pop(name).double() for name in names if name in self._norms]
        else:
            found = [self._local_gradient(name) for name in names]
            norms = [torch.linalg.vector_norm(gradient).double() for gradient in found if gradient is not None]
        return float(torch.stack(norms).square().sum()) if norms else 0.0

    def _gradients(self) -> Iterator[torch.Tensor]:
        for chunk in self.chunks:
            if self._reduces:
                yield from [chunk.sums] if chunk.sums is not None else []
            else:
                yield from [parameter.grad for parameter in chunk.parameters if parameter.grad is not None]

    def _sum_over_stages(self, chunk: ChunkState) -> None:
        """Every rank that holds the chunk gets the sum of all their gradients, added in rank order."""
        mail, peers = self.parts.mail, self.parts.peers[chunk.layout.index]
        refuse_sparse(chunk)
        flags = torch.zeros(len(chunk.parameters), dtype=torch.uint8)
        if self._reduces:
            own = chunk.sums if chunk.sums is not None and chunk.used is not None else None
            flags = flags if chunk.used is None else chunk.used
        else:
            own = torch.empty(chunk.layout.num_elems, dtype=chunk.layout.dtype)
            chunk.gradients = take_gradients(chunk, None, self._stash)
            pack_gradients(chunk, own, flags)
            chunk.gradients = None
        if own is None:
            assert chunk.store.full is not None or chunk.sums is not None
            own = chunk.sums if chunk.sums is not None else torch.zeros(chunk.layout.num_elems)
            own.zero_()
        sent = [own, flags.to(torch.uint8)]
        key = (TIED, self._tie_number(chunk), -1)
        for peer in peers:
            if peer != mail.rank:
                mail.send(peer, key, sent, sent)
        parts = [sent if peer == mail.rank else mail.receive(peer, key, sent) for peer in peers]
        total = torch.stack([part for part, _ in parts if part is not None]).sum(dim=0)
        used = torch.stack([flag for _, flag in parts if flag is not None]).amax(dim=0)
        if self._reduces:
            chunk.sums = own.copy_(total)
            chunk.used = used
            start, whole = chunk.store.start, own.numel() == chunk.layout.num_elems
            part = own[start : chunk.store.stop] if whole else own
            chunk.squares = float(torch.linalg.vector_norm(part).double().square())
            return
        for item, parameter, has in zip(chunk.layout.fields, chunk.parameters, used.tolist(), strict=True):
            if has:
                parameter.grad = chunk.layout.view(total, item).clone()

    def _tie_number(self, chunk: ChunkState) -> int:
        """The same on every rank: chunks are numbered on each rank for itself."""
        return sorted(self.parts.shapes).index(chunk.layout.fields[0].name)

    # ---- the whole model

    def everything(self, stored: frozenset[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and value of every parameter, and of the buffers named in `stored`. Collective in the pipeline.

        Valid until the next one is asked for.
        """
        mail = self.parts.mail
        seen: set[str] = set()
        for owner in range(mail.size):
            box: list[Any] = [len(self.chunks)]
            dist.broadcast_object_list(box, group=mail.group, group_src=owner)
            for index in range(box[0]):
                if owner != mail.rank:
                    yield from self._received(owner, {}, seen)
                    continue
                with self.gathered_chunk(index) as values:
                    yield from self._received(owner, values, seen)
            own = {name: self._buffers[name] for name in sorted(self.parts.buffers & stored)}
            shared = {name: self.from_first_rank(value.detach()) for name, value in own.items()}
            yield from self._received(owner, shared if owner == mail.rank else {}, seen)

    def _received(
        self, owner: int, values: Mapping[str, torch.Tensor], seen: set[str]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        group = self.parts.mail.group
        box: list[Any] = [[(name, tuple(value.shape), value.dtype) for name, value in values.items()]]
        dist.broadcast_object_list(box, group=group, group_src=owner)
        for name, shape, dtype in box[0]:
            value = values[name].detach().contiguous() if name in values else torch.empty(shape, dtype=dtype)
            dist.broadcast(value, group=group, group_src=owner)
            if name not in seen:  # what several ranks hold is the same on all of them
                seen.add(name)
                yield name, value

    def gather_all(self) -> None:
        found = {name: value.clone() for name, value in self.everything(frozenset(self._buffers))}
        super().gather_all()
        local = {item.name for chunk in self.chunks for item in chunk.layout.fields}
        for name, value in found.items():
            if name in self._by_name and name not in local:
                self._by_name[name].data = value.to(self.parts.shapes[name][1])
            elif name in self._buffers and name not in self.parts.buffers:
                self._buffers[name].copy_(value)

    def drop_all(self) -> None:
        super().drop_all()
        local = {item.name for chunk in self.chunks for item in chunk.layout.fields}
        for name, parameter in self._by_name.items():
            if name not in local:
                shape, dtype = self.parts.shapes[name]
                parameter.data = torch.zeros((), dtype=dtype).expand(shape)
