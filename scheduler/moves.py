"""The passes that place the moves between two tiers: UP or READ before uses, DROP or WRITE after them.

Owns what is in a tier's memory when, of the slots whose home is a farther one: `add_uploads` brings parameters from the
host to the device, `add_moves` slots from the disk to the host. Does not own where in memory it lies
(`memory/arena.py`), nor lanes and dependencies (`scheduler/link.py`).

How much is read ahead, and what is dropped for it, `scheduler/paging.py` decides. Actions in a row that need the same
are one use: the micro-batches of a unit that take turns, a forward and its backward at the turn. `Plan.cache_bytes` and
`Plan.device_cache_bytes` bound what moves may take: more than the uses ahead want means chunks that stay from use to
use, less means that some are read later. Between host and device the uses are those that compute or gather; a chunk is
updated at its home, after its last use in a step, so that copies on the device are never written back. An UP is a use
of what lies on disk.
"""

from collections.abc import Callable, Mapping, Sequence

from ..memory.arena import Lifetime
from ..parallel.actions import Action, Kind
from .paging import DEVICE_COPY, NEVER, Item, MovedActions, Paging, Use, item_bytes
from .plan import Home, Plan
from .program import StepShape

__all__ = [
    "DEVICE_COPY",
    "Item",
    "MovedActions",
    "Needs",
    "add_moves",
    "add_uploads",
    "copies_of",
    "gathers",
    "item_bytes",
    "items_of",
    "needed_chunks",
    "num_moved_bytes",
    "optimum_moved_bytes",
]


def needed_chunks(shape: StepShape, unit: int) -> tuple[int, ...]:
    """Chunks that must be in place when unit run `unit` computes."""
    return (*shape.held, *shape.uses(unit))


def gathers(chunk: int, plan: Plan) -> bool:
    """Whether units compute with a gathered copy of the chunk instead of what this rank keeps of it."""
    return plan.world_size > 1 and plan.chunks[chunk].optimizer_sharded


def items_of(action: Action, shape: StepShape, plan: Plan) -> tuple[Item, ...]:
    """What must be in host memory for `action`, of that whose home is the disk."""
    c = action.index
    chunks: tuple[int, ...] = ()
    slots = ["param"]
    if action.kind.is_compute and plan.unified:
        assert c is not None
        chunks = tuple(chunk for chunk in needed_chunks(shape, c) if not gathers(chunk, plan))
    elif action.kind is (Kind.GATHER if plan.unified else Kind.UP):
        assert c is not None
        chunks = (c,)
    elif action.kind is Kind.STEP:
        assert c is not None
        chunks, slots = (c,), ["param", "optim"]
    return tuple(Item(chunk, slot) for chunk in chunks for slot in slots if _on_disk(chunk, slot, shape, plan))


def copies_of(action: Action, shape: StepShape, plan: Plan) -> tuple[Item, ...]:
    """What must be on the device for `action`, of that whose home is not the device."""
    assert action.index is not None or not action.kind.is_compute
    chunks: tuple[int, ...] = ()
    if action.kind.is_compute and action.index is not None:
        chunks = tuple(chunk for chunk in needed_chunks(shape, action.index) if not gathers(chunk, plan))
    elif action.kind is Kind.GATHER and action.index is not None:
        chunks = (action.index,)
    return tuple(Item(chunk, DEVICE_COPY) for chunk in chunks if plan.brings_up(chunk))


def _on_disk(chunk: int, slot: str, shape: StepShape, plan: Plan) -> bool:
    if slot == "param":
        return plan.chunks[chunk].parameter_home is Home.DISK
    return plan.chunks[chunk].optimizer_home is Home.DISK and shape.chunks[chunk].optim_bytes > 0


Needs = Callable[[Action, StepShape, Plan], tuple[Item, ...]]


def add_uploads(actions: Sequence[Action], shape: StepShape, plan: Plan) -> MovedActions:
    """Place UP and DROP of the parameters that are not at home on the device. See the module's words."""
    return _page(actions, shape, plan, copies_of, plan.device_cache_bytes, {})


def add_moves(
    actions: Sequence[Action], shape: StepShape, plan: Plan, lifetimes: Mapping[str, Sequence[Lifetime]] | None = None
) -> MovedActions:
    """Place READ, WRITE and DROP of the slots whose home is the disk. See the module's words.

    Args:
        lifetimes: of buffers that are in use already, by positions in `actions`.
    """
    # In a pipeline the schedule says when activations come back; a device of its own has an arena of its own for them.
    bounds_saved = plan.cache_bytes > 0 and plan.unified and not shape.starts
    return _page(actions, shape, plan, items_of, plan.cache_bytes, lifetimes or {}, bounds_saved)


def _page(
    actions: Sequence[Action],
    shape: StepShape,
    plan: Plan,
    needs_of: Needs,
    cache_bytes: int,
    lifetimes: Mapping[str, Sequence[Lifetime]],
    bounds_saved: bool = False,
) -> MovedActions:
    """Bring what `needs_of` says in time, in `cache_bytes` of the nearer tier, or where these are 0 in as much as the
    uses ahead want.

    Args:
        bounds_saved: whether activations on their way lie in the same bytes.
    """
    needs = _needs(actions, shape, plan, needs_of)
    if not any(needs):
        return MovedActions(list(actions), {name: sorted(spans) for name, spans in lifetimes.items()})
    uses: list[Use] = []
    number_of: list[int] = []  # of the use that an action belongs to, or that comes before it
    for place, (action, items) in enumerate(zip(actions, needs, strict=True)):
        if items and not (uses and not uses[-1].is_update and uses[-1].items == items):
            uses.append(Use(items, action.kind is Kind.STEP, place))
        number_of.append(len(uses) - 1)
    paging = Paging(shape, uses, plan.prefetch, cache_bytes or None)
    if bounds_saved:
        backward = {(a.index, a.micro_batch): place for place, a in enumerate(actions) if a.kind is Kind.B}
        paging.load_at = {a: backward[a.index, a.micro_batch] for a in actions if a.kind is Kind.LOAD}
        paging.save_behind = {place - 1: a for place, a in enumerate(actions) if a.kind is Kind.SAVE}
    begun = -1
    for place, (action, items, number) in enumerate(zip(actions, needs, number_of, strict=True)):
        begins = bool(items) and number > begun
        if begins or (action.kind.is_compute and paging.waiting):
            paging.make_room(number, place, begins)
            begun = number
        paging.append(place, action, items, number)
    return paging.finished(lifetimes)


def _needs(actions: Sequence[Action], shape: StepShape, plan: Plan, needs_of: Needs) -> list[tuple[Item, ...]]:
    """What `needs_of` says of every action: the same for all micro-batches."""
    known: dict[tuple[Kind, int | None, str | None], tuple[Item, ...]] = {}
    needs: list[tuple[Item, ...]] = []
    for action in actions:
        key = action.kind, action.index, action.slot
        if key not in known:
            known[key] = needs_of(action, shape, plan)
        needs.append(known[key])
    return needs


def num_moved_bytes(actions: Sequence[Action], shape: StepShape) -> dict[Kind, int]:
    """Bytes that a step reads and writes."""
    moved = {Kind.READ: 0, Kind.WRITE: 0}
    for action in actions:
        if action.kind in moved and action.index is not None and action.slot is not None:
            moved[action.kind] += item_bytes(Item(action.index, action.slot), shape)
    return moved


def optimum_moved_bytes(
    actions: Sequence[Action], shape: StepShape, plan: Plan, capacity_bytes: int, needs_of: Needs = items_of
) -> int:
    """The fewest bytes that a step can bring into `capacity_bytes` of the nearer tier, without any prefetch: by search
    over what to drop, for small cases (exponential)."""
    needs = [needs_of(action, shape, plan) for action in actions]
    uses = [(items, action.kind is Kind.STEP) for action, items in zip(actions, needs, strict=True) if items]
    states: dict[frozenset[Item], int] = {frozenset(): 0}
    for items, is_update in uses:
        following: dict[frozenset[Item], int] = {}
        for held, cost in states.items():
            cost += sum(item_bytes(item, shape) for item in items if item not in held)
            for kept in _subsets(held - set(items)):
                after = frozenset(kept | set(items))
                if sum(item_bytes(item, shape) for item in after) > capacity_bytes:
                    continue
                after = after - set(items) if is_update else after
                following[after] = min(following.get(after, NEVER), cost)
        states = following
    return min(states.values(), default=NEVER)


def _subsets(items: frozenset[Item]) -> list[set[Item]]:
    subsets: list[set[Item]] = [set()]
    for item in items:
        subsets += [subset | {item} for subset in subsets]
    return subsets
