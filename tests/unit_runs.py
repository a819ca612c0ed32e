"""One training step of a small model, unit by unit, with a policy for each unit's activations: for comparing bits."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from models import CASES, GPT, EncoderDecoder
from torch import nn
from torch.autograd.graph import register_multi_grad_hook, saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from outgrow.memory.activations import ActivationStore
from outgrow.memory.direct_io import AlignedBuffer
from outgrow.memory.disk import DiskStore, ExtentSpec
from outgrow.parallel.units import find_units
from outgrow.runtime.recompute import Recomputed

POLICIES = ("keep", "recompute", "offload:host", "offload:disk", "recompute:selective")
WITH_DROPOUT: dict[str, Callable[[], nn.Module]] = {
    "gpt": lambda: GPT(dropout=0.2),
    "gpt-tied": lambda: GPT(tied=True, dropout=0.2),
    "encoder-decoder": lambda: EncoderDecoder(dropout=0.2),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(11)
    return WITH_DROPOUT.get(name, CASES[name].build)()


class Home:
    """A model's parameters in one flat buffer that moves: whoever held on to the old place reads NaN."""

    def __init__(self, model: nn.Module) -> None:
        self._fields: list[tuple[nn.Parameter, int]] = []
        end = 0
        for parameter in model.parameters():
            self._fields.append((parameter, end))
            end += -(-parameter.numel() // 16) * 16
        self._flat = torch.zeros(end)
        for parameter, start in self._fields:
            self._flat[start : start + parameter.numel()].view(parameter.shape).copy_(parameter.data)
        self._point()

    def find(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor] | None:
        if tensor.layout is torch.strided and tensor.untyped_storage()._cdata == self._flat.untyped_storage()._cdata:
            return functools.partial(self._view, tensor.shape, tensor.stride(), int(tensor.storage_offset()))
        return None

    def hooks(self) -> Any:
        def pack(tensor: torch.Tensor) -> Any:
            return self.find(tensor) or tensor.detach()

        return saved_tensors_hooks(pack, lambda packed: packed if isinstance(packed, torch.Tensor) else packed())

    def move(self) -> None:
        old, self._flat = self._flat, self._flat.clone()
        old.fill_(float("nan"))
        self._point()

    def _view(self, *place: Any) -> torch.Tensor:
        return self._flat.as_strided(*place)

    def _point(self) -> None:
        for parameter, start in self._fields:
            parameter.data = self._flat[start : start + parameter.numel()].view(parameter.shape)


class FarTier:
    """Where saved activations go: a dictionary, or extents of a disk store."""

    def __init__(self, folder: Path, sizes: dict[tuple[int, int], int]) -> None:
        extents = [ExtentSpec(f"a{run}.{part}", size) for (run, part), size in sizes.items() if size]
        self._disk = DiskStore(folder, "runs", 0, extents, block_bytes=8192, depth=1) if extents else None
        self._host: dict[tuple[int, int], torch.Tensor] = {}

    def put(self, run: int, part: int, staging: torch.Tensor, disk: bool) -> None:
        if disk and staging.numel():
            assert self._disk is not None
            self._disk.write(f"a{run}.{part}", staging).wait()
        else:
            self._host[run, part] = staging.clone()
        staging.fill_(255)  # floats of all ones are NaN

    def get(self, run: int, part: int, staging: torch.Tensor, disk: bool) -> None:
        if disk and staging.numel():
            assert self._disk is not None
            self._disk.read(f"a{run}.{part}", staging).wait()
        else:
            staging.copy_(self._host.pop((run, part)))

    def close(self) -> None:
        if self._disk is not None:
            self._disk.close()


@dataclass
class Bits:
    """All that must not depend on the policies."""

    losses: list[float]
    gradients: dict[str, torch.Tensor | None]
    buffers: dict[str, torch.Tensor]
    random: torch.Tensor
    sizes: dict[tuple[int, int], int] = field(default_factory=dict)

    def differ(self, other: "Bits") -> list[str]:
        """What is not the same, bit for bit."""
        wrong = [] if self.losses == other.losses else [f"losses {self.losses} {other.losses}"]
        for mine, its in ((self.gradients, other.gradients), (self.buffers, other.buffers)):
            assert mine.keys() == its.keys()
            wrong += [name for name in mine if not _same(mine[name], its[name])]
        return wrong + ([] if torch.equal(self.random, other.random) else ["random numbers"])


def _same(mine: torch.Tensor | None, its: torch.Tensor | None) -> bool:
    return mine is its if mine is None or its is None else torch.equal(mine, its)


class UnitRuns:
    """Runs a model's step with policies given in turn to its unit runs.

    Args:
        moves: parameters lie in a flat buffer that moves, and its old place is filled with NaN, before every backward.
        together: every micro-batch's forward before any backward.
    """

    def __init__(
        self,
        name: str,
        policies: Sequence[str],
        far: FarTier | None = None,
        moves: bool = False,
        together: bool = False,
    ) -> None:
        self.case = CASES[name]
        self.model = build(name)
        self.units = find_units(self.model, None)
        self.policies = policies
        self.far = far
        self.home = Home(self.model) if moves else None
        self.together = together
        self.store = ActivationStore(elsewhere=self.home.find if self.home else None)
        self.sizes: dict[tuple[int, int], int] = {}
        self._part = self._run = 0
        self._context: Any = None
        self._loaded: tuple[tuple[int, int], torch.Tensor] | None = None

    def step(self, micro_batches: int = 2) -> Bits:
        handles: list[Any] = []
        recomputed = []
        for number, unit in enumerate(self.units):
            handles.append(unit.module.register_forward_pre_hook(self._before))
            handles.append(unit.module.register_forward_hook(self._after))
            policy = self.policies[number % len(self.policies)]
            if policy.startswith("recompute"):
                recomputed.append(Recomputed(unit.module, unit.name, policy.endswith("selective")).install())
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other
        try:
            return self._step(micro_batches)
        finally:
            torch.set_num_threads(num_threads)
            for handle in [*handles, *recomputed]:
                handle.remove()

    def _step(self, micro_batches: int) -> Bits:
        parts = [tensor.tensor_split(micro_batches) for tensor in self.case.batch(0, 6)]
        losses, values = [], []
        for self._part, part in enumerate(zip(*parts, strict=True)):
            self._run = 0
            if self.home is None:
                losses.append(self.case.loss(self.model(*part[:-1]), part[-1]))
            else:
                with self.home.hooks():
                    losses.append(self.case.loss(self.model(*part[:-1]), part[-1]))
            values.append(losses[-1].item())
            if not self.together:
                self._backward(losses.pop())
        while losses:
            self._backward(losses.pop())
        random = torch.get_rng_state()
        gradients = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        return Bits(values, gradients, dict(self.model.named_buffers()), random, self.sizes)

    def _backward(self, loss: torch.Tensor) -> None:
        if self.home is not None:
            self.home.move()
        loss.backward()
        self._leave()

    def _policy(self, module: nn.Module) -> str:
        number = next(number for number, unit in enumerate(self.units) if unit.module is module)
        return self.policies[number % len(self.policies)]

    def _before(self, module: nn.Module, _args: Any) -> None:
        torch.manual_seed(1000 * self._part + self._run)
        if self._policy(module).startswith("offload"):
            self._context = self.store.hooks(self._run, self._part)
            self._context.__enter__()

    def _after(self, module: nn.Module, _args: Any, output: Any) -> None:
        run, part = self._run, self._part
        self._run += 1
        policy = self._policy(module)
        if not policy.startswith("offload"):
            return
        self._context.__exit__(None, None, None)
        self.sizes[run, part] = self.store.bytes_needed(run, part)
        if self.far is not None:
            staging = _staging(self.sizes[run, part])
            assert self.store.save(run, part, staging) == staging.numel()
            self.far.put(run, part, staging, policy == "offload:disk")
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        if outputs:
            register_multi_grad_hook(outputs, lambda _: self._come_to(run, part, policy == "offload:disk"), mode="any")
        else:
            self.store.release(run, part)

    def _come_to(self, run: int, part: int, disk: bool) -> None:
        """Backward comes to a unit: the one before is over, and its buffer is used for something else."""
        self._leave()
        staging = _staging(self.sizes[run, part])
        if self.far is not None:
            self.far.get(run, part, staging, disk)
            self.store.load(run, part, staging)
        self._loaded = (run, part), staging

    def _leave(self) -> None:
        if self._loaded is not None:
            group, staging = self._loaded
            self._loaded = None
            self.store.release(*group)
            staging.fill_(255)


def _staging(num_bytes: int) -> torch.Tensor:
    return AlignedBuffer(num_bytes).tensor() if num_bytes else torch.empty(0, dtype=torch.uint8)


def plain_bits(name: str, moves: bool = False, together: bool = False) -> Bits:
    """As PyTorch does it; without `moves` there are no saved-tensor hooks at all."""
    return UnitRuns(name, ("keep",), moves=moves, together=together).step()


def run(module: nn.Module, *args: Any, seed: int = 5, **kwargs: Any) -> tuple[list[Any], Any]:
    """Gradients of inputs and parameters, and the output."""
    torch.manual_seed(seed)
    module.zero_grad()
    output = module(*args, **kwargs)
    leaves = tree_leaves(output)
    sum((leaf**2).sum() for leaf in leaves if isinstance(leaf, torch.Tensor)).backward()
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    gradients = [t.grad for t in [*inputs, *module.parameters()]]
    for tensor in inputs:
        tensor.grad = None
    return [None if grad is None else grad.clone() for grad in gradients], output


def same(mine: list[Any], its: list[Any]) -> bool:
    return len(mine) == len(its) and all(
        a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(mine, its, strict=True)
    )


def leaf(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()
