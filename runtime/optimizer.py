"""The optimizer of a run, on the pieces of parameters that a rank owns.

Owns: calling the user's factory on the model's own parameters (so that groups made by name or shape are what the user
meant), putting the rank's pieces in their places, updating one chunk at a time, and refusing optimizers whose result
would depend on how parameters are cut. Does not own storage, reduction or clipping.

A parameter without a gradient in a step is left out, as in plain PyTorch: no decay, no moment, no step count.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..memory.chunk import ALIGN_BYTES

__all__ = ["OptimizerFactory", "PiecewiseOptimizer", "default_optimizer"]

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def default_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW with torch's defaults, in its fused form: on CPU that is the one that runs at memory bandwidth."""
    return torch.optim.AdamW(parameters, fused=True)


class PiecewiseOptimizer:
    """A torch optimizer whose parameters are the pieces that this rank owns.

    Args:
        factory: f(params) -> torch.optim.Optimizer, called once with the model's trainable parameters.
        parameters: the trainable parameters by name, before they are cut.

    Raises:
        ValueError: what the factory returns is no optimizer, or holds parameters that are not the model's, or its
            update of a parameter changes when the parameter is cut (it needs whole matrices, or couples parameters).
    """

    def __init__(self, factory: OptimizerFactory | None, parameters: Mapping[str, nn.Parameter]) -> None:
        template = (factory or default_optimizer)(list(parameters.values()))
        if not isinstance(template, torch.optim.Optimizer):
            raise ValueError(
                f"optimizer=f(params) must return a torch.optim.Optimizer, it returned {type(template).__name__}; "
                "e.g. functools.partial(torch.optim.AdamW, lr=3e-4)"
            )
        names = {id(parameter): name for name, parameter in parameters.items()}
        self._names_by_group: list[list[str]] = []
        for group in template.param_groups:
            unknown = [tuple(p.shape) for p in group["params"] if id(p) not in names and p.requires_grad]
            if unknown:
                raise ValueError(f"the optimizer holds parameters that are not the model's, of shapes {unknown[:4]}")
            self._names_by_group.append([names[id(p)] for p in group["params"] if id(p) in names])
        self.optimizer = template
        self._refuse_whole_matrix()
        self.slots, self._initial = self._find_slots()
        """Slot -> dtype of what is kept for every element of a parameter (`exp_avg`, ...)."""
        self._pieces: list[dict[int, list[torch.Tensor]]] = [{} for _ in template.param_groups]

    @property
    def names(self) -> set[str]:
        """The parameters that are updated."""
        return {name for group in self._names_by_group for name in group}

    def place(self, pieces: Mapping[str, Sequence[tuple[int, torch.Tensor]]]) -> None:
        """Put the rank's pieces in the places of the parameters.

        Args:
            pieces: parameter name -> (chunk, tensor) for each piece that this rank owns; none for those it does not.
        """
        for group, names, by_chunk in zip(self.optimizer.param_groups, self._names_by_group, self._pieces, strict=True):
            for name in names:
                for chunk, tensor in pieces.get(name, ()):
                    by_chunk.setdefault(chunk, []).append(tensor)
            group["params"] = [tensor for chunk in sorted(by_chunk) for tensor in by_chunk[chunk]]
        if self.optimizer.state:  # state made in the constructor (Adagrad) belongs to the uncut parameters
            self.optimizer = _rebuilt(self.optimizer)

    def step(self, chunk: int) -> None:
        """Update the pieces of one chunk that have a gradient, and let go of the gradients."""
        self._update([piece for by_chunk in self._pieces for piece in by_chunk.get(chunk, ())])

    def step_piece(self, piece: torch.Tensor) -> None:
        """Update one piece alone, if it has a gradient: the same bits."""
        self._update([piece])

    def _update(self, pieces: Sequence[torch.Tensor]) -> None:
        groups = self.optimizer.param_groups
        whole = [group["params"] for group in groups]
        ready = {id(piece) for piece in pieces if piece.grad is not None}
        try:
            for group, parameters in zip(groups, whole, strict=True):
                group["params"] = [piece for piece in parameters if id(piece) in ready]
            if ready:
                self.optimizer.step()
        finally:
            for group, parameters in zip(groups, whole, strict=True):
                group["params"] = parameters
            for piece in pieces:
                piece.grad = None

    # ---- slots at home on another tier

    def has_slots(self, piece: torch.Tensor) -> bool:
        """Whether the piece has been updated before, so that its slots hold something."""
        return any(slot in self.optimizer.state.get(piece, ()) for slot in self.slots)

    def attach(self, piece: torch.Tensor, views: Mapping[str, torch.Tensor]) -> None:
        """The slots of a piece that has any lie in `views` from now on, with the values that are there."""
        state = self.optimizer.state.get(piece, {})
        for slot, view in views.items():
            if isinstance(state.get(slot), torch.Tensor):
                state[slot] = view

    def begin(self, piece: torch.Tensor, views: Mapping[str, torch.Tensor]) -> None:
        """Slots that an optimizer has from its construction on (Adagrad) begin with their values in `views`."""
        for slot, value in self._initial.items():
            self.optimizer.state[piece][slot] = views[slot].fill_(value)

    def move_into(self, piece: torch.Tensor, views: Mapping[str, torch.Tensor]) -> None:
        """Slots that an update has made elsewhere go into `views`.

        Raises:
            ValueError: a slot that the probe of the optimizer did not have.
        """
        state = self.optimizer.state.get(piece, {})
        for slot, value in state.items():
            if not isinstance(value, torch.Tensor) or value.numel() != piece.numel() or value.dim() == 0:
                continue
            if slot not in views:
                raise ValueError(
                    f"{type(self.optimizer).__name__} came to keep a slot {slot!r} that it had not on a small matrix: "
                    "no room on disk was planned for it; keep its slots in memory, or use another optimizer"
                )
            if value.data_ptr() != views[slot].data_ptr():
                state[slot] = views[slot].copy_(value)

    def detach(self, piece: torch.Tensor) -> None:
        """The memory of a piece's slots is about to hold something else."""
        state = self.optimizer.state.get(piece, {})
        for slot, dtype in self.slots.items():
            if isinstance(state.get(slot), torch.Tensor):
                state[slot] = torch.empty(0, dtype=dtype)

    @property
    def is_fused(self) -> bool:
        """Whether every update is one pass without temporaries."""
        return all(group.get("fused") for group in self.optimizer.param_groups)

    @property
    def is_foreach(self) -> bool:
        """Whether an update makes temporaries of all its parameters at once."""
        return any(group.get("foreach") for group in self.optimizer.param_groups)

    @property
    def lr(self) -> float:
        """Learning rate of the first group."""
        return float(self.optimizer.param_groups[0]["lr"]) if self.optimizer.param_groups else 0.0

    def slot_bytes(self) -> dict[str, int]:
        """Slot name -> bytes of this rank's optimizer state."""
        sizes: dict[str, int] = {}
        for state in self.optimizer.state.values():
            for slot, value in state.items():
                if isinstance(value, torch.Tensor) and (value.numel() > 1 or slot in self.slots):
                    sizes[slot] = sizes.get(slot, 0) + value.nbytes
        return sizes

    def alone(self, parameter: nn.Parameter) -> torch.optim.Optimizer:
        """An optimizer of the same kind, with the first group's numbers, for one parameter that is not the model's."""
        group = next(group for group in self.optimizer.param_groups if group["params"])
        return _rebuilt(self.optimizer, [group | {"params": [parameter]}])

    def _refuse_whole_matrix(self) -> None:
        """Update a small matrix whole and in pieces, beside another parameter and alone: the bits must not differ.

        It is cut in the middle of a row, and where chunks are cut: at multiples of ALIGN_BYTES. (Elsewhere fused
        kernels round differently, as they treat what fills no whole vector apart.)
        """
        name = type(self.optimizer).__name__
        why = (
            f"{name} is refused: its update of a parameter depends on how the parameter is cut, or on other "
            "parameters, so sharding it would change the result; use an element-wise optimizer "
            "(SGD, Adam, AdamW, RMSprop, Adagrad, ...)"
        )
        generator = torch.Generator().manual_seed(0)
        value = torch.randn(21, 23, generator=generator)
        gradients = [torch.randn(21, 23, generator=generator) for _ in range(3)]
        border = 7 * ALIGN_BYTES // value.itemsize
        for number, group in enumerate(self.optimizer.param_groups):
            if not group["params"]:
                continue
            try:
                whole = self._probe(number, [value.clone(), value.clone() + 1], [[g, g * 2] for g in gradients])[0]
                cut = [value.reshape(-1)[:border].clone(), value.reshape(-1)[border:].clone()]
                flat = [[g.reshape(-1)[:border], g.reshape(-1)[border:]] for g in gradients]
                pieces = [self._probe(number, [cut[part]], [[g[part]] for g in flat])[0] for part in range(len(cut))]
            except Exception as error:
                raise ValueError(f"{why} ({type(error).__name__}: {error})") from error
            if not torch.equal(whole.reshape(-1), torch.cat(pieces)):
                raise ValueError(why)

    def _find_slots(self) -> tuple[dict[str, torch.dtype], dict[str, float]]:
        """What is kept for every element, and the values that some of it has before the first update."""
        slots: dict[str, torch.dtype] = {}
        initial: dict[str, float] = {}
        for group in self.optimizer.param_groups:
            if not group["params"]:
                continue
            parameter = nn.Parameter(torch.ones(21, 23))
            probe = _rebuilt(self.optimizer, [group | {"params": [parameter]}])
            before = {slot for slot, value in probe.state[parameter].items() if _is_slot(value, parameter)}
            for slot in before:
                initial[slot] = float(probe.state[parameter][slot].reshape(-1)[0])
            parameter.grad = torch.ones_like(parameter)
            probe.step()
            state = probe.state[parameter]
            slots |= {slot: value.dtype for slot, value in state.items() if _is_slot(value, parameter)}
        return slots, initial

    def _probe(self, group: int, values: list[torch.Tensor], gradients: list[list[torch.Tensor]]) -> list[torch.Tensor]:
        """Run the optimizer's own update on small tensors with the hyper-parameters of one of its groups."""
        parameters = [nn.Parameter(value) for value in values]
        probe = _rebuilt(self.optimizer, [self.optimizer.param_groups[group] | {"params": parameters}])
        for step in gradients:
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient.clone()
            probe.step()
        return [parameter.detach() for parameter in parameters]


def _is_slot(value: Any, parameter: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == parameter.shape


def _rebuilt(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]] | None = None) -> torch.optim.Optimizer:
    """An optimizer of the same kind without state; its groups carry every hyper-parameter."""
    groups = [dict(group) for group in (groups or optimizer.param_groups)]
    for group in groups:
        group.setdefault("lr", optimizer.defaults.get("lr"))
    filled = [group for group in groups if group["params"]]
    if not filled:
        return optimizer
    accepted = inspect.signature(type(optimizer).__init__).parameters
    defaults = {key: value for key, value in optimizer.defaults.items() if key in accepted}
    return type(optimizer)(groups, **defaults)
