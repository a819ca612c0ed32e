"""The walk over the uses of what lies on a farther tier: when each piece is brought, and what makes room for it.

Owns, position by position, what is in the nearer tier's memory, the moves in their places and the buffers' lifetimes.
Does not own what an action needs (`scheduler/moves.py`) nor where in memory a buffer lies (`memory/arena.py`).

The order of uses is known, so this is offline paging with prefetch: before each use, what it and the next `distance`
uses need is read, in the order in which it is needed; what is not needed soon and does not fit beside it is dropped,
farthest next use first (Belady; ALGORITHMS 2.6), and already after its last use: whatever comes into its place can then
be read from there on. What an update changed is written at once, and its buffer stays taken for `distance` more uses,
so that nothing has to wait for the write.

A capacity bounds all that: where the uses ahead do not fit into it, buffers that are being written are given to what
comes next (which then waits for the write), what is needed last is read a use later, and what was used is dropped even
if it is needed soon. Activations that come back from the disk count in it, and are put off likewise, but never past
their backward action.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..memory.arena import Lifetime
from ..memory.direct_io import round_up
from ..parallel.actions import Action, Kind
from .program import StepShape

__all__ = ["DEVICE_COPY", "NEVER", "Item", "MovedActions", "Paging", "Use", "item_bytes"]

DEVICE_COPY = "device"
"""In place of a slot's name: the copy on the device of a chunk's parameters."""

NEVER = 1 << 62


@dataclass(frozen=True, slots=True, order=True)
class Item:
    """A slot of a chunk that may be in a tier's memory or not. `name` is the name of its buffer."""

    chunk: int
    slot: str

    @property
    def name(self) -> str:
        return f"c{self.chunk}:{self.slot}"


def item_bytes(item: Item, shape: StepShape) -> int:
    """Bytes of a buffer for `item`."""
    chunk = shape.chunks[item.chunk]
    return chunk.optim_bytes if item.slot == "optim" else chunk.param_bytes


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


@dataclass(frozen=True)
class Use:
    """Actions in a row that need the same items; the first of them is at `place` of the list without moves."""

    items: tuple[Item, ...]
    is_update: bool
    place: int


@dataclass
class Paging:
    """The walk. Positions are those in `result`, to which the drops are added at the end.

    Attributes:
        capacity_bytes: that items, and what the LOADs of `load_at` bring, may take; None: what uses ahead want.
        distance: how many uses ahead of their own items are read.
        load_at: LOAD -> place of its backward action, of those that the capacity bounds.
        save_behind: place of a forward action -> the SAVE behind it, likewise: its buffer is taken until the next unit
            has run, beside what was read ahead.
    """

    shape: StepShape
    uses: list[Use]
    distance: int
    capacity_bytes: int | None
    load_at: Mapping[Action, int] = field(default_factory=dict)
    save_behind: Mapping[int, Action] = field(default_factory=dict)
    result: list[Action] = field(default_factory=list)
    spans: list[tuple[Item, int, int]] = field(default_factory=list)  # first and last position of a buffer in use
    drops: dict[int, list[Item]] = field(default_factory=dict)  # position -> what is dropped after it
    kept: dict[int, int] = field(default_factory=dict)  # place of an action -> where it lies now
    live: dict[Item, int] = field(default_factory=dict)  # where it was read
    last_used: dict[Item, int] = field(default_factory=dict)
    draining: dict[Item, tuple[int, int]] = field(default_factory=dict)  # (where read, use after which it is free)
    waiting: list[Action] = field(default_factory=list)  # LOADs that may come, and have not yet
    loaded: dict[Action, int] = field(default_factory=dict)  # LOAD -> bytes, until its backward action has run
    saving_bytes: int = 0  # of the last SAVE's buffer, until the next unit has run

    def __post_init__(self) -> None:
        self._bytes_of = {item: item_bytes(item, self.shape) for use in self.uses for item in use.items}
        self._room_bytes = self._wanted_bytes() if self.capacity_bytes is None else self.capacity_bytes
        self._uses_of: dict[Item, list[int]] = {}
        for number, use in enumerate(self.uses):
            for item in use.items:
                self._uses_of.setdefault(item, []).append(number)

    # ---- the walk

    def append(self, place: int, action: Action, items: Sequence[Item], number: int) -> None:
        """An action of the list, with what it needs there already.

        Args:
            number: of the use that it belongs to, or that comes before it.
        """
        if action in self.load_at:
            self.waiting.append(action)
            return
        self.last_used.update(dict.fromkeys(items, len(self.result)))
        self.kept[place] = len(self.result)
        self.result.append(action)
        if action.kind is Kind.STEP:
            for item in items:
                self._write(item, number + self.distance)
        elif action.kind.is_compute:
            save = self.save_behind.get(place)
            self.saving_bytes = 0 if save is None else self._saved_bytes(save)
            for load in [each for each in self.loaded if self.load_at[each] <= place]:
                del self.loaded[load]

    def make_room(self, number: int, place: int, begins: bool) -> None:
        """Before the action at `place`: bring what it and the next uses need, after letting go of what is farthest.

        Args:
            number: of the use that it `begins`; else of the one before it, which has what it needs.
        """
        for item, (_, last) in list(self.draining.items()):
            if last < number:
                self._release(item)
        window: dict[Item, int] = {}  # -> the place where it is needed
        now: set[Item] = set()
        if number >= 0:
            now.update(self.uses[number].items)
            for use in self.uses[number : number + self.distance + 1]:
                for item in use.items:
                    window.setdefault(item, use.place)
        # A slot whose write is under way is read again only once that use has come.
        to_read: list[tuple[int, Item | Action]] = [
            (at, item)
            for item, at in window.items()
            if item not in self.live
            and (item not in self.draining or item in now)
            and (begins or at > self.uses[number].place)
        ]
        for _, item in to_read:
            if item in self.draining:
                assert isinstance(item, Item)
                self._release(item)
        to_read += [(self.load_at[load], load) for load in self.waiting]
        to_read.sort(key=lambda each: each[0])  # a stable order
        must = {each for at, each in to_read if each in now or (isinstance(each, Action) and at <= place)}
        save = self.save_behind.get(place)
        saving_bytes = max(self.saving_bytes, 0 if save is None else self._saved_bytes(save))
        while self._excess(to_read) + saving_bytes > 0:
            victims = [item for item in self.live if item not in window]
            if victims:
                self._drop(max(victims, key=lambda item: (self._next_use(item, number), item)))
            elif self.draining and self.capacity_bytes is not None:
                self._release(min(self.draining, key=lambda item: self.draining[item]))
            elif to_read and to_read[-1][1] not in must:
                to_read.pop()  # it is brought before a later use instead
            elif victims := [item for item in self.live if item not in now and self._was_used(item)]:
                self._drop(max(victims, key=lambda item: (self._next_use(item, number), item)))
            else:
                break
        for _, each in to_read:
            self._bring(each)

    def _excess(self, to_read: Sequence[tuple[int, "Item | Action"]]) -> int:
        """Bytes above the capacity, with what is to be read."""
        taken = sum(self._bytes_of[item] for item in (*self.live, *self.draining))
        coming = sum(self._bytes_of[each] if isinstance(each, Item) else self._saved_bytes(each) for _, each in to_read)
        return taken + coming + sum(self.loaded.values()) - self._room_bytes

    def _wanted_bytes(self) -> int:
        """What a use, the next `distance` ones and writes of those before it need."""
        wanted = 0
        for number in range(len(self.uses)):
            near: set[Item] = set()
            for use in self.uses[number : number + self.distance + 1]:
                near.update(use.items)
            for before in self.uses[max(0, number - self.distance) : number]:
                near.update(before.items if before.is_update else ())
            wanted = max(wanted, sum(self._bytes_of[item] for item in near))
        return wanted

    def _saved_bytes(self, action: Action) -> int:
        assert action.index is not None
        return round_up(self.shape.units[action.index].saved_bytes)

    def _next_use(self, item: Item, after: int) -> int:
        uses = self._uses_of[item]
        place = bisect_left(uses, after)
        return uses[place] if place < len(uses) else NEVER

    def _was_used(self, item: Item) -> bool:
        """Since it was read: what is dropped before that was read for nothing."""
        return self.last_used.get(item, -1) > self.live[item]

    def _drop(self, item: Item) -> None:
        self.drops.setdefault(self.last_used[item], []).append(item)
        del self.live[item]

    def _bring(self, each: Item | Action) -> None:
        if isinstance(each, Action):
            self.waiting.remove(each)
            self.loaded[each] = self._saved_bytes(each)
            self.result.append(each)
            return
        self.live[each] = len(self.result)
        up = each.slot == DEVICE_COPY
        self.result.append(Action(Kind.UP if up else Kind.READ, each.chunk, None, "param" if up else each.slot))

    def _write(self, item: Item, free_after: int) -> None:
        self.draining[item] = self.live.pop(item), free_after
        self.result.append(Action(Kind.WRITE, item.chunk, None, item.slot))

    def _release(self, item: Item) -> None:
        """What was written leaves its buffer to others."""
        taken, _ = self.draining.pop(item)
        self.spans.append((item, taken, len(self.result) - 1))

    # ---- its end

    def finished(self, lifetimes_before: Mapping[str, Sequence[Lifetime]]) -> MovedActions:
        """The list with its drops in their places.

        Args:
            lifetimes_before: of buffers that the actions had already; they go to where those actions lie now.
        """
        assert not self.waiting, f"never brought back: {self.waiting}"
        for item in list(self.live):
            self._drop(item)
        for item in list(self.draining):
            self._release(item)
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
