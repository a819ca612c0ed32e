"""Plays programs in random legal orders and checks what every action finds: an opinion of its own about what is right.

    walker = Walker(shape, plan, random.Random(3))
    walker.play(program.without_carried()); walker.play(program); walker.play(program.only_carried())
    walker.finish()

A lane starts its next instruction once what it waits for is done; every instruction takes a while, so that others start
and end meanwhile. Each slot has a version, the number of its updates: a use must find the version that the order of the
program promises, wherever it lies, and nobody may touch those bytes during the use.
"""

import random
from collections import Counter

from outgrow.parallel.actions import Action, Kind
from outgrow.scheduler.plan import Activations, GatheredFor, Home, Plan
from outgrow.scheduler.program import Buffer, Lane, Program, StepShape

__all__ = ["Walker"]


class Walker:
    """Memory and disk of one rank, across programs. What lies on a device with memory of its own is in `memory` too, by
    the names of its buffers; a chunk's resident parameters are there as `c0:param`, whatever the tier."""

    def __init__(self, shape: StepShape, plan: Plan, rng: random.Random) -> None:
        self.shape, self.plan, self.rng = shape, plan, rng
        self.disk: dict[str, int] = {}
        self.memory: dict[str, int | None] = {}  # slot -> version; None: it is not there
        self.filling: set[str] = set()
        self.full: dict[int, int | None] = {}
        self.updates: Counter[int] = Counter()  # of a chunk, in the programs played before
        self.written: Counter[str] = Counter()
        self.num_reads: Counter[str] = Counter()
        self.will_keep: set[str] = set()  # what stays in memory after its WRITE
        for c, chunk in enumerate(shape.chunks):
            self.full[c] = None
            for slot, home, exists in (
                ("param", plan.chunks[c].parameter_home, True),
                ("optim", plan.chunks[c].optimizer_home, chunk.optim_bytes > 0),
            ):
                if exists and home is Home.DISK:
                    self.disk[f"c{c}:{slot}"] = 0
                    self.memory[f"c{c}:{slot}"] = None
                elif exists:
                    self.memory[f"c{c}:{slot}"] = 0

    def play(self, program: Program) -> None:
        """One program from its beginning to its end."""
        self.moves_nothing = {p for p, i in enumerate(program.instructions) if not i.num_bytes}
        self.will_keep |= program.kept
        self.buffers = {buffer.name: buffer for buffer in program.buffers}
        for name in self.buffers:
            self.memory.setdefault(name, None)
        self.actions = program.actions()
        self.done: set[int] = set()
        self.running: list[int] = []
        self.due: dict[int, int] = {}  # position -> the updates of its chunk before it
        seen = Counter(self.updates)
        for position, action in enumerate(self.actions):
            if action.kind is Kind.STEP:
                self.due[position] = seen[action.index or 0]
                seen[action.index or 0] += 1
        self.seen_before = [Counter(self.updates)]
        for action in self.actions:
            following = Counter(self.seen_before[-1])
            following[action.index or 0] += action.kind is Kind.STEP
            self.seen_before.append(following)
        queues = {lane: list(positions) for lane, positions in program.by_lane.items()}
        slowness = {lane: self.rng.choice((1, 1, 30)) for lane in Lane}
        busy: dict[Lane, int] = {}
        while queues or busy:
            choices = [
                ("start", lane)
                for lane, queue in queues.items()
                if lane not in busy and set(program.instructions[queue[0]].after) <= self.done
            ] + [("end", lane) for lane in busy]
            assert choices, f"deadlock: {[str(self.actions[queue[0]]) for queue in queues.values()]}"
            what, lane = self.rng.choices(choices, [1 / slowness[lane] for _, lane in choices])[0]
            if what == "start":
                busy[lane] = queues[lane].pop(0)
                if not queues[lane]:
                    del queues[lane]
                self.start(busy[lane])
                self.running.append(busy[lane])
            else:
                position = busy.pop(lane)
                self.running.remove(position)
                self.end(position)
                self.done.add(position)
        self.updates = self.seen_before[-1]

    def finish(self) -> None:
        """Everything is at home, with all its updates, written once after each."""
        for name in self.disk:
            c = int(name[1:].split(":")[0])
            assert self.memory[name] is None, f"{name} is left in memory"
            assert self.disk[name] == self.updates[c], f"{name} on disk misses an update"
        for name, version in self.memory.items():
            is_slot = name.endswith((":param", ":optim")) and name not in self.disk
            assert is_slot or version is None, f"{name} is left in memory"
        for name in self.disk:
            c = int(name[1:].split(":")[0])
            assert self.written[name] == self.updates[c], f"{name} was written {self.written[name]} times"

    # ---- what an action finds

    def start(self, position: int) -> None:
        action = self.actions[position]
        c, name = action.index or 0, f"c{action.index}:{action.slot}"
        if action.kind is Kind.READ and position in self.moves_nothing:
            self.find(position, name)
        elif action.kind is Kind.READ:
            assert self.memory[name] is None, f"{action}: it is there already"
            assert not [p for p in self.running if self.actions[p] == Action(Kind.WRITE, c, None, action.slot)], name
            self.fill(action, name)
        elif action.kind is Kind.WRITE and name in self.will_keep:
            assert self.memory[name] is not None, f"{action}: it is not there"
            assert not [p for p in self.running if self.actions[p] == Action(Kind.STEP, c)], f"{action} of what changes"
        elif action.kind in (Kind.WRITE, Kind.DROP) and action.slot is not None:
            assert self.memory[name] is not None, f"{action}: it is not there"
            users = [str(self.actions[p]) for p in self.running if name in self.slots_of(self.actions[p])]
            assert not users, f"{action} while {users}"
            if action.kind is Kind.DROP:
                assert name not in self.disk or self.memory[name] == self.disk[name], f"{action}: an update is lost"
                self.memory[name] = None
        elif action.kind is Kind.UP:
            self.find(position, f"c{c}:param")
            self.fill(action, f"c{c}:device")
        elif action.kind is Kind.DOWN:
            self.all_done(position, [a for a in self.actions if self.makes_gradients(a, c, action.micro_batch)])
            users = [str(self.actions[p]) for p in self.running if self.makes_gradients(self.actions[p], c, None)]
            assert not users, f"{action} while {users}"
            self.fill(action, f"c{c}:grad")
        elif action.kind is Kind.SAVE:
            self.all_done(position, [Action(Kind.F, c, action.micro_batch)])
            self.fill(action, f"a{c}.{action.micro_batch}")
        elif action.kind is Kind.LOAD:
            self.start_load(position, action)
        elif action.kind is Kind.DROP:
            assert self.full[c] is not None, f"{action}: it is not gathered"
            users = [
                p for p in self.running if self.actions[p].kind.is_compute and c in self.chunks_of(self.actions[p])
            ]
            assert not users, f"{action} while it is used"
            self.full[c] = None
        elif action.kind is Kind.GATHER:
            assert self.full[c] is None or self.plan.chunks[c].gathered_for is GatheredFor.STEP
            self.find(position, self.nearest(c))
        elif action.kind.is_compute:
            for chunk in self.chunks_of(action):
                if self.gathers(chunk):
                    assert self.full[chunk] == self.seen_before[position][chunk], f"{action}: c{chunk} is not gathered"
                else:
                    self.find(position, self.nearest(chunk))
            if action.kind is Kind.B and Action(Kind.SAVE, c, action.micro_batch) in self.actions:
                assert self.memory[self.loaded(action)] == 1, f"{action}: its activations are not there"
        elif action.kind is Kind.STEP:
            self.start_update(position, action)
        elif action.kind is Kind.REDUCE:
            self.all_done(position, [a for a in self.actions if self.makes_gradients(a, c, action.micro_batch)])
            if self.plan.updates_on_host(c):
                assert self.memory[f"c{c}:grad"] == action.micro_batch, f"{action}: the gradients are not on the host"
        elif action.kind is Kind.NORM:
            chunks = [c for c, use in enumerate(self.shape.chunks) if use.trainable]
            makers = [a for a in self.actions if any(self.makes_gradients(a, c, None) for c in chunks)]
            self.all_done(position, makers + [a for a in self.actions if a.kind is Kind.REDUCE])

    def start_update(self, position: int, action: Action) -> None:
        c = action.index or 0
        for slot in ("param", "optim"):
            if f"c{c}:{slot}" in self.memory:
                self.find(position, f"c{c}:{slot}")
        users = [str(self.actions[p]) for p in self.running if c in self.chunks_of(self.actions[p])]
        assert not users, f"{action} while {users}"
        assert self.memory.get(f"c{c}:device") is None, f"{action} leaves a copy on the device that misses it"
        before = [
            a for a in self.actions if self.makes_gradients(a, c, None) or (a.kind is Kind.REDUCE and a.index == c)
        ]
        self.all_done(position, before + [a for a in self.actions if self.plan.clips_gradients and a.kind is Kind.NORM])

    def end(self, position: int) -> None:
        action = self.actions[position]
        c, name = action.index or 0, f"c{action.index}:{action.slot}"
        if action.kind is Kind.READ:
            if position not in self.moves_nothing:
                self.memory[name] = self.disk[name]
                self.filling.remove(name)
                self.num_reads[name] += 1
        elif action.kind in (Kind.UP, Kind.DOWN, Kind.SAVE, Kind.LOAD):
            self.end_copy(position, action)
        elif action.kind is Kind.REDUCE and self.plan.updates_on_host(c):
            assert self.memory[f"c{c}:grad"] == action.micro_batch, f"{action}: overwritten meanwhile"
            self.memory[f"c{c}:grad"] = None
        elif action.kind is Kind.WRITE:
            version = self.memory[name]
            assert version is not None, f"{action}: overwritten meanwhile"
            self.disk[name] = version
            if name not in self.will_keep:
                self.memory[name] = None
            self.written[name] += 1
        elif action.kind is Kind.GATHER:
            self.full[c] = self.find(position, self.nearest(c))
        elif action.kind is Kind.STEP:
            for slot in ("param", "optim"):
                if f"c{c}:{slot}" in self.memory:
                    self.memory[f"c{c}:{slot}"] = self.find(position, f"c{c}:{slot}") + 1
        elif action.kind.is_compute:
            self.start(position)  # all is still there
            if action.kind is Kind.B and Action(Kind.SAVE, c, action.micro_batch) in self.actions:
                self.memory[self.loaded(action)] = None

    def start_load(self, position: int, action: Action) -> None:
        self.all_done(position, [Action(Kind.SAVE, action.index or 0, action.micro_batch)])
        saved = f"a{action.index}.{action.micro_batch}"
        if self.stays_on_host(action):
            assert self.memory[saved] == 1, f"{action}: it is not on the host"
        else:
            self.fill(action, saved)
        if not self.plan.unified:
            self.fill(action, f"{saved}:device")

    def end_copy(self, position: int, action: Action) -> None:
        """UP, DOWN, SAVE or LOAD."""
        c = action.index or 0
        if action.kind is Kind.UP:
            filled = {f"c{c}:device": self.find(position, f"c{c}:param")}
        elif action.kind is Kind.DOWN:
            filled = {f"c{c}:grad": action.micro_batch}
        elif action.kind is Kind.SAVE:
            filled = {f"a{c}.{action.micro_batch}": 1 if self.stays_on_host(action) else None}
        else:
            if not self.plan.unified:
                self.filling.discard(f"a{c}.{action.micro_batch}")
                self.memory[f"a{c}.{action.micro_batch}"] = None
            filled = {self.loaded(action): 1}
        self.filling -= filled.keys()
        self.memory |= filled

    def fill(self, action: Action, name: str) -> None:
        """Something new goes into a buffer: nobody may need its bytes."""
        for other in self.overlapping(self.buffers[name]):
            assert self.memory[other] is None, f"{action} overwrites {other}"
            assert other not in self.filling, f"{action}: {other} fills"
        assert self.memory[name] is None, f"{action} overwrites what is there"
        self.filling.add(name)

    def stays_on_host(self, action: Action) -> bool:
        word = self.plan.activations_of(self.shape.units[action.index or 0].unit)
        return word is Activations.OFFLOAD_HOST

    def loaded(self, action: Action) -> str:
        """Where a backward finds the activations that were away."""
        return f"a{action.index}.{action.micro_batch}" + ("" if self.plan.unified else ":device")

    def nearest(self, chunk: int) -> str:
        """Where units compute with, or gather, what this rank keeps of a chunk."""
        return f"c{chunk}:device" if self.plan.brings_up(chunk) else f"c{chunk}:param"

    def find(self, position: int, name: str) -> int:
        """The version of a slot in memory, which must be the one that the order of the program promises."""
        due = self.seen_before[position][int(name[1:].split(":")[0])]
        found = self.memory[name]
        assert found is not None, f"{self.actions[position]}: {name} is not in memory"
        assert found == due, f"{self.actions[position]} finds {name} after {found} updates instead of {due}"
        return found

    def all_done(self, position: int, actions: list[Action]) -> None:
        for action in actions:
            assert self.actions.index(action) in self.done, f"{self.actions[position]} does not wait for {action}"

    # ---- what an action is about

    def gathers(self, chunk: int) -> bool:
        return self.plan.world_size > 1 and self.plan.chunks[chunk].optimizer_sharded

    def chunks_of(self, action: Action) -> set[int]:
        """Chunks whose parameters a unit computes with, or that an action has as its subject."""
        if action.kind.is_compute:
            return {*self.shape.held, *self.shape.units[action.index or 0].chunks}
        return {action.index or 0} if action.kind in (Kind.GATHER, Kind.STEP) else set()

    def slots_of(self, action: Action) -> set[str]:
        names = {f"c{chunk}:param" for chunk in self.chunks_of(action)}
        if action.kind.is_compute:
            return {self.nearest(chunk) for chunk in self.chunks_of(action) if not self.gathers(chunk)}
        if action.kind is Kind.UP:
            return {f"c{action.index}:param"}
        if action.kind is Kind.GATHER:
            return {self.nearest(action.index or 0)}
        return names | ({f"c{action.index}:optim"} if action.kind is Kind.STEP else set())

    def makes_gradients(self, action: Action, chunk: int, micro_batch: int | None) -> bool:
        same = micro_batch is None or action.micro_batch == micro_batch
        return action.kind is Kind.B and same and chunk in self.chunks_of(action)

    def overlapping(self, buffer: Buffer) -> list[str]:
        end = buffer.start_bytes + buffer.num_bytes
        return [
            other.name
            for other in self.buffers.values()
            if other.name != buffer.name
            and other.tier == buffer.tier
            and other.start_bytes < end
            and buffer.start_bytes < other.start_bytes + other.num_bytes
        ]
