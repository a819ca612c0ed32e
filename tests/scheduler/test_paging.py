"""How far ahead moves come, and what is put off where memory for them is bounded; on the text form."""

import random
from dataclasses import replace

import pytest
from steps import PAGE, chain, plan_of, random_plan, random_shape, read, text, with_saved

from outgrow.memory.arena import most_alive_bytes
from outgrow.parallel.actions import Action, Kind
from outgrow.scheduler.moves import MovedActions, add_moves, items_of
from outgrow.scheduler.paging import item_bytes
from outgrow.scheduler.passes import add_saves, add_updates, compile_program, order_micro_batches
from outgrow.scheduler.plan import Activations, Plan
from outgrow.scheduler.program import StepShape
from outgrow.scheduler.verify import verify

THREE = chain((0,), (1,), (2,))
SAVED = replace(THREE, units=tuple(replace(unit, saved_bytes=2 * PAGE) for unit in THREE.units))


def moved_of(shape: StepShape, plan: Plan) -> MovedActions:
    actions = add_updates(order_micro_batches(shape, plan.micro_batches, plan.order), shape, plan.update)
    return add_moves(add_saves(actions, shape, plan), shape, plan)


def offloaded(shape: StepShape, **words: object) -> Plan:
    plan = plan_of(shape, update="backward", **words)  # pyright: ignore[reportArgumentType]
    return replace(plan, activations=(Activations.OFFLOAD_DISK,) * len(shape.units))


def test_what_is_needed_last_is_read_later_where_it_does_not_fit():
    plan = plan_of(THREE, update="backward", prefetch=2, cache_bytes=3 * PAGE)
    assert text(moved_of(THREE, plan).actions) == text(
        read(
            """READ c0:param, READ c1:param, READ c2:param, F0.0, DROP c0:param, F1.0, DROP c1:param, F2.0, B2.0
            READ c2:optim, STEP c2, WRITE c2:param, WRITE c2:optim, READ c1:param, READ c1:optim, B1.0
            STEP c1, WRITE c1:param, WRITE c1:optim
            READ c0:param, READ c0:optim, B0.0, STEP c0, WRITE c0:param, WRITE c0:optim, NORM"""
        )
    )


def test_activations_come_back_as_early_as_there_is_room_for_them():
    def loads(cache_pages: int) -> dict[str, str]:
        """LOAD -> the compute action or update before which it begins."""
        moved = moved_of(SAVED, offloaded(SAVED, prefetch=2, cache_bytes=cache_pages * PAGE))
        found: dict[str, str] = {}
        waiting: list[str] = []
        for action in moved.actions:
            if action.kind is Kind.LOAD:
                waiting.append(str(action))
            elif action.kind.is_compute or action.kind is Kind.STEP:
                found |= dict.fromkeys(waiting, str(action))
                waiting = []
        return found

    assert loads(0) == loads(100) == loads(8) == {"LOAD a1.0": "F2.0", "LOAD a0.0": "B2.0"}
    assert loads(7) == {"LOAD a1.0": "B2.0", "LOAD a0.0": "STEP c1"}
    assert loads(5) == {"LOAD a1.0": "B1.0", "LOAD a0.0": "B0.0"}
    assert loads(1) == {"LOAD a1.0": "B1.0", "LOAD a0.0": "B0.0"}, "never later than it is needed"


def test_a_buffer_that_is_being_written_goes_to_what_comes_next_before_that_is_put_off():
    def end(cache_pages: int) -> str:
        """The last action in which what the first update changed has its buffer."""
        moved = moved_of(THREE, plan_of(THREE, update="backward", prefetch=2, cache_bytes=cache_pages * PAGE))
        return str(moved.actions[moved.lifetimes["c2:optim"][-1][1]])

    assert end(8) == "WRITE c1:optim"
    assert end(7) == "B1.0"
    assert end(5) == "WRITE c2:optim"


def test_activations_that_are_nothing_beside_others_stay():
    sizes = (PAGE, 2000 * PAGE, 2 * PAGE)
    units = tuple(replace(use, saved_bytes=size) for use, size in zip(SAVED.units, sizes, strict=True))
    shape = replace(SAVED, units=units)
    moved = moved_of(shape, offloaded(shape))
    assert text([a for a in moved.actions if a.kind in (Kind.SAVE, Kind.LOAD)]) == ["SAVE a1.0", "LOAD a1.0"]
    larger = replace(shape, units=(replace(shape.units[0], saved_bytes=2 * PAGE), *shape.units[1:]))
    assert Kind.SAVE in [a.kind for a in moved_of(larger, offloaded(larger)).actions][:4], "a thousandth is worth it"


@pytest.mark.parametrize("seed", range(150))
def test_bounded_moves_take_no_more_than_the_bound_or_what_one_action_needs(seed):
    rng = random.Random(seed)
    shape = with_saved(random_shape(rng), rng)
    plan = replace(random_plan(rng, shape), world_size=1, prefetch=rng.randint(0, 4))
    words = tuple(rng.choice((Activations.KEEP, Activations.OFFLOAD_DISK)) for _ in shape.units)
    plan = replace(plan, activations=words, cache_bytes=rng.randint(1, 16) * PAGE)
    program = compile_program(shape, plan)
    verify(program, shape, plan)
    moved = moved_of(shape, plan)
    sizes, lifetimes = with_saved_buffers(moved, shape)
    needed = max((need_bytes(place, moved.actions, shape, plan) for place in range(len(moved.actions))), default=0)
    # What was read ahead beside one unit's activations stays where the next unit's are larger.
    larger = max((unit.saved_bytes for unit in shape.units if plan.moves_activations(unit.unit)), default=0)
    assert most_alive_bytes(sizes, lifetimes) <= max(plan.cache_bytes, needed) + larger
    wide = {str(a) for a in moved_of(shape, replace(plan, cache_bytes=1 << 30)).actions if a.kind is Kind.LOAD}
    assert {str(a) for a in moved.actions if a.kind is Kind.LOAD} == wide, "each comes back once"


def with_saved_buffers(moved: MovedActions, shape: StepShape):
    """Sizes and lifetimes of all buffers: those of activations lie around SAVE, and from LOAD to the backward pass."""
    lifetimes = dict(moved.lifetimes)
    sizes = {name: _item_bytes(name, shape) for name in lifetimes}
    place = {action: at for at, action in enumerate(moved.actions)}
    for at, action in enumerate(moved.actions):
        if action.kind in (Kind.SAVE, Kind.LOAD):
            assert action.index is not None
            later = (x for x in range(at + 1, len(moved.actions)) if moved.actions[x].kind.is_compute)
            end = next(later) if action.kind is Kind.SAVE else place[replace(action, kind=Kind.B)]
            lifetimes[str(action)] = [(at, end)]
            sizes[str(action)] = shape.units[action.index].saved_bytes
    return sizes, lifetimes


def need_bytes(at: int, actions: list[Action], shape: StepShape, plan: Plan) -> int:
    """What must be there during an action: what it uses, what it or the one before saves, what it gets back."""
    action = actions[at]
    used = sum(item_bytes(item, shape) for item in items_of(action, shape, plan))
    if not action.kind.is_compute:
        return used
    assert action.index is not None
    before = [a for a in actions[:at] if a.kind.is_compute or a.kind is Kind.SAVE][-1:]
    behind = [a for a in actions[at + 1 :] if a.kind.is_compute or a.kind is Kind.SAVE][:1]
    saves = [shape.units[a.index].saved_bytes for a in before + behind if a.kind is Kind.SAVE and a.index is not None]
    back = Action(Kind.LOAD, action.index, action.micro_batch) in actions and action.kind is Kind.B
    return used + max(saves, default=0) + shape.units[action.index].saved_bytes * back


def _item_bytes(name: str, shape: StepShape) -> int:
    chunk, slot = name[1:].split(":")
    use = shape.chunks[int(chunk)]
    return use.optim_bytes if slot == "optim" else use.param_bytes
