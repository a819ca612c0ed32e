"""The last pass: every action gets its lane, its buffer and the dependencies that follow from what it reads and writes.

Owns lanes, resources and buffers of a program. Does not own what comes before what for other reasons (`passes.py`).
"""

from collections.abc import Sequence

from ..memory.arena import Lifetime, meet, place_buffers
from ..memory.direct_io import round_up
from ..parallel.actions import Action, Kind
from .moves import Item, MovedActions, gathers, item_bytes, needed_chunks
from .plan import Plan, UpdateTime
from .program import Buffer, Instruction, Lane, Program, StepShape

__all__ = ["link"]


def link(moved: MovedActions, shape: StepShape, plan: Plan, num_carried: int = 0) -> Program:
    """The program.

    Resources: `param c` (a rank's shard), `full c` (the gathered copy), `act u.m`, `grad c` (this rank's gradients),
    `sum c` (the summed ones), `squares c` (their sum of squares; on a single rank the norm reads the gradients),
    `optim c` (optimizer slots), `disk c:slot` (what lies on disk). An action waits for the last writer of what it
    reads, and for the last writer and all readers since of what it writes. An action that fills a buffer also waits for
    all that used a buffer with the same bytes before.
    """
    buffers = _buffers(moved, shape)
    saves: list[int] = []
    sharing = _sharing(buffers)
    last_write: dict[str, int] = {}
    reads_since: dict[str, list[int]] = {}
    users: dict[str, dict[Lane, int]] = {}  # buffer -> lane -> last position that used it
    instructions: list[Instruction] = []
    for position, action in enumerate(moved.actions):
        reads, writes = _resources(action, shape, plan)
        lane = _lane(action, plan)
        after = {last_write[name] for name in (*reads, *writes) if name in last_write}
        for name in writes:
            after.update(reads_since.get(name, ()))
        for name in reads:
            reads_since.setdefault(name, []).append(position)
        for name in writes:
            last_write[name] = position
            reads_since[name] = []
        if (filled := _filled_buffer(action)) is not None:
            for other in sharing[filled]:
                after.update(users.get(other, {}).values())
        if action.kind is Kind.SAVE:
            saves.append(position)
        elif action.kind is Kind.F and len(saves) > 1:
            after.add(saves[-2])  # originals of two units at most wait for the disk
        for name in _buffers_used(action, shape, plan, buffers):
            users.setdefault(name, {})[lane] = position
        after.discard(position)
        instructions.append(Instruction(action, lane, tuple(sorted(after)), _num_bytes(action, shape)))
    return Program(tuple(instructions), tuple(buffers.values()), num_carried)


def _filled_buffer(action: Action) -> str | None:
    """The buffer that an action puts something new into."""
    if action.kind is Kind.READ:
        return f"c{action.index}:{action.slot}"
    if action.kind in (Kind.SAVE, Kind.LOAD):
        return f"a{action.index}.{action.micro_batch}"
    return None


def _activation_lifetimes(actions: Sequence[Action]) -> dict[str, list[Lifetime]]:
    """When the buffers of saved activations are taken: around SAVE until the next unit has run, from LOAD to B."""
    lifetimes: dict[str, list[Lifetime]] = {}
    place = {action: position for position, action in enumerate(actions)}
    for position, action in enumerate(actions):
        name = f"a{action.index}.{action.micro_batch}"
        if action.kind is Kind.SAVE:
            later = (at for at in range(position + 1, len(actions)) if actions[at].kind.is_compute)
            lifetimes.setdefault(name, []).append((position, next(later, position)))
        elif action.kind is Kind.LOAD:
            backward = place[Action(Kind.B, action.index, action.micro_batch)]
            lifetimes.setdefault(name, []).append((position, backward))
    return lifetimes


def _buffers(moved: MovedActions, shape: StepShape) -> dict[str, Buffer]:
    items = {
        item.name: item
        for action in moved.actions
        if action.slot is not None and action.index is not None
        for item in [Item(action.index, action.slot)]
        if item.name in moved.lifetimes
    }
    sizes = {name: item_bytes(items[name], shape) for name in moved.lifetimes}
    saved = _activation_lifetimes(moved.actions)
    for action in moved.actions:
        if action.kind is Kind.SAVE and action.index is not None:
            sizes[f"a{action.index}.{action.micro_batch}"] = round_up(shape.units[action.index].saved_bytes)
    lifetimes = moved.lifetimes | saved
    offsets, _ = place_buffers(sizes, lifetimes)
    return {name: Buffer(name, "host", offsets[name], sizes[name]) for name in lifetimes}


def _sharing(buffers: dict[str, Buffer]) -> dict[str, list[str]]:
    """Buffer -> those that have bytes in common with it, itself included."""
    spans = {name: [(b.start_bytes, b.start_bytes + b.num_bytes - 1)] for name, b in buffers.items()}
    return {name: [other for other in spans if meet(spans[name], spans[other])] for name in spans}


def _buffers_used(action: Action, shape: StepShape, plan: Plan, buffers: dict[str, Buffer]) -> list[str]:
    c = action.index
    if action.kind in (Kind.READ, Kind.WRITE, Kind.DROP) and action.slot is not None:
        return [f"c{c}:{action.slot}"]
    if action.kind in (Kind.SAVE, Kind.LOAD):
        return [f"a{c}.{action.micro_batch}"]
    if action.kind.is_compute:
        assert c is not None
        names = [f"c{chunk}:param" for chunk in needed_chunks(shape, c) if not gathers(chunk, plan)]
        names += [f"a{c}.{action.micro_batch}"] if action.kind is Kind.B else []
    elif action.kind in (Kind.GATHER, Kind.UP, Kind.STEP):
        names = [f"c{c}:param", f"c{c}:optim"]
    else:
        return []
    return [name for name in names if name in buffers]


def _num_bytes(action: Action, shape: StepShape) -> int:
    if action.index is None:
        return 0
    if action.kind in (Kind.READ, Kind.WRITE) and action.slot is not None:
        return item_bytes(Item(action.index, action.slot), shape)
    if action.kind in (Kind.SAVE, Kind.LOAD):
        return round_up(shape.units[action.index].saved_bytes)
    return shape.chunks[action.index].num_bytes if action.kind in (Kind.GATHER, Kind.REDUCE, Kind.UP) else 0


def _lane(action: Action, plan: Plan) -> Lane:
    match action.kind:
        case Kind.READ | Kind.LOAD:
            return Lane.READ
        case Kind.WRITE | Kind.SAVE:
            return Lane.WRITE
        case Kind.GATHER | Kind.REDUCE | Kind.NORM:
            return Lane.NET if plan.world_size > 1 else Lane.COMPUTE
        case Kind.DROP if action.slot == "param" and action.index is not None and gathers(action.index, plan):
            return Lane.NET  # behind the gather that used it, so that computing does not wait for that
        case _:
            return Lane.COMPUTE


def _resources(action: Action, shape: StepShape, plan: Plan) -> tuple[list[str], list[str]]:
    c, m = action.index, action.micro_batch
    match action.kind:
        case Kind.GATHER:
            return [f"param {c}"], [f"full {c}"]
        case Kind.DROP if action.slot is None:
            return [], [f"full {c}"]
        case Kind.READ:
            return [f"disk c{c}:{action.slot}"], _slot_resources(action, plan)
        case Kind.DROP:
            return [], _slot_resources(action, plan)
        case Kind.WRITE:
            return [], [f"disk c{c}:{action.slot}", *_slot_resources(action, plan)]
        case Kind.F:
            assert c is not None
            return [f"full {chunk}" for chunk in needed_chunks(shape, c)], [f"act {c}.{m}"]
        case Kind.B:
            assert c is not None
            chunks = needed_chunks(shape, c)
            grads = [f"grad {chunk}" for chunk in chunks if shape.chunks[chunk].trainable]
            return [*(f"full {chunk}" for chunk in chunks), f"act {c}.{m}"], grads
        case Kind.SAVE:
            return [f"act {c}.{m}"], [f"away {c}.{m}"]
        case Kind.LOAD:
            return [f"away {c}.{m}"], [f"act {c}.{m}"]
        case Kind.REDUCE:
            return [], [f"grad {c}", f"sum {c}", f"squares {c}"]
        case Kind.NORM:
            return _norm_resources(shape, plan)
        case Kind.STEP:
            # Inside the backward pass the update takes the gradients' norms before they go.
            norms = [f"squares {c}"] if plan.update is UpdateTime.BACKWARD else []
            return [], [f"grad {c}", f"sum {c}", *norms, f"param {c}", f"full {c}", f"optim {c}"]
        case _:
            raise AssertionError(f"{action}: no pass makes this action here")


def _slot_resources(action: Action, plan: Plan) -> list[str]:
    """What a chunk's slot in host memory is called. Where nothing is gathered, the shard is the full chunk."""
    c = action.index
    assert c is not None
    if action.slot == "optim":
        return [f"optim {c}"]
    return [f"param {c}"] if gathers(c, plan) else [f"param {c}", f"full {c}"]


def _norm_resources(shape: StepShape, plan: Plan) -> tuple[list[str], list[str]]:
    trainable = [chunk for chunk, use in enumerate(shape.chunks) if use.trainable]
    sums = [f"{kind} {chunk}" for chunk in trainable for kind in ("grad", "sum")]
    squares = [f"squares {chunk}" for chunk in trainable]
    if plan.clips_gradients:
        return squares, sums
    reads_gradients = plan.world_size == 1 and plan.update is UpdateTime.AFTER
    return squares + (sums if reads_gradients else []), []
