"""What a program computes, played in a random legal order with a name for every value: an opinion of its own.

    assert outcome(program, shape, plan, random.Random(3)) == expected(shape, plan)

Values are nested tuples: a parameter after an update is `("step", old value, gradients, ...)`. Bytes are pages that
hold values; whoever writes leaves rubbish there until it is done, and whoever reads must find the same at its beginning
and at its end. So a run that lacks an order finds rubbish, and every difference shows in the values at the end.
"""

import random
from collections.abc import Iterator
from typing import Any

from places import RUBBISH, Broken, Places
from plain_steps import STEPS, chunks_of, expected, gathers, last_unit, model_order

from outgrow.parallel.actions import Action, Kind
from outgrow.scheduler.plan import Activations, Home, MicroBatchOrder, Plan, UpdateTime
from outgrow.scheduler.program import Lane, Program, StepShape

__all__ = ["Broken", "Machine", "expected", "outcome"]


def outcome(program: Program, shape: StepShape, plan: Plan, rng: random.Random) -> dict[str, Any]:
    """What a first step, others, and the rest after the last leave. Raises `Broken`."""
    machine = Machine(shape, plan, rng)
    for number in range(STEPS):
        machine.play(program if number else program.without_carried(), number)
    machine.play(program.only_carried(), None)
    return machine.result()


class Machine(Places):
    """Memory, disk and gradients of one rank; the peers do the same."""

    def __init__(self, shape: StepShape, plan: Plan, rng: random.Random) -> None:
        super().__init__(rng)
        self.shape, self.plan = shape, plan
        self.reduces = plan.world_size > 1 or plan.precision != "float32" or not plan.unified
        self.norms: list[Any] = []
        self.will_keep: set[str] = set()  # what stays in memory after its WRITE
        self.most_copies = self.most_saved = 0
        for c, chunk in enumerate(shape.chunks):
            decision = plan.chunks[c]
            for slot, home, first in (
                ("param", decision.parameter_home, ("first", c)),
                ("optim", decision.optimizer_home, ("slots", c)),
            ):
                on_disk = home is Home.DISK and (slot == "param" or chunk.optim_bytes > 0)
                self.value[f"disk c{c}:{slot}" if on_disk else f"c{c}:{slot}"] = first

    def play(self, program: Program, step: int | None) -> None:
        self.program = program
        self.buffers = {buffer.name: buffer for buffer in program.buffers}
        self.will_keep |= program.kept
        self.gradients: dict[tuple[int, int], list[Any]] = {}  # (chunk, micro-batch) -> what units gave
        self.sums: dict[int, list[Any]] = {}
        self.norm: Any = None
        self.pending: dict[int, list[int]] = {}  # chunk -> micro-batches whose gradients lie in one place
        self.came: dict[int, list[Action]] = {}
        self.all_came: list[Action] = []
        self.norm_parts: dict[int, Any] = {}
        self.saving = 0
        queues = {lane: list(positions) for lane, positions in program.by_lane.items()}
        slowness = {lane: self.rng.choice((1, 1, 1, 40)) for lane in Lane}
        busy: dict[Lane, list[tuple[int, Iterator[None]]]] = {}
        moves = (Lane.READ, Lane.WRITE, Lane.H2D, Lane.D2H)  # they have begun the next while one ends
        done: set[int] = set()
        while queues or busy:
            choices = [("end", lane) for lane in busy] + [
                ("begin", lane)
                for lane, queue in queues.items()
                if len(busy.get(lane, ())) < 1 + (lane in moves) and set(program.instructions[queue[0]].after) <= done
            ]
            if not choices:
                raise Broken("deadlock")
            what, lane = self.rng.choices(choices, [1 / slowness[lane] for _, lane in choices])[0]
            if what == "end":
                position, work = busy[lane].pop(0)
                if not busy[lane]:
                    del busy[lane]
                for _ in work:
                    raise AssertionError("an action has two moments")
                done.add(position)
                continue
            position = queues[lane].pop(0)
            if not queues[lane]:
                del queues[lane]
            instruction = program.instructions[position]
            is_kept = instruction.action.kind is Kind.READ and not instruction.num_bytes
            work = self.keep(instruction.action) if is_kept else self.work(instruction.action)
            next(work)
            busy.setdefault(lane, []).append((position, work))
        if step is not None:
            self.end_step()

    def end_step(self) -> None:
        for m in range(self.plan.micro_batches):
            if self.came.get(m, []) != model_order(self.shape, m):
                raise Broken("the model's code runs otherwise")
        one_by_one = [a for m in range(self.plan.micro_batches) for a in model_order(self.shape, m)]
        if self.plan.order is MicroBatchOrder.SEQUENTIAL and self.all_came != one_by_one:
            raise Broken("micro-batches go one by one")
        for u in range(len(self.shape.units)):
            if [a.micro_batch for a in self.all_came if a == Action(Kind.F, u, a.micro_batch)] != list(
                range(self.plan.micro_batches)
            ):
                raise Broken("running statistics see the micro-batches in another order")
        if self.gradients or self.sums or self.norm is None:
            raise Broken("gradients are left over, or their norm was not taken")
        left = [name for name in self.value if name.startswith("full") and self.comes_and_goes(int(name.split()[1]))]
        if left or any(name.startswith(("a", "disk a")) and name[0] != "d" for name in self.value):
            raise Broken(f"left in memory: {left}")
        self.value = {n: v for n, v in self.value.items() if not n.startswith(("full", "disk a"))}
        self.norms.append(self.norm)

    def result(self) -> dict[str, Any]:
        if self.where:
            raise Broken(f"left in memory: {list(self.where)}")
        count = range(len(self.shape.chunks))
        slots = {
            slot: [self.value.get(f"disk c{c}:{slot}", self.value.get(f"c{c}:{slot}")) for c in count]
            for slot in ("param", "optim")
        }
        return {"parameters": slots["param"], "slots": slots["optim"], "norms": self.norms}

    def comes_and_goes(self, chunk: int) -> bool:
        return self.plan.chunks[chunk].parameters_sharded

    def parameters(self, unit: int) -> list[str]:
        return [f"full {c}" if gathers(c, self.plan) else self.own(c) for c in chunks_of(unit, self.shape)]

    def own(self, c: int) -> str:
        """Where this rank's part of a chunk is computed with."""
        return f"c{c}:device" if self.comes_up(c) else f"c{c}:param"

    def comes_up(self, c: int) -> bool:
        return not self.plan.unified and self.plan.chunks[c].parameter_home is not Home.DEVICE

    def goes_down(self, c: int) -> bool:
        return not self.plan.unified and self.plan.chunks[c].optimizer_home is not Home.DEVICE

    def stays_on_host(self, u: int) -> bool:
        return self.plan.activations_of(self.shape.units[u].unit) is Activations.OFFLOAD_HOST

    # ---- actions: everything before `yield` happens at the beginning, everything after it at the end

    def work(self, action: Action) -> Iterator[None]:
        return getattr(self, f"do_{action.kind.name}")(action)

    def do_F(self, action: Action) -> Iterator[None]:
        u, m = action.index or 0, action.micro_batch or 0
        self.came.setdefault(m, []).append(action)
        self.all_came.append(action)
        for _ in self.used(self.parameters(u)):
            yield
        if self.shape.units[u].has_backward:
            self.value[f"a{u}.{m}"] = ("saved", u, m)
            self.most_saved = max(self.most_saved, sum(n.startswith("a") and n not in self.where for n in self.value))

    def do_B(self, action: Action) -> Iterator[None]:
        u, m = action.index or 0, action.micro_batch or 0
        self.came.setdefault(m, []).append(action)
        self.all_came.append(action)
        names = self.parameters(u)
        saved = f"a{u}.{m}:device" if f"a{u}.{m}:device" in self.where else f"a{u}.{m}"
        found: list[Any] = []
        for values in self.used([*names, saved]):
            found = values
            if found[-1] != ("saved", u, m):
                raise Broken("activations of something else")
            self.touch_gradients(u, m)
            yield
        for c in chunks_of(u, self.shape):
            if self.shape.chunks[c].trainable:
                self.gradients.setdefault((c, m), []).append((u, tuple(found[:-1])))
                self.touch_gradients(u, m)
        self.close(saved)

    def touch_gradients(self, u: int, m: int) -> None:
        """Where gradients are summed elsewhere, those of one micro-batch alone may lie in the parameters' `.grad`."""
        for c in chunks_of(u, self.shape):
            if self.reduces and self.shape.chunks[c].trainable and last_unit(c, self.shape) == u:
                others = [n for chunk, n in self.gradients if chunk == c and n < m and self.is_complete(c, n)]
                if others:
                    raise Broken(f"gradients of micro-batches {others} and {m} run together")

    def is_complete(self, c: int, m: int) -> bool:
        users = [u for u, unit in enumerate(self.shape.units) if unit.has_backward and c in chunks_of(u, self.shape)]
        return len(self.gradients.get((c, m), [])) == len(users)

    def gradient(self, c: int, m: int) -> list[Any]:
        given = self.gradients.pop((c, m), [])
        return [("gradient", c, m, tuple(sorted(given)))] if given else []

    def do_REDUCE(self, action: Action) -> Iterator[None]:
        c, m = action.index or 0, action.micro_batch or 0
        if self.goes_down(c):
            found: list[Any] = []
            for values in self.used([f"c{c}:grad"]):
                found = values
                yield
            self.close(f"c{c}:grad")
            if found[0][:2] != ("down", m):
                raise Broken("gradients of another micro-batch")
            self.sums.setdefault(c, []).extend(found[0][2])
            self.norm_parts[c] = tuple(self.sums[c])
            return
        before = list(self.gradients.get((c, m), []))
        yield
        if self.gradients.get((c, m), []) != before:
            raise Broken("gradients come while they are summed")
        ended = len(self.came.get(m, [])) == len(model_order(self.shape, m))
        if c in self.shape.held and not ended:
            raise Broken("gradients are summed before they are complete")
        self.sums.setdefault(c, []).extend(self.gradient(c, m))
        self.norm_parts[c] = tuple(self.sums[c])

    def do_DOWN(self, action: Action) -> Iterator[None]:
        c, m = action.index or 0, action.micro_batch or 0
        self.open(f"c{c}:grad")
        before = list(self.gradients.get((c, m), []))
        yield
        ended = len(self.came.get(m, [])) == len(model_order(self.shape, m))
        if self.gradients.get((c, m), []) != before or (c in self.shape.held and not ended):
            raise Broken("gradients come while they are taken away")
        self.put(f"c{c}:grad", ("down", m, tuple(self.gradient(c, m))))

    def do_UP(self, action: Action) -> Iterator[None]:
        c = action.index or 0
        self.open(f"c{c}:device")
        for found in self.used([f"c{c}:param"]):
            yield
            self.put(f"c{c}:device", found[0])

    def step_gradients(self, c: int) -> tuple[Any, ...]:
        if not self.reduces:
            order = sorted(m for chunk, m in self.gradients if chunk == c)
            self.sums[c] = [g for m in order for g in self.gradient(c, m)]
        return tuple(self.sums.pop(c, []))

    def do_NORM(self, action: Action) -> Iterator[None]:
        trainable = [c for c, chunk in enumerate(self.shape.chunks) if chunk.trainable]
        single = self.plan.world_size == 1
        if single and self.plan.update is UpdateTime.AFTER and not self.reduces:
            parts = {
                c: tuple(
                    ("gradient", c, m, tuple(sorted(g)))
                    for (chunk, m), g in sorted(self.gradients.items())
                    if chunk == c
                )
                for c in trainable
            }
        elif single and self.plan.update is UpdateTime.AFTER:
            parts = {c: tuple(self.sums.get(c, [])) for c in trainable}
        else:
            parts = {c: self.norm_parts.get(c, ()) for c in trainable}
        yield
        if any(len(self.came.get(m, [])) < len(model_order(self.shape, m)) for m in range(self.plan.micro_batches)):
            raise Broken("the norm is taken before the loss is known")
        if self.norm is not None:
            raise Broken("a second norm")
        self.norm = ("norm", tuple(parts[c] for c in trainable))

    def do_STEP(self, action: Action) -> Iterator[None]:
        c = action.index or 0
        names = [f"c{c}:param"] + [f"c{c}:optim"] * (
            self.shape.chunks[c].optim_bytes > 0 or f"c{c}:optim" in self.value
        )
        found = [self.look(name) for name in names]
        if any(RUBBISH in str(value) for value in found):
            raise Broken("an update of rubbish")
        gradients = self.step_gradients(c)
        if self.plan.clips_gradients and self.norm is None:
            raise Broken("clipping needs the norm")
        for name in names:
            self.put(name, (RUBBISH, self.rng.random()))
        if f"c{c}:device" in self.where:
            raise Broken("a copy on the device misses the update")
        if f"full {c}" in self.value:  # ranks of one machine share their copies
            self.value[f"full {c}"] = (RUBBISH, self.rng.random())
        yield
        old_slots = found[1] if len(found) > 1 else None
        self.put(names[0], ("step", found[0], old_slots, gradients, self.norm if self.plan.clips_gradients else None))
        if len(found) > 1:
            self.put(names[1], ("slots", old_slots, gradients))
        if self.plan.world_size == 1 and self.plan.update is UpdateTime.BACKWARD:
            self.norm_parts[c] = gradients

    def do_GATHER(self, action: Action) -> Iterator[None]:
        c = action.index or 0
        if f"full {c}" in self.value and self.comes_and_goes(c):
            raise Broken("gathered twice")
        for found in self.used([self.own(c)]):
            self.value[f"full {c}"] = (RUBBISH, self.rng.random())
            copies = [int(name.split()[1]) for name in self.value if name.startswith("full")]
            alive = sum(self.shape.chunks[chunk].num_bytes for chunk in copies if self.comes_and_goes(chunk))
            self.most_copies = max(self.most_copies, alive)
            yield
            self.value[f"full {c}"] = found[0]

    def do_READ(self, action: Action) -> Iterator[None]:
        name = f"c{action.index}:{action.slot}"
        if f"disk {name}" not in self.value:
            raise Broken(f"{name} is not at home on disk")
        self.open(name)
        yield
        self.put(name, self.look(f"disk {name}"))

    def do_WRITE(self, action: Action) -> Iterator[None]:
        name = f"c{action.index}:{action.slot}"
        for found in self.used([name]):
            self.value[f"disk {name}"] = (RUBBISH, self.rng.random())
            yield
            self.value[f"disk {name}"] = found[0]
        if name not in self.will_keep:
            self.close(name)

    def keep(self, action: Action) -> Iterator[None]:
        """A READ of what is there."""
        name = f"c{action.index}:{action.slot}"
        value = self.look(name)
        if name not in self.will_keep or RUBBISH in str(value):
            raise Broken(f"{name} was not kept")
        yield

    def do_DROP(self, action: Action) -> Iterator[None]:
        if action.slot is None:
            self.close(f"full {action.index}")
        else:
            name = f"c{action.index}:{action.slot}"
            if name not in self.where:
                raise Broken(f"{name} is not there")
            self.close(name)
        yield

    def do_SAVE(self, action: Action) -> Iterator[None]:
        """To disk, or to the host: there they stay in the buffer."""
        u = action.index or 0
        name, on_host = f"a{u}.{action.micro_batch}", not self.plan.unified and self.stays_on_host(u)
        value = self.look(name)
        if name in self.where or f"disk {name}" in self.value:
            raise Broken("it was away already")
        self.open(name)
        self.put(name, value)
        del self.value[name]
        yield
        if self.look(name) != value:
            raise Broken(f"{name} is overwritten on its way")
        if not on_host:
            self.value[f"disk {name}"] = value
            self.close(name)

    def do_LOAD(self, action: Action) -> Iterator[None]:
        """From disk, or from the host; to where the unit computes."""
        name = f"a{action.index}.{action.micro_batch}"
        target = name if self.plan.unified else f"{name}:device"
        if name in self.value:
            raise Broken(f"{name} is not away")
        on_host = name in self.where
        value = self.look(name if on_host else f"disk {name}")
        if not on_host:
            self.open(name)
        if target != name:
            self.open(target)
        yield
        if on_host and self.look(name) != value:
            raise Broken(f"{name} was overwritten")
        self.put(target, value)
        if target != name:
            self.close(name)
