"""The last pass: every action gets its lane, its buffer and the dependencies that follow from what it reads and writes.

Owns lanes, resources and buffers of a program. Does not own what comes before what for other reasons (`passes.py`).
"""

from collections.abc import Sequence

from ..memory.arena import Lifetime, place_buffers
from ..memory.direct_io import round_up
from ..parallel.actions import Action, Kind, Target
from .moves import DEVICE_COPY, Item, MovedActions, gathers, item_bytes, needed_chunks
from .plan import Activations, Plan, UpdateTime
from .program import Buffer, Instruction, Lane, Program, StepShape

__all__ = ["link"]


def link(moved: MovedActions, shape: StepShape, plan: Plan, num_carried: int = 0) -> Program:
    """The program.

    Resources: `param c` (a rank's shard), `full c` (the gathered copy), `act u.m`, `grad c` (this rank's gradients),
    `sum c` (the summed ones), `squares c` (their sum of squares; on a single rank the norm reads the gradients),
    `optim c` (optimizer slots), `disk c:slot` (what lies on disk); where the device has memory of its own, `copy c`
    (the shard on the device) and `down c` (a micro-batch's gradients on the host). An action waits for the last writer
    of what it reads, and for the last writer and all readers since of what it writes. An action that fills a buffer
    also waits for all that used a buffer with the same bytes before.

    What is kept from the step before (`MovedActions.kept`) may be used while its carried WRITE runs, which only looks
    at it; whoever changes it or lets it go waits for that. Its READ moves nothing and waits for nothing.
    """
    buffers = _buffers(moved, shape, plan)
    takes_gradients = _takes_gradients(shape, plan)
    saves: list[int] = []
    away: int | None = None  # what took the last backward's gradients away, and those of the one before that
    away_before: int | None = None
    still_there = set(moved.kept)  # their READ is yet to come
    kept_writes: dict[str, int] = {}  # resource -> the carried WRITE that looks at it
    computed: int | None = None  # the last compute action
    ended: int | None = None  # the last one of the pass of a stage before that
    sharing = _sharing(buffers)
    last_write: dict[str, int] = {}
    reads_since: dict[str, list[int]] = {}
    users: dict[str, dict[Lane, int]] = {}  # buffer -> lane -> last position that used it
    instructions: list[Instruction] = []
    for position, action in enumerate(moved.actions):
        reads, writes = _resources(action, shape, plan)
        lane = _lane(action, shape, plan)
        after: set[int] = set()
        filled = _filled_buffers(action)
        moves_nothing = action.kind is Kind.READ and filled[0] in still_there
        if moves_nothing:
            still_there.discard(filled[0])
        elif action.kind is Kind.WRITE and position < num_carried and f"c{action.index}:{action.slot}" in moved.kept:
            kept_writes |= dict.fromkeys(writes[1:], position)
            writes = writes[:1]
        if not moves_nothing:
            after.update(last_write[name] for name in (*reads, *writes) if name in last_write)
            for name in writes:
                after.update(reads_since.get(name, ()))
                if name in kept_writes:
                    after.add(kept_writes.pop(name))
                    lane = Lane.WRITE if action.kind is Kind.DROP else lane  # computing does not wait for the WRITE
            for buffer in filled:
                for other in sharing.get(buffer, ()):
                    if other in users:
                        after.update(users[other].values())
        for name in reads:
            reads_since.setdefault(name, []).append(position)
        for name in writes:
            last_write[name] = position
            reads_since[name] = []
        if action.kind is Kind.SAVE:
            saves.append(position)
        elif action.kind is Kind.F and len(saves) > 1:
            after.add(saves[-2])  # originals of two units at most wait for the lane
        elif action.kind is takes_gradients:
            away = position
        elif action.kind is Kind.B:  # likewise gradients
            after.update(() if away_before is None else (away_before,))
            away_before, away = away, None
        if computed is not None and lane is not Lane.COMPUTE and _follows_compute(action, shape, plan):
            after.add(computed)
        if action.kind.is_compute:
            if (
                shape.starts
                and computed is not None
                and _pass_of(action, shape) != _pass_of(moved.actions[computed], shape)
            ):
                ended = computed
            computed = position
        elif action.kind in (Kind.RECV_F, Kind.RECV_B) and ended is not None:
            after.add(ended)  # one pass ahead of its use: taken in while the stage before it computes
        for name in _buffers_used(action, shape, plan, buffers):
            users.setdefault(name, {})[lane] = position
        after.discard(position)
        num_bytes = 0 if moves_nothing else _num_bytes(action, shape)
        instructions.append(Instruction(action, lane, tuple(sorted(after)), num_bytes))
    return Program(tuple(instructions), tuple(buffers.values()), num_carried)


def _takes_gradients(shape: StepShape, plan: Plan) -> Kind | None:
    """What takes gradients out of the memory that units compute in, on a lane that computing could run ahead of."""
    if not plan.unified:
        return Kind.DOWN
    return Kind.REDUCE if plan.world_size > 1 and not shape.starts else None


def _pass_of(action: Action, shape: StepShape) -> tuple[Kind, int, int | None]:
    assert action.index is not None
    return action.kind, shape.stage_of(action.index), action.micro_batch


def _follows_compute(action: Action, shape: StepShape, plan: Plan) -> bool:
    """Whether an action has to wait for the last unit that ran before it, though it takes nothing of it."""
    c = action.index
    if action.kind is Kind.LOAD and shape.starts:  # else it came back as soon as it is away: the schedule says when
        return True
    if action.kind is Kind.GATHER and c is not None:  # else its lane would run ahead, and all copies were there at once
        return plan.chunks[c].parameters_sharded
    if action.kind in (Kind.DOWN, Kind.REDUCE) and c is not None:  # code between units may give gradients to the end
        return shape.last_backward_of(c) is None
    return action.kind is Kind.NORM  # it takes the loss too


def _filled_buffers(action: Action) -> tuple[str, ...]:
    """The buffers that an action puts something new into, as far as there are any."""
    match action.kind:
        case Kind.READ:
            return (f"c{action.index}:{action.slot}",)
        case Kind.UP:
            return (f"c{action.index}:{DEVICE_COPY}",)
        case Kind.DOWN:
            return (f"c{action.index}:grad",)
        case Kind.SAVE:
            return (_saved_name(action),)
        case Kind.LOAD:
            return (_saved_name(action), _loaded_name(action))
        case _:
            return ()


def _saved_name(action: Action) -> str:
    return f"a{action.index}.{action.micro_batch}"


def _loaded_name(action: Action) -> str:
    """The buffer on a device with memory of its own."""
    return f"{_saved_name(action)}:{DEVICE_COPY}"


def _lifetimes(actions: Sequence[Action], shape: StepShape, plan: Plan) -> dict[str, list[Lifetime]]:
    """When the buffers of saved activations and of gradients on their way are taken.

    Activations that go to disk take a buffer around SAVE until the next unit has run, and from LOAD to B (or W, where
    the backward pass is divided); where the device has memory of its own, that one around LOAD alone, and a buffer on
    the device from LOAD to B. Those that go to the host stay in their buffer from SAVE to LOAD.
    """
    lifetimes: dict[str, list[Lifetime]] = {}
    place = {action: position for position, action in enumerate(actions)}
    for position, action in enumerate(actions):
        if action.kind is Kind.SAVE and _goes_to_host(action, shape, plan):
            load = place[Action(Kind.LOAD, action.index, action.micro_batch)]
            lifetimes.setdefault(_saved_name(action), []).append((position, load))
        elif action.kind is Kind.SAVE:
            later = (at for at in range(position + 1, len(actions)) if actions[at].kind.is_compute)
            lifetimes.setdefault(_saved_name(action), []).append((position, next(later, position)))
        elif action.kind is Kind.LOAD:
            ends = [Action(kind, action.index, action.micro_batch) for kind in (Kind.B, Kind.W)]
            backward = next(place[end] for end in ends if end in place)
            if plan.unified:
                lifetimes.setdefault(_saved_name(action), []).append((position, backward))
                continue
            lifetimes.setdefault(_loaded_name(action), []).append((position, backward))
            if not _goes_to_host(action, shape, plan):
                lifetimes.setdefault(_saved_name(action), []).append((position, position))
        elif action.kind is Kind.DOWN:
            summed = place[Action(Kind.REDUCE, action.index, action.micro_batch)]
            lifetimes.setdefault(f"c{action.index}:grad", []).append((position, summed))
    return lifetimes


def _goes_to_host(action: Action, shape: StepShape, plan: Plan) -> bool:
    """Whether the activations that an action moves stay in host memory."""
    assert action.index is not None
    return plan.activations_of(shape.units[action.index].unit) is Activations.OFFLOAD_HOST


def _buffers(moved: MovedActions, shape: StepShape, plan: Plan) -> dict[str, Buffer]:
    """The buffers of both tiers, each tier's placed in an arena of its own."""
    items = {
        item.name: item
        for action in moved.actions
        if action.slot is not None and action.index is not None
        for item in [Item(action.index, action.slot)]
        if item.name in moved.lifetimes
    }
    sizes = {name: item_bytes(items[name], shape) for name in moved.lifetimes}
    lifetimes = moved.lifetimes | _lifetimes(moved.actions, shape, plan)
    for action in moved.actions:
        if action.kind is Kind.SAVE and action.index is not None:
            sizes[_saved_name(action)] = round_up(shape.units[action.index].saved_bytes)
            if _loaded_name(action) in lifetimes:
                sizes[_loaded_name(action)] = sizes[_saved_name(action)]
        elif action.kind is Kind.DOWN and action.index is not None:
            sizes[f"c{action.index}:grad"] = round_up(shape.chunks[action.index].num_bytes)
    buffers: dict[str, Buffer] = {}
    for tier in ("host", "device"):
        names = [name for name in lifetimes if name.endswith(f":{DEVICE_COPY}") == (tier == "device")]
        offsets, _ = place_buffers({name: sizes[name] for name in names}, lifetimes)
        buffers |= {name: Buffer(name, tier, offsets[name], sizes[name]) for name in names}
    return buffers


def _sharing(buffers: dict[str, Buffer]) -> dict[str, list[str]]:
    """Buffer -> those that have bytes in common with it, itself included."""
    found: dict[str, list[str]] = {name: [] for name in buffers}
    for tier in ("host", "device"):
        open_: list[Buffer] = []  # those that reach over the begin of the next
        for buffer in sorted((b for b in buffers.values() if b.tier == tier), key=lambda b: b.start_bytes):
            open_ = [other for other in open_ if other.start_bytes + other.num_bytes > buffer.start_bytes]
            for other in (*open_, buffer):
                found[other.name].append(buffer.name)
            found[buffer.name] += [other.name for other in open_]
            open_.append(buffer)
    return found


def _buffers_used(action: Action, shape: StepShape, plan: Plan, buffers: dict[str, Buffer]) -> list[str]:
    c = action.index
    if action.kind in (Kind.READ, Kind.WRITE, Kind.DROP) and action.slot is not None:
        return [f"c{c}:{action.slot}"]
    if action.kind.is_compute:
        assert c is not None
        param = "param" if plan.unified else DEVICE_COPY
        names = [f"c{chunk}:{param}" for chunk in needed_chunks(shape, c) if not gathers(chunk, plan)]
        names += [_saved_name(action), _loaded_name(action)] if action.kind is not Kind.F else []
    elif action.kind in (Kind.SAVE, Kind.LOAD):
        names = [_saved_name(action), _loaded_name(action)]
    elif action.kind is Kind.GATHER:
        names = [f"c{c}:{'param' if plan.unified else DEVICE_COPY}"]
    elif action.kind is Kind.UP:
        names = [f"c{c}:param", f"c{c}:{DEVICE_COPY}"]
    elif action.kind is Kind.STEP:
        names = [f"c{c}:param", f"c{c}:optim"]
    elif action.kind in (Kind.DOWN, Kind.REDUCE):
        names = [f"c{c}:grad"]
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
    if action.kind is Kind.UP:
        return shape.chunks[action.index].param_bytes
    if action.kind.target is Target.STAGE:
        return shape.crossing_bytes(action)
    return shape.chunks[action.index].num_bytes if action.kind in (Kind.GATHER, Kind.REDUCE, Kind.DOWN) else 0


def _lane(action: Action, shape: StepShape, plan: Plan) -> Lane:
    c = action.index
    match action.kind:
        case Kind.UP:
            return Lane.H2D
        case Kind.DOWN:
            return Lane.D2H
        case Kind.READ:
            return Lane.READ
        case Kind.WRITE:
            return Lane.WRITE
        case Kind.SAVE:
            return Lane.D2H if _goes_to_host(action, shape, plan) else Lane.WRITE
        case Kind.LOAD:
            return Lane.H2D if _goes_to_host(action, shape, plan) else Lane.READ
        case Kind.SEND_F | Kind.SEND_B:
            return Lane.COMPUTE  # it waits for nobody, and does not keep what is received waiting
        case Kind.RECV_F | Kind.RECV_B:
            return Lane.NET
        case Kind.GATHER | Kind.REDUCE | Kind.NORM if plan.world_size > 1:
            return Lane.NET
        case Kind.REDUCE | Kind.NORM if plan.pipeline is not None:
            return Lane.NET
        case Kind.REDUCE if c is not None and plan.updates_on_host(c):
            return Lane.D2H  # behind the gradients that it adds, so that computing does not wait for them
        case Kind.DROP if action.slot == "param" and not plan.unified:
            return Lane.H2D  # behind the copy that used it, likewise
        case Kind.DROP if action.slot in ("param", DEVICE_COPY) and c is not None and gathers(c, plan):
            return Lane.NET  # behind the gather
        case _:
            return Lane.COMPUTE


def _resources(action: Action, shape: StepShape, plan: Plan) -> tuple[list[str], list[str]]:
    c, m = action.index, action.micro_batch
    match action.kind:
        case Kind.GATHER:
            assert c is not None
            return [f"{'copy' if plan.brings_up(c) else 'param'} {c}"], [f"full {c}"]
        case Kind.UP:
            return [f"param {c}"], _slot_resources(Action(Kind.DROP, c, None, DEVICE_COPY), plan)
        case Kind.DOWN:
            return [], [f"grad {c}", f"down {c}"]
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
            # Code behind the last unit, and its backward, is part of the last forward.
            held = shape.held if c == len(shape.units) - 1 and not shape.starts else ()
            grads = [f"grad {chunk}" for chunk in held if shape.chunks[chunk].trainable]
            given = [f"in {shape.stage_of(c)}.{m}"] if shape.starts else []
            return [*(f"full {chunk}" for chunk in needed_chunks(shape, c)), *given], [f"act {c}.{m}", *grads]
        case Kind.B | Kind.I | Kind.W:
            assert c is not None
            chunks = needed_chunks(shape, c)
            grads = [f"grad {chunk}" for chunk in chunks if shape.chunks[chunk].trainable]
            given, made = [], []
            if shape.starts and action.kind is not Kind.W:
                stage = shape.stage_of(c)
                given, made = [f"back {stage}.{m}"], [f"on {stage}.{m}"]
            return [*(f"full {chunk}" for chunk in chunks), f"act {c}.{m}", *given], [*grads, *made]
        case Kind.SEND_F:
            return [f"act {shape.last_run(c)}.{m}"], []
        case Kind.RECV_F:
            return [], [f"in {c}.{m}"]
        case Kind.SEND_B:
            return [f"on {c}.{m}"], []
        case Kind.RECV_B:
            return [], [f"back {c}.{m}"]
        case Kind.SAVE:
            return [f"act {c}.{m}"], [f"away {c}.{m}"]
        case Kind.LOAD:
            return [f"away {c}.{m}"], [f"act {c}.{m}"]
        case Kind.REDUCE:
            assert c is not None
            return [], [f"{'down' if plan.updates_on_host(c) else 'grad'} {c}", f"sum {c}", f"squares {c}"]
        case Kind.NORM:
            return _norm_resources(shape, plan)
        case Kind.STEP:
            # Inside the backward pass the update takes the gradients' norms before they go.
            norms = [f"squares {c}"] if plan.update is UpdateTime.BACKWARD else []
            return [], [f"grad {c}", f"sum {c}", *norms, f"param {c}", f"full {c}", f"optim {c}"]
        case _:
            raise AssertionError(f"{action}: no pass makes this action here")


def _slot_resources(action: Action, plan: Plan) -> list[str]:
    """What a chunk's slot in memory is called. Where nothing is gathered, the shard is the full chunk."""
    c = action.index
    assert c is not None
    if action.slot == "optim":
        return [f"optim {c}"]
    if action.slot == DEVICE_COPY:
        return [f"copy {c}"] if gathers(c, plan) else [f"copy {c}", f"full {c}"]
    return [f"param {c}"] if gathers(c, plan) or plan.brings_up(c) else [f"param {c}", f"full {c}"]


def _norm_resources(shape: StepShape, plan: Plan) -> tuple[list[str], list[str]]:
    trainable = [chunk for chunk, use in enumerate(shape.chunks) if use.trainable]
    sums = [f"{kind} {chunk}" for chunk in trainable for kind in ("grad", "sum")]
    squares = [f"squares {chunk}" for chunk in trainable]
    if plan.clips_gradients:
        return squares, sums
    reads_gradients = plan.world_size == 1 and plan.update is UpdateTime.AFTER
    return squares + (sums if reads_gradients else []), []
