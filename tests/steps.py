"""Shapes of steps and plans for them: by hand in few words, and random ones from a seed."""

import random
from dataclasses import replace

from outgrow.parallel.actions import Action
from outgrow.scheduler.plan import Activations, ChunkPlan, GatheredFor, Home, MicroBatchOrder, Plan, UpdateTime
from outgrow.scheduler.program import ChunkUse, StepShape, UnitUse, actions_from

__all__ = ["PAGE", "chain", "plan_of", "random_plan", "random_shape", "read", "separate", "text", "with_saved"]

PAGE = 4096
HOMES = {"all": (Home.DISK, Home.DISK), "optimizer": (Home.HOST, Home.DISK), "parameters": (Home.DISK, Home.HOST)}


def chain(
    *units: tuple[int, ...],
    held: tuple[int, ...] = (),
    frozen: tuple[int, ...] = (),
    no_backward: tuple[int, ...] = (),
    slots: int = 2,
    pages: int = 1,
) -> StepShape:
    """Units by the chunks that they use; a chunk has `pages`, its optimizer state `slots` times as many."""
    num_chunks = 1 + max([c for unit in units for c in unit] + list(held))
    uses = tuple(UnitUse(f"u{i}", chunks, i not in no_backward, i) for i, chunks in enumerate(units))
    sizes = [(c not in frozen, pages * PAGE, 0 if c in frozen else slots * pages * PAGE) for c in range(num_chunks)]
    return StepShape(uses, tuple(ChunkUse(param, trains, param, optim) for trains, param, optim in sizes), held)


def plan_of(
    shape: StepShape,
    on_disk: str = "all",
    ranks: int = 1,
    micro_batches: int = 1,
    order: str = "sequential",
    update: str = "after",
    prefetch: int = 0,
    cache_bytes: int = 0,
    clips: bool = False,
    sharded: bool = True,
) -> Plan:
    """Every chunk treated alike; several ranks share parameters, gradients and slots."""
    parameters, optimizer = HOMES[on_disk]
    sharded = sharded and ranks > 1
    decision = ChunkPlan(GatheredFor.USE if sharded else GatheredFor.STEP, sharded, sharded, parameters, optimizer)
    return Plan(
        ranks,
        3 if sharded else 0,
        micro_batches,
        "float32",
        clips,
        prefetch,
        (decision,) * len(shape.chunks),
        (),
        MicroBatchOrder(order),
        UpdateTime(update),
        True,
        cache_bytes,
    )


def read(words: str) -> list[Action]:
    """Actions from their text forms, by commas or lines."""
    return actions_from(word for word in words.replace("\n", ",").split(",") if word.strip())


def text(actions: list[Action]) -> list[str]:
    return [str(action) for action in actions]


def random_shape(rng: random.Random) -> StepShape:
    """A few units, with chunks that are shared, held, frozen or used by nothing, of several sizes."""
    num_chunks, num_units = rng.randint(1, 6), rng.randint(1, 6)
    units = [tuple(sorted(rng.sample(range(num_chunks), rng.randint(0, min(2, num_chunks))))) for _ in range(num_units)]
    first_backward = rng.choice((0, 0, 0, 1, 2))
    frozen = {c for c in range(num_chunks) if rng.random() < 0.2}
    unused = set(range(num_chunks)) - {c for unit in units for c in unit}
    held = tuple(sorted(unused | set(rng.sample(range(num_chunks), rng.choice((0, 0, 0, 1))))))
    uses = tuple(UnitUse(f"u{i}", chunks, i >= first_backward, i) for i, chunks in enumerate(units))
    chunks = []
    for c in range(num_chunks):
        size = PAGE * rng.randint(1, 4)
        chunks.append(ChunkUse(size, c not in frozen, size, 0 if c in frozen else size * rng.randint(0, 2)))
    return StepShape(uses, tuple(chunks), held)


def with_saved(shape: StepShape, rng: random.Random) -> StepShape:
    """The shape with activations of several sizes that may move."""
    units = tuple(replace(unit, saved_bytes=PAGE * rng.randint(0, 3)) for unit in shape.units)
    return replace(shape, units=units)


def separate(rng: random.Random, shape: StepShape, plan: Plan) -> Plan:
    """The plan on a device with memory of its own: some chunks at home on it, some activations moved."""

    def decision(chunk: ChunkPlan) -> ChunkPlan:
        stays = rng.random() < 0.25
        return replace(chunk, parameter_home=Home.DEVICE, optimizer_home=Home.DEVICE) if stays else chunk

    return replace(
        plan,
        chunks=tuple(decision(chunk) for chunk in plan.chunks),
        activations=tuple(rng.choice(list(Activations)) for _ in shape.units),
        unified=False,
        device_cache_bytes=rng.choice((0, 0, 4 * PAGE, 8 * PAGE, 1 << 30)),
    )


def random_plan(rng: random.Random, shape: StepShape) -> Plan:
    """Any plan that may be: one or two ranks, chunks treated unlike."""
    ranks = rng.choice((1, 1, 2))
    sharded = ranks > 1 and rng.random() < 0.8

    def decision() -> ChunkPlan:
        parameters, optimizer = rng.choice(((Home.HOST, Home.HOST), *HOMES.values(), HOMES["all"]))
        if not sharded:
            return ChunkPlan(parameter_home=parameters, optimizer_home=optimizer)
        words = [GatheredFor.USE, GatheredFor.PASS] + [GatheredFor.STEP] * (parameters is Home.HOST)
        gathered_for = rng.choice(words)
        gradients = gathered_for is not GatheredFor.STEP or rng.random() < 0.5
        return ChunkPlan(gathered_for, gradients, True, parameters, optimizer)

    clips = rng.random() < 0.3
    return Plan(
        ranks,
        3 if sharded else 0,
        rng.randint(1, 3),
        rng.choice(("float32", "bf16")),
        clips,
        rng.randint(0, 3),
        tuple(decision() for _ in shape.chunks),
        (),
        rng.choice(list(MicroBatchOrder)),
        UpdateTime.AFTER if clips else rng.choice(list(UpdateTime)),
        True,
        rng.choice((0, 0, 4 * PAGE, 8 * PAGE, 1 << 30)),
    )
