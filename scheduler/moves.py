"""The passes that place the moves between two tiers: UP or READ before uses, DROP or WRITE after them.

Owns what is in a tier's memory when, of the slots whose home is a farther one: `add_uploads` brings parameters from the
host to the device, `add_moves` slots from the disk to the host. Does not own where in memory it lies
(`memory/arena.py`), nor lanes and dependencies (`scheduler/link.py`).

The order of uses is known, so this is offline paging with prefetch: before each use, what it and the next `prefetch`
uses need is read; what is not needed soon and does not fit beside it is dropped, farthest next use first (Belady;
ALGORITHMS 2.6), and already after its last use: whatever comes into its place can then be read from there on. Actions
in a row that need the same are one use: the micro-batches of a unit that take turns, a forward and its backward at the
turn. What an update changed is written at once, and its buffer stays taken for `prefetch` more uses, so that nothing
has to wait for the write. More memory (`Plan.cache_bytes`, `Plan.device_cache_bytes`) means more chunks that stay from
use to use. Between host and device the uses are those that compute or gather; a chunk is updated at its home, after
its last use in a step, so that copies on the device are never written back. An UP is a use of what lies on disk.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ..memory.arena import Lifetime
from ..parallel.actions import Action, Kind
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

DEVICE_COPY = "device"
"""In place of a slot's name: the copy on the device of a chunk's parameters."""

_NEVER = 1 << 62


@dataclass(frozen=True, slots=True, order=True)
class Item:
    """A slot of a chunk that may be in a tier's memory or not. `name` is the name of its buffer."""

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
        kept: buffers that still hold, from the step before, what their first READ would bring.
    """

    actions: list[Action]
    lifetimes: dict[str, list[Lifetime]]
    kept: frozenset[str] = frozenset()


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


def item_bytes(item: Item, shape: StepShape) -> int:
    """Bytes of a buffer for `item`."""
    chunk = shape.chunks[item.chunk]
    return chunk.optim_bytes if item.slot == "optim" else chunk.param_bytes


@dataclass(frozen=True)
class _Use:
    """Actions in a row that need the same items."""

    items: tuple[Item, ...]
    is_update: bool


@dataclass
class _Paging:
    """The walk over the uses. Positions are those in `result`, to which the drops are added at the end."""

    shape: StepShape
    capacity_bytes: int
    uses: list[_Use]
    result: list[Action] = field(default_factory=list)
    spans: list[tuple[Item, int, int]] = field(default_factory=list)  # first and last position of a buffer in use
    drops: dict[int, list[Item]] = field(default_factory=dict)  # position -> what is dropped after it
    kept: list[int] = field(default_factory=list)  # where the actions that were there before lie
    live: dict[Item, int] = field(default_factory=dict)  # where it was read
    last_used: dict[Item, int] = field(default_factory=dict)
    draining: dict[Item, tuple[int, int]] = field(default_factory=dict)  # (where read, use after which it is free)

    def __post_init__(self) -> None:
        self._bytes_of = {item: item_bytes(item, self.shape) for use in self.uses for item in use.items}
        self._uses_of: dict[Item, list[int]] = {}
        for number, use in enumerate(self.uses):
            for item in use.items:
                self._uses_of.setdefault(item, []).append(number)

    def bytes_of(self, items: Sequence[Item]) -> int:
        return sum(self._bytes_of[item] for item in items)

    def taken_bytes(self) -> int:
        return self.bytes_of([*self.live, *self.draining])

    def next_use(self, item: Item, after: int) -> int:
        uses = self._uses_of[item]
        place = bisect_left(uses, after)
        return uses[place] if place < len(uses) else _NEVER

    def drop(self, item: Item) -> None:
        self.drops.setdefault(self.last_used[item], []).append(item)
        del self.live[item]

    def read(self, item: Item) -> None:
        self.live[item] = len(self.result)
        up = item.slot == DEVICE_COPY
        self.result.append(Action(Kind.UP if up else Kind.READ, item.chunk, None, "param" if up else item.slot))

    def write(self, item: Item, free_after: int) -> None:
        self.draining[item] = self.live.pop(item), free_after
        self.result.append(Action(Kind.WRITE, item.chunk, None, item.slot))

    def release(self, item: Item) -> None:
        """What was written leaves its buffer to others."""
        taken, _ = self.draining.pop(item)
        self.spans.append((item, taken, len(self.result) - 1))

    def finished(self, lifetimes_before: Mapping[str, Sequence[Lifetime]]) -> MovedActions:
        """The list with its drops in their places.

        Args:
            lifetimes_before: of buffers that the actions had already; they go to where those actions lie now.
        """
        for item in list(self.live):
            self.drop(item)
        for item in list(self.draining):
            self.release(item)
        actions: list[Action] = []
        place: list[int] = []
        lifetimes: dict[str, list[Lifetime]] = {}
        taken: dict[Item, int] = {}  # by the last READ or UP before
        for position, action in enumerate(self.result):
            place.append(len(actions))
            if action.kind in (Kind.READ, Kind.UP):
                assert action.index is not None
                assert action.slot is not None
                slot = DEVICE_COPY if action.kind is Kind.UP else action.slot
                taken[Item(action.index, slot)] = len(actions)
            actions.append(action)
            for item in self.drops.get(position, ()):
                lifetimes.setdefault(item.name, []).append((taken[item], len(actions)))
                actions.append(Action(Kind.DROP, item.chunk, None, item.slot))
        for item, first, last in self.spans:
            lifetimes.setdefault(item.name, []).append((place[first], max(place[first], place[last])))
        for name, spans in lifetimes_before.items():
            lifetimes[name] = [(place[self.kept[first]], place[self.kept[last]]) for first, last in spans]
        return MovedActions(actions, {name: sorted(spans) for name, spans in lifetimes.items()})


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
    return _page(actions, shape, plan, items_of, plan.cache_bytes, lifetimes or {})


def _page(
    actions: Sequence[Action],
    shape: StepShape,
    plan: Plan,
    needs_of: Needs,
    cache_bytes: int,
    lifetimes: Mapping[str, Sequence[Lifetime]],
) -> MovedActions:
    """Bring what `needs_of` says in time, in at least `cache_bytes` of the nearer tier."""
    needs = _needs(actions, shape, plan, needs_of)
    if not any(needs):
        return MovedActions(list(actions), {name: sorted(spans) for name, spans in lifetimes.items()})
    uses: list[_Use] = []
    number_of: list[int] = []  # of the use that an action belongs to, or that comes before it
    for action, items in zip(actions, needs, strict=True):
        is_update = action.kind is Kind.STEP
        if items and uses and not uses[-1].is_update and uses[-1].items == items:
            uses[-1] = _Use(items, is_update)
        elif items:
            uses.append(_Use(items, is_update))
        number_of.append(len(uses) - 1)
    paging = _Paging(shape, max(_least_bytes(uses, shape, plan), cache_bytes), uses)
    begun = -1
    for action, items, number in zip(actions, needs, number_of, strict=True):
        if items and number > begun:
            _make_room(paging, number, plan.prefetch)
            begun = number
        paging.last_used.update(dict.fromkeys(items, len(paging.result)))
        paging.kept.append(len(paging.result))
        paging.result.append(action)
        if action.kind is Kind.STEP:
            for item in items:
                paging.write(item, number + plan.prefetch)
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


def _make_room(paging: _Paging, number: int, distance: int) -> None:
    """Before use `number`: read what it and the next ones need, after dropping what is farthest away."""
    for item, (_, last) in list(paging.draining.items()):
        if last < number:
            paging.release(item)
    window: list[Item] = []
    for use in paging.uses[number : number + distance + 1]:
        window += [item for item in use.items if item not in window]
    now = set(paging.uses[number].items)
    # A slot whose write is under way is read again only once that use has come.
    to_read = [item for item in window if item not in paging.live and (item not in paging.draining or item in now)]
    for item in to_read:
        if item in paging.draining:
            paging.release(item)
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


def _least_bytes(uses: Sequence[_Use], shape: StepShape, plan: Plan) -> int:
    """What a use, the next `prefetch` ones and writes of those before it need."""
    sizes = {item: item_bytes(item, shape) for use in uses for item in use.items}
    least = 0
    for number in range(len(uses)):
        near: set[Item] = set()
        for use in uses[number : number + plan.prefetch + 1]:
            near.update(use.items)
        for before in uses[max(0, number - plan.prefetch) : number]:
            near.update(before.items if before.is_update else ())
        least = max(least, sum(sizes[item] for item in near))
    return least


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
                following[after] = min(following.get(after, _NEVER), cost)
        states = following
    return min(states.values(), default=_NEVER)


def _subsets(items: frozenset[Item]) -> list[set[Item]]:
    subsets: list[set[Item]] = [set()]
    for item in items:
        subsets += [subset | {item} for subset in subsets]
    return subsets
