"""The pass that places the moves between disk and host: READ before uses, DROP or WRITE after them.

Owns what is in host memory when, of the slots whose home is the disk. Does not own where in memory it lies
(`memory/arena.py`), nor lanes and dependencies (`scheduler/link.py`).

The order of uses is known, so this is offline paging with prefetch: before each use, what it and the next `prefetch`
uses need is read; what is not needed soon and does not fit beside it is dropped, farthest next use first (Belady;
ALGORITHMS 2.6). What an update changed is written at once, and its buffer stays taken for `prefetch` more uses, so that
nothing has to wait for the write. More host memory (`Plan.cache_bytes`) means more chunks that stay from use to use.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..memory.arena import Lifetime
from ..parallel.actions import Action, Kind
from .plan import Home, Plan
from .program import StepShape

__all__ = ["Item", "MovedActions", "add_moves", "needed_chunks", "num_moved_bytes", "optimum_moved_bytes"]

_NEVER = 1 << 62


@dataclass(frozen=True, slots=True, order=True)
class Item:
    """A slot of a chunk that may be in host memory or not. `name` is the name of its buffer."""

    chunk: int
    slot: str

    @property
    def name(self) -> str:
        return f"c{self.chunk}:{self.slot}"


@dataclass(frozen=True, slots=True)
class MovedActions:
    """Actions with their moves.

    Attributes:
        actions: the list.
        lifetimes: buffer -> spans of positions in `actions` in which it is taken.
    """

    actions: list[Action]
    lifetimes: dict[str, list[Lifetime]]


def needed_chunks(shape: StepShape, unit: int) -> tuple[int, ...]:
    """Chunks that must be in place when unit run `unit` computes."""
    return (*shape.held, *shape.uses(unit))


def items_of(action: Action, shape: StepShape, plan: Plan) -> tuple[Item, ...]:
    """What must be in host memory for `action`, of that whose home is the disk."""
    c = action.index
    chunks: tuple[int, ...] = ()
    slots = ["param"]
    if action.kind.is_compute and plan.world_size == 1 and plan.unified:
        assert c is not None
        chunks = needed_chunks(shape, c)
    elif action.kind in (Kind.GATHER, Kind.UP) and not (action.kind is Kind.UP and plan.world_size > 1):
        assert c is not None
        chunks = (c,)
    elif action.kind is Kind.STEP:
        assert c is not None
        chunks, slots = (c,), ["param", "optim"]
    return tuple(Item(chunk, slot) for chunk in chunks for slot in slots if _on_disk(chunk, slot, shape, plan))


def _on_disk(chunk: int, slot: str, shape: StepShape, plan: Plan) -> bool:
    if slot == "param":
        return plan.chunks[chunk].parameter_home is Home.DISK
    return plan.chunks[chunk].optimizer_home is Home.DISK and shape.chunks[chunk].optim_bytes > 0


def item_bytes(item: Item, shape: StepShape) -> int:
    """Bytes of a buffer for `item`."""
    chunk = shape.chunks[item.chunk]
    return chunk.optim_bytes if item.slot == "optim" else chunk.param_bytes


@dataclass
class _Paging:
    """The walk over the uses. `live` and `draining` hold the position at which the buffer was taken."""

    shape: StepShape
    capacity_bytes: int
    uses: list[tuple[Item, ...]]
    result: list[Action] = field(default_factory=list)
    lifetimes: dict[str, list[Lifetime]] = field(default_factory=dict)
    live: dict[Item, int] = field(default_factory=dict)
    draining: dict[Item, tuple[int, int]] = field(default_factory=dict)  # item -> (taken, use after which it is free)

    def bytes_of(self, items: Sequence[Item]) -> int:
        return sum(item_bytes(item, self.shape) for item in items)

    def taken_bytes(self) -> int:
        return self.bytes_of(list(self.live)) + self.bytes_of(list(self.draining))

    def release(self, item: Item, taken: int) -> None:
        self.lifetimes.setdefault(item.name, []).append((taken, max(taken, len(self.result) - 1)))

    def next_use(self, item: Item, after: int) -> int:
        return next((i for i in range(after, len(self.uses)) if item in self.uses[i]), _NEVER)

    def drop(self, item: Item) -> None:
        self.result.append(Action(Kind.DROP, item.chunk, None, item.slot))
        self.release(item, self.live.pop(item))

    def read(self, item: Item) -> None:
        self.live[item] = len(self.result)
        self.result.append(Action(Kind.READ, item.chunk, None, item.slot))


def add_moves(actions: Sequence[Action], shape: StepShape, plan: Plan) -> MovedActions:
    """Place READ, WRITE and DROP of the slots whose home is the disk. See the module's words."""
    needs = [items_of(action, shape, plan) for action in actions]
    uses = [items for items in needs if items]
    paging = _Paging(shape, _capacity_bytes(uses, actions, needs, shape, plan), uses)
    number = -1
    for action, items in zip(actions, needs, strict=True):
        if not items:
            paging.result.append(action)
            continue
        number += 1
        _make_room(paging, number, plan.prefetch)
        paging.result.append(action)
        if action.kind is Kind.STEP:
            for item in items:
                paging.result.append(Action(Kind.WRITE, item.chunk, None, item.slot))
                paging.draining[item] = paging.live.pop(item), number + plan.prefetch
        for item in [item for item in paging.live if paging.next_use(item, number + 1) == _NEVER]:
            paging.drop(item)
    for item in list(paging.live):
        paging.drop(item)
    for item, (taken, _) in paging.draining.items():
        paging.release(item, taken)
    return MovedActions(paging.result, paging.lifetimes)


def _make_room(paging: _Paging, number: int, distance: int) -> None:
    """Before use `number`: read what it and the next ones need, after dropping what is farthest away."""
    for item, (taken, last) in list(paging.draining.items()):
        if last < number:
            del paging.draining[item]
            paging.release(item, taken)
    window: list[Item] = []
    for items in paging.uses[number : number + distance + 1]:
        window += [item for item in items if item not in window]
    now = set(paging.uses[number])
    # A slot whose write is under way is read again only once that use has come.
    to_read = [item for item in window if item not in paging.live and (item not in paging.draining or item in now)]
    for item in to_read:
        if item in paging.draining:
            paging.release(item, paging.draining.pop(item)[0])
    while paging.taken_bytes() + paging.bytes_of(to_read) > paging.capacity_bytes:
        victims = [item for item in paging.live if item not in window]
        if victims:
            paging.drop(max(victims, key=lambda item: (paging.next_use(item, number), item)))
        elif to_read and to_read[-1] not in now:
            to_read.pop()  # it is read before a later use instead
        else:
            break
    for item in to_read:
        paging.read(item)


def _capacity_bytes(
    uses: Sequence[tuple[Item, ...]],
    actions: Sequence[Action],
    needs: Sequence[tuple[Item, ...]],
    shape: StepShape,
    plan: Plan,
) -> int:
    """What the plan gives, at least what a use, the next `prefetch` ones and writes of those before it need."""
    written = [action.kind is Kind.STEP for action, items in zip(actions, needs, strict=True) if items]
    least = 0
    for number in range(len(uses)):
        near = set().union(*uses[number : number + plan.prefetch + 1])
        for before in range(max(0, number - plan.prefetch), number):
            near |= set(uses[before]) if written[before] else set()
        least = max(least, sum(item_bytes(item, shape) for item in near))
    return max(least, plan.cache_bytes)


def num_moved_bytes(actions: Sequence[Action], shape: StepShape) -> dict[Kind, int]:
    """Bytes that a step reads and writes."""
    moved = {Kind.READ: 0, Kind.WRITE: 0}
    for action in actions:
        if action.kind in moved and action.index is not None and action.slot is not None:
            moved[action.kind] += item_bytes(Item(action.index, action.slot), shape)
    return moved


def optimum_moved_bytes(actions: Sequence[Action], shape: StepShape, plan: Plan, capacity_bytes: int) -> int:
    """The fewest bytes that a step can read with `capacity_bytes` of host memory, without any prefetch: by search over
    what to drop, for small cases (exponential)."""
    needs = [items_of(action, shape, plan) for action in actions]
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
                following[after] = min(following.get(after, _NEVER), cost)
        states = following
    return min(states.values(), default=_NEVER)


def _subsets(items: frozenset[Item]) -> list[set[Item]]:
    subsets: list[set[Item]] = [set()]
    for item in items:
        subsets += [subset | {item} for subset in subsets]
    return subsets
