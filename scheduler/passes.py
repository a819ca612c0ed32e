"""The passes that build a program: actions in, actions out, each small and tested alone on the text form.

Owns the order and the insertion of actions, and their lanes and dependencies. Every pass is a pure function of the
step's shape and the plan, never of timing: all ranks therefore place their collectives in the same order, which is
what keeps them from hanging (ALGORITHMS 1.6).

    order_micro_batches     F and B of every unit on every micro-batch
    add_gathers             GATHER before uses, DROP after them
    add_reduces             REDUCE when a chunk's gradients of a micro-batch are complete
    add_updates             NORM, STEP
    prefetch                GATHER earlier, `distance` units ahead of the use
    add_downs               DOWN of gradients that are summed on the host
    add_saves               SAVE and LOAD of activations
    add_uploads             UP and DROP of parameters that are not at home on the device (`scheduler/moves.py`)
    add_moves               READ, WRITE and DROP of what lies on disk (`scheduler/moves.py`)
    carry                   the last writes run into the next step
    link                    buffers, lanes and dependencies (`scheduler/link.py`)
"""

from collections.abc import Sequence

from ..memory.arena import Lifetime
from ..parallel.actions import Action, Kind
from .link import link
from .moves import MovedActions, add_moves, add_uploads, needed_chunks
from .plan import GatheredFor, MicroBatchOrder, Plan, UpdateTime
from .program import Program, StepShape

_BACKWARD = (Kind.B, Kind.I, Kind.W)
_WORTH_MOVING = 0.001  # of what the unit saves that saves most: a hundred such are a tenth of it

__all__ = [
    "add_downs",
    "add_gathers",
    "add_reduces",
    "add_saves",
    "add_updates",
    "carry",
    "compile_program",
    "order_micro_batches",
    "prefetch",
]


def compile_program(shape: StepShape, plan: Plan) -> Program:
    """The program of one step: all passes in their order."""
    actions = order_micro_batches(shape, plan.micro_batches, plan.order)
    if plan.world_size > 1:
        actions = prefetch(add_gathers(actions, shape, plan), plan.prefetch)
    if plan.sums_gradients:
        actions = add_downs(add_reduces(actions, shape), plan)
    actions = add_updates(actions, shape, plan.update)
    actions = add_saves(actions, shape, plan)
    moved = add_uploads(actions, shape, plan)
    moved = add_moves(moved.actions, shape, plan, moved.lifetimes)
    moved, num_carried = carry(moved)
    return link(moved, shape, plan, num_carried)


def order_micro_batches(
    shape: StepShape, micro_batches: int, order: MicroBatchOrder = MicroBatchOrder.SEQUENTIAL
) -> list[Action]:
    """F and B of every unit run on every micro-batch.

    Sequential: one micro-batch after the other, forward through the chain, backward the other way round. By unit: all
    micro-batches of a unit before the next unit; at the turn, the last unit's backward follows its forward at once, so
    that the outputs of one micro-batch alone (a language model's logits) are alive. A unit's gradients are summed in
    the order of micro-batches in both.
    """
    numbers = range(micro_batches)
    forward = list(range(len(shape.units)))
    backward = [unit for unit in reversed(forward) if shape.units[unit].has_backward]
    if order is MicroBatchOrder.SEQUENTIAL or micro_batches == 1:
        return [
            action
            for m in numbers
            for action in (*(Action(Kind.F, u, m) for u in forward), *(Action(Kind.B, u, m) for u in backward))
        ]
    turn = forward[-1:]  # what comes after the last forward of a micro-batch (the loss) belongs to its backward
    actions = [Action(Kind.F, u, m) for u in forward[:-1] for m in numbers]
    for m in numbers:
        actions += [Action(Kind.F, u, m) for u in turn]
        actions += [Action(Kind.B, u, m) for u in backward if u in turn]
    return actions + [Action(Kind.B, u, m) for u in backward if u not in turn for m in numbers]


def add_gathers(actions: Sequence[Action], shape: StepShape, plan: Plan) -> list[Action]:
    """Gather a sharded chunk before its uses and drop it after them, as the plan says.

    A copy that the very next compute action needs again stays (the last unit's, between forward and backward). Chunks
    held for a whole micro-batch, and those gathered for a `pass`, are dropped after the micro-batch's last action, or
    after the last of all where micro-batches take turns.
    """
    by_unit = plan.order is MicroBatchOrder.BY_UNIT
    live: set[int] = set()
    once: set[int] = set()  # gathered for the whole step, and gathered already
    result: list[Action] = []
    for position, action in enumerate(actions):
        assert action.index is not None
        for chunk in needed_chunks(shape, action.index):
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
        ends = following is None or (not by_unit and following.micro_batch != action.micro_batch)
        for chunk in sorted(live):
            long = chunk in shape.held or plan.chunks[chunk].gathered_for is GatheredFor.PASS
            keep = not ends if long else following is not None and chunk in needed_chunks(shape, following.index or 0)
            if not keep:
                live.discard(chunk)
                result.append(Action(Kind.DROP, chunk, action.micro_batch))
    return result


def add_reduces(actions: Sequence[Action], shape: StepShape) -> list[Action]:
    """Sum a chunk's gradients over the ranks as soon as a micro-batch has made them complete.

    Every ZeRO stage reduces after every micro-batch: the sums are then made in the same order, and all stages give the
    same bits.
    """
    complete_after: dict[int, list[int]] = {}  # position -> chunks
    at_end = [c for c, use in enumerate(shape.chunks) if use.trainable and shape.last_backward_of(c) is None]
    complete_at = _complete_at(actions, shape)
    for chunk, use in enumerate(shape.chunks):
        if use.trainable and chunk not in at_end:
            for position in complete_at.get(chunk, {}).values():
                complete_after.setdefault(position, []).append(chunk)
    last_of = {action.micro_batch: position for position, action in enumerate(actions) if action.kind.is_compute}
    result: list[Action] = []
    for position, action in enumerate(actions):
        result.append(action)
        result += [Action(Kind.REDUCE, chunk, action.micro_batch) for chunk in complete_after.get(position, ())]
        if action.kind.is_compute and last_of[action.micro_batch] == position:
            result += [Action(Kind.REDUCE, chunk, action.micro_batch) for chunk in at_end]
    return result


def _complete_at(actions: Sequence[Action], shape: StepShape) -> dict[int, dict[int | None, int]]:
    """Chunk -> micro-batch -> the position at which its gradients of the chunk are complete. In a pipeline, stages of
    one rank that share a chunk come to theirs in any order."""
    found: dict[int, dict[int | None, int]] = {}
    for position, action in enumerate(actions):
        if action.kind in _BACKWARD and action.index is not None:
            for chunk in shape.uses(action.index):
                found.setdefault(chunk, {})[action.micro_batch] = position
    return found


def add_downs(actions: Sequence[Action], plan: Plan) -> list[Action]:
    """Bring a micro-batch's gradients of a chunk down before they are summed, where the chunk is updated on the host:
    on the device they are alive for a short time only."""
    result: list[Action] = []
    for action in actions:
        if action.kind is Kind.REDUCE and action.index is not None and plan.updates_on_host(action.index):
            result.append(Action(Kind.DOWN, action.index, action.micro_batch, "grad"))
        result.append(action)
    return result


def add_updates(actions: Sequence[Action], shape: StepShape, update: UpdateTime = UpdateTime.AFTER) -> list[Action]:
    """The global norm and every trainable chunk's update: all of them after the norm, or each as soon as the last
    micro-batch has made the chunk's gradients complete (the norm then tells what it was)."""
    trainable = [chunk for chunk, use in enumerate(shape.chunks) if use.trainable]
    if update is UpdateTime.AFTER:
        return [*actions, Action(Kind.NORM), *(Action(Kind.STEP, chunk) for chunk in trainable)]
    last: dict[int, int] = {}  # chunk -> position of the last action that adds to its gradients
    end = max((position for position, action in enumerate(actions) if action.kind.is_compute), default=0)
    complete_at = _complete_at(actions, shape)
    reduced_at = {action.index: position for position, action in enumerate(actions) if action.kind is Kind.REDUCE}
    for chunk in trainable:
        adds = [*complete_at.get(chunk, {}).values(), *([reduced_at[chunk]] if chunk in reduced_at else [])]
        last[chunk] = max(adds, default=end)
        if shape.last_backward_of(chunk) is None:
            last[chunk] = max(last[chunk], end)
    steps: dict[int, list[Action]] = {}
    for chunk in trainable:
        steps.setdefault(last[chunk], []).append(Action(Kind.STEP, chunk))
    result: list[Action] = []
    for position, action in enumerate(actions):
        result.append(action)
        result += steps.get(position, ())
    return [*result, Action(Kind.NORM)]


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


def add_saves(actions: Sequence[Action], shape: StepShape, plan: Plan) -> list[Action]:
    """SAVE the activations of units whose plan moves them after their forward, LOAD them before the backward.

    They are loaded `prefetch` compute actions ahead. Those whose backward follows at once stay where they are. So do
    those that are nothing beside other units': they would only wait behind larger transfers, and others for them.
    """
    least_bytes = max((use.saved_bytes for use in shape.units), default=0) * _WORTH_MOVING
    compute = [action for action in actions if action.kind.is_compute]
    place = {action: number for number, action in enumerate(compute)}
    loads: dict[int, list[Action]] = {}  # before which compute action
    saves: dict[Action, Action] = {}
    for action in compute:
        assert action.index is not None
        use = shape.units[action.index]
        if action.kind is not Kind.F or not plan.moves_activations(use.unit):
            continue
        both = [place.get(Action(kind, action.index, action.micro_batch)) for kind in (Kind.B, Kind.I)]
        backward = next((each for each in both if each is not None), None)
        if not use.saved_bytes or use.saved_bytes < least_bytes or backward is None or backward <= place[action] + 1:
            continue
        saves[action] = Action(Kind.SAVE, action.index, action.micro_batch)
        ahead = max(backward - plan.prefetch, place[action] + 1)
        loads.setdefault(ahead, []).append(Action(Kind.LOAD, action.index, action.micro_batch))
    result: list[Action] = []
    for action in actions:
        if action.kind.is_compute:
            result += loads.get(place[action], [])
        result.append(action)
        if action in saves:
            result.append(saves[action])
    return result


def carry(moved: MovedActions) -> tuple[MovedActions, int]:
    """Let the last writes run into the next step: they go to its front.

    Only those whose buffers stay taken to the end go, so that nothing in their own step waits for them. What the next
    step reads before it computes anything (an embedding, used first and updated last) stays in its buffer meanwhile:
    that READ moves nothing (`MovedActions.kept`).
    """
    end = len(moved.actions) - 1
    open_at_end = {name for name, spans in moved.lifetimes.items() if spans[-1][1] == end}
    tail = [
        position
        for position, action in enumerate(moved.actions)
        if action.kind is Kind.WRITE
        and f"c{action.index}:{action.slot}" in open_at_end
        and action not in moved.actions[position + 1 :]
    ]
    if not tail:
        return moved, 0
    carried = [moved.actions[position] for position in tail]
    rest = [action for position, action in enumerate(moved.actions) if position not in tail]
    # A position keeps its action: those of the tail become the last one's that is left.
    place, number = {}, len(carried) - 1
    for position in range(len(moved.actions)):
        number += position not in tail
        place[position] = max(number, len(carried))
    lifetimes: dict[str, list[Lifetime]] = {
        name: [(place[first], place[last]) for first, last in spans] for name, spans in moved.lifetimes.items()
    }
    first_compute = next((at for at, action in enumerate(rest) if action.kind.is_compute), len(rest))
    read_first = {f"c{a.index}:{a.slot}" for a in rest[:first_compute] if a.kind is Kind.READ}
    kept: set[str] = set()
    for position, action in enumerate(carried):
        name = f"c{action.index}:{action.slot}"
        if name in read_first:
            kept.add(name)
            lifetimes[name][0] = (0, lifetimes[name][0][1])
        else:
            lifetimes[name].insert(0, (0, position))
    return MovedActions(carried + rest, lifetimes, frozenset(kept)), len(carried)
