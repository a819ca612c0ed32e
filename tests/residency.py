"""Training with state in various places, for comparing bits; and sets of cases in which every two words meet."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from models import DROPPING

from outgrow import Engine, Memory
from outgrow.runtime import planning
from outgrow.scheduler import fit

__all__ = [
    "OPTIMIZERS",
    "Outcome",
    "covering",
    "engine_of",
    "every_pair_meets",
    "grouped",
    "in_memory",
    "layout",
    "outcome",
    "places",
    "unequal",
]


def grouped(parameters: Any) -> torch.optim.Optimizer:
    """Two groups by shape, with settings of their own."""
    kept = list(parameters)
    return torch.optim.AdamW(
        [
            {"params": [p for p in kept if p.dim() > 1], "weight_decay": 0.2},
            {"params": [p for p in kept if p.dim() <= 1], "weight_decay": 0.0, "lr": 3e-2, "betas": (0.8, 0.9)},
        ],
        lr=1e-2,
    )


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
    "fused": functools.partial(torch.optim.AdamW, lr=1e-2, fused=True),
    "groups": grouped,
    "sgd": functools.partial(torch.optim.SGD, lr=0.1),
    "momentum": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=1e-3, centered=True, momentum=0.5),
    "adagrad": functools.partial(torch.optim.Adagrad, lr=1e-2, initial_accumulator_value=0.5),
}


@dataclass(frozen=True)
class Outcome:
    """All that must not depend on where state lies."""

    losses: list[float]
    norms: list[float | None]
    rates: list[float]
    weights: Mapping[str, torch.Tensor]

    def differ(self, other: "Outcome") -> list[str]:
        """What is not the same, bit for bit."""
        words = ("losses", "norms", "rates")
        wrong = [
            f"{name} {getattr(self, name)} {getattr(other, name)}" for name in words if not _same(self, other, name)
        ]
        assert list(self.weights) == list(other.weights)
        return wrong + unequal(self.weights, other.weights)


def _same(one: Outcome, other: Outcome, name: str) -> bool:
    return getattr(one, name) == getattr(other, name)


@contextmanager
def engine_of(
    name: str,
    optimizer: str,
    folder: str | None,
    prefetch: int = 1,
    cache_bytes: int = 0,
    device_cache_bytes: int | None = None,
    **arguments: Any,
) -> Iterator[Engine]:
    """An engine whose parameters on disk may stay in `cache_bytes` of memory, instead of in what the machine has.

    Args:
        device_cache_bytes: makes it one with a device apart from the host, on which so many bytes of copies may stay.
    """
    case = arguments.pop("case", DROPPING[name])
    memory = Memory(disk=folder)
    if device_cache_bytes is not None:
        memory = Memory(device="1GiB", disk=folder, unified=False)
    memory = arguments.pop("memory", memory)
    engine = Engine(case.model(), loss=case.loss, optimizer=OPTIMIZERS[optimizer], memory=memory, **arguments)
    engine.plan = replace(engine.plan, prefetch=prefetch, cache_bytes=cache_bytes)

    def as_told(found: Any, _budgets: Any, assess: Any) -> Any:
        return assess(replace(found.plan, cache_bytes=cache_bytes, device_cache_bytes=device_cache_bytes or 0))

    def untouched(plan: Any, *_: Any) -> Any:
        return plan

    with mock.patch.object(fit, "cache_more", as_told), mock.patch.object(planning, "without_bounds", untouched):
        try:
            yield engine
        finally:
            engine.close()


def outcome(
    name: str, optimizer: str, folder: str | None, batches: Sequence[Any] | None = None, **arguments: Any
) -> Outcome:
    """Three steps, or one for each of `batches`."""
    if batches is None:
        batches = [DROPPING[name].batch(step, 6) for step in range(3)]
    with engine_of(name, optimizer, folder, **arguments) as engine:
        results = [engine.step(batch) for batch in batches]
        return Outcome(
            [r.loss for r in results], [r.grad_norm for r in results], [r.lr for r in results], engine.state_dict()
        )


@functools.cache
def in_memory(**arguments: Any) -> Outcome:
    """Of what results may depend on, with everything in memory."""
    return outcome(folder=None, offload="none", **arguments)


def unequal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of what is not the same, bit for bit."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


_DECIDE = ("name", "optimizer", "precision")


def layout(row: Mapping[str, Any]) -> dict[str, Any]:
    """Of a row of factors: what results may depend on."""
    clip = 0.5 if row["updates"] == "clipped" else None
    same = {key: row[key] for key in _DECIDE if key in row}
    return same | {"micro_batches": row["turns"][0], "clip_grad_norm": clip}


def places(row: Mapping[str, Any]) -> dict[str, Any]:
    """Of a row of factors: what they must not depend on."""
    kept = {key: value for key, value in row.items() if key not in (*_DECIDE, "turns", "updates")}
    update = {} if row["updates"] == "clipped" else {"update": row["updates"]}
    return kept | update | {"order": row["turns"][1]}


def covering(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Few rows in which every two words of different factors meet: each row takes as many new pairs as it can."""
    names = sorted(factors, key=lambda name: -len(factors[name]))
    missing = {
        ((one, i), (other, j))
        for one, other in itertools.combinations(names, 2)
        for i in range(len(factors[one]))
        for j in range(len(factors[other]))
    }
    rows = []
    while missing:
        (one, i), (other, j) = min(missing)
        row = {one: i, other: j}
        for name in names:
            if name not in row:
                gains = [
                    sum(
                        ((earlier, row[earlier]), (name, k)) in missing
                        or ((name, k), (earlier, row[earlier])) in missing
                        for earlier in row
                    )
                    for k in range(len(factors[name]))
                ]
                best = max(gains)
                tied = [k for k, gain in enumerate(gains) if gain == best]
                row[name] = tied[len(rows) % len(tied)]
        missing -= {(a, b) for a in row.items() for b in row.items()}
        rows.append({name: factors[name][row[name]] for name in factors})
    return rows


def every_pair_meets(factors: Mapping[str, Sequence[Any]], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every two words of different factors stand together in a row."""
    return all(
        {(row[one], row[other]) for row in rows} == set(itertools.product(factors[one], factors[other]))
        for one, other in itertools.combinations(factors, 2)
    )
