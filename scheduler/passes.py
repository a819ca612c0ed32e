"""The passes that build a program: actions in, actions out, each small and tested alone on the text form.

Owns the order and the insertion of actions, and their lanes and dependencies. Every pass is a pure function of the
step's shape and the plan, never of timing: all ranks therefore place their collectives in the same order, which is
what keeps them from hanging (ALGORITHMS 1.6).

    order_micro_batches     F and B of every unit on every micro-batch
    add_gathers             GATHER before uses, DROP after them
    add_reduces             REDUCE when a chunk's gradients of a micro-batch are complete
    add_updates             NORM, STEP
    prefetch                GATHER earlier, `distance` units ahead of the use
    link                    lanes and dependencies
"""

from collections.abc import Sequence

from ..parallel.actions import Action, Kind
from .plan import GatheredFor, Plan
from .program import Instruction, Lane, Program, StepShape

__all__ = [
    "add_gathers",
    "add_reduces",
    "add_updates",
    "compile_program",
    "link",
    "order_micro_batches",
    "prefetch",
]


def compile_program(shape: StepShape, plan: Plan) -> Program:
    """The program of one step: all passes in their order."""
    actions = order_micro_batches(shape, plan.micro_batches)
    if plan.world_size > 1:
        actions = add_gathers(actions, shape, plan)
        actions = prefetch(actions, plan.prefetch)
    if plan.world_size > 1 or plan.precision != "float32":
        actions = add_reduces(actions, shape)
    actions = add_updates(actions, shape)
    return link(actions, shape, plan)


def order_micro_batches(shape: StepShape, micro_batches: int) -> list[Action]:
    """One micro-batch after the other: forward through the chain, backward the other way round."""
    actions: list[Action] = []
    for m in range(micro_batches):
        actions += [Action(Kind.F, unit, m) for unit in range(len(shape.units))]
        actions += [Action(Kind.B, u, m) for u in reversed(range(len(shape.units))) if shape.units[u].has_backward]
    return actions


def add_gathers(actions: Sequence[Action], shape: StepShape, plan: Plan) -> list[Action]:
    """Gather a sharded chunk before its uses and drop it after them, as the plan says.

    A copy that the very next compute action needs again stays (the last unit's, between forward and backward). Chunks
    held for a whole micro-batch, and those gathered for a `pass`, are dropped after the micro-batch's last action.
    """
    live: set[int] = set()
    once: set[int] = set()  # gathered for the whole step, and gathered already
    result: list[Action] = []
    for position, action in enumerate(actions):
        assert action.index is not None
        for chunk in _needed(shape, action.index):
            decision = plan.chunks[chunk]
            if not decision.optimizer_sharded or chunk in live or chunk in once:
                continue
            if decision.gathered_for is GatheredFor.STEP:
                once.add(chunk)
                result.append(Action(Kind.GATHER, chunk))
            else:
                live.add(chunk)
                result.append(Action(Kind.GATHER, chunk, action.micro_batch))
        result.append(action)
        following = actions[position + 1] if position + 1 < len(actions) else None
        ends = following is None or following.micro_batch != action.micro_batch
        for chunk in sorted(live):
            long = chunk in shape.held or plan.chunks[chunk].gathered_for is GatheredFor.PASS
            keep = not ends if long else following is not None and chunk in _needed(shape, following.index or 0)
            if not keep:
                live.discard(chunk)
                result.append(Action(Kind.DROP, chunk, action.micro_batch))
    return result


def _needed(shape: StepShape, unit: int) -> tuple[int, ...]:
    return (*shape.held, *shape.uses(unit))


def add_reduces(actions: Sequence[Action], shape: StepShape) -> list[Action]:
    """Sum a chunk's gradients over the ranks as soon as a micro-batch has made them complete.

    Every ZeRO stage reduces after every micro-batch: the sums are then made in the same order, and all stages give the
    same bits.
    """
    complete_after: dict[int | None, list[int]] = {}
    for chunk, use in enumerate(shape.chunks):
        if use.trainable:
            complete_after.setdefault(shape.last_backward_of(chunk), []).append(chunk)
    result: list[Action] = []
    for position, action in enumerate(actions):
        result.append(action)
        if action.micro_batch is None or not action.kind.is_compute:
            continue
        if action.kind is Kind.B:
            chunks = complete_after.get(action.index, [])
            result += [Action(Kind.REDUCE, chunk, action.micro_batch) for chunk in chunks]
        rest = (later for later in actions[position + 1 :] if later.kind.is_compute)
        following = next(rest, None)
        if following is None or following.micro_batch != action.micro_batch:
            chunks = complete_after.get(None, [])
            result += [Action(Kind.REDUCE, chunk, action.micro_batch) for chunk in chunks]
    return result


def add_updates(actions: Sequence[Action], shape: StepShape) -> list[Action]:
    """The global norm and every trainable chunk's update, after the last backward."""
    trainable = [chunk for chunk, use in enumerate(shape.chunks) if use.trainable]
    return [*actions, Action(Kind.NORM), *(Action(Kind.STEP, chunk) for chunk in trainable)]


def prefetch(actions: Sequence[Action], distance: int) -> list[Action]:
    """Move every GATHER up, past `distance` compute actions, but never past a DROP of the same chunk."""
    result: list[Action] = []
    for action in actions:
        if action.kind is not Kind.GATHER:
            result.append(action)
            continue
        place, passed = len(result), 0
        while place > 0 and not (result[place - 1].kind is Kind.DROP and result[place - 1].index == action.index):
            if result[place - 1].kind is Kind.GATHER:
                break  # gathers keep their order
            passed += result[place - 1].kind.is_compute
            if passed > distance:
                break
            place -= 1
        result.insert(place, action)
    return result


def link(actions: Sequence[Action], shape: StepShape, plan: Plan) -> Program:
    """Give every action its lane, and the dependencies that follow from what it reads and writes.

    Resources: `param c` (a rank's shard), `full c` (the gathered copy), `act u.m`, `grad c` (this rank's gradients),
    `sum c` (the summed ones), `squares c` (their sum of squares; on a single rank the norm reads the gradients). An
    action waits for the last writer of what it reads, and for the last writer and all readers since of what it writes.
    """
    last_write: dict[str, int] = {}
    reads_since: dict[str, list[int]] = {}
    instructions: list[Instruction] = []
    for position, action in enumerate(actions):
        reads, writes = _resources(action, shape, plan)
        after: set[int] = set()
        for name in reads:
            if name in last_write:
                after.add(last_write[name])
        for name in writes:
            if name in last_write:
                after.add(last_write[name])
            after.update(reads_since.get(name, ()))
        for name in reads:
            reads_since.setdefault(name, []).append(position)
        for name in writes:
            last_write[name] = position
            reads_since[name] = []
        after.discard(position)
        num_bytes = 0
        if action.kind in (Kind.GATHER, Kind.REDUCE) and action.index is not None:
            num_bytes = shape.chunks[action.index].num_bytes
        instructions.append(Instruction(action, _lane(action, plan), tuple(sorted(after)), num_bytes))
    return Program(tuple(instructions))


def _lane(action: Action, plan: Plan) -> Lane:
    collective = action.kind in (Kind.GATHER, Kind.REDUCE, Kind.NORM)
    return Lane.NET if collective and plan.world_size > 1 else Lane.COMPUTE


def _resources(action: Action, shape: StepShape, plan: Plan) -> tuple[list[str], list[str]]:
    c, m = action.index, action.micro_batch
    match action.kind:
        case Kind.GATHER:
            return [f"param {c}"], [f"full {c}"]
        case Kind.DROP:
            return [], [f"full {c}"]
        case Kind.F:
            assert c is not None
            return [f"full {chunk}" for chunk in _needed(shape, c)], [f"act {c}.{m}"]
        case Kind.B:
            assert c is not None
            chunks = _needed(shape, c)
            grads = [f"grad {chunk}" for chunk in chunks if shape.chunks[chunk].trainable]
            return [*(f"full {chunk}" for chunk in chunks), f"act {c}.{m}"], grads
        case Kind.REDUCE:
            return [], [f"grad {c}", f"sum {c}", f"squares {c}"]
        case Kind.NORM:
            trainable = [chunk for chunk, use in enumerate(shape.chunks) if use.trainable]
            sums = [f"{kind} {chunk}" for chunk in trainable for kind in ("grad", "sum")]
            squares = [f"squares {chunk}" for chunk in trainable]
            if plan.clips_gradients:
                return squares, sums
            return squares + (sums if plan.world_size == 1 else []), []
        case Kind.STEP:
            return [], [f"grad {c}", f"sum {c}", f"param {c}", f"full {c}"]
        case _:
            raise AssertionError(f"{action}: no pass makes this action here")
