"""Moves between disk and host, on the text form; then against the optimum, by search and by ALGORITHMS' table."""

import random
from dataclasses import replace

import pytest
from steps import PAGE, chain, plan_of, random_plan, random_shape, read, text

from outgrow.parallel.actions import Action, Kind
from outgrow.scheduler.moves import Item, add_moves, items_of, num_moved_bytes, optimum_moved_bytes
from outgrow.scheduler.passes import add_gathers, add_reduces, add_updates, order_micro_batches, prefetch
from outgrow.scheduler.plan import Plan
from outgrow.scheduler.program import StepShape

THREE = chain((0,), (1,), (2,))


def before_moves(shape: StepShape, plan: Plan) -> list[Action]:
    actions = order_micro_batches(shape, plan.micro_batches, plan.order)
    if plan.world_size > 1:
        actions = add_reduces(prefetch(add_gathers(actions, shape, plan), plan.prefetch), shape)
    return add_updates(actions, shape, plan.update)


def check(shape: StepShape, expected: str, **words: object) -> None:
    plan = plan_of(shape, **words)  # pyright: ignore[reportArgumentType]
    assert text(add_moves(before_moves(shape, plan), shape, plan).actions) == text(read(expected))


# ---- one rank


def test_updates_after_the_backward_read_everything_again():
    check(
        THREE,
        """READ c0:param, F0.0, READ c1:param, F1.0, READ c2:param, F2.0, B2.0, DROP c2:param, B1.0, DROP c1:param, B0.0
        NORM, READ c0:optim, STEP c0, WRITE c0:param, WRITE c0:optim
        READ c1:param, READ c1:optim, STEP c1, WRITE c1:param, WRITE c1:optim
        READ c2:param, READ c2:optim, STEP c2, WRITE c2:param, WRITE c2:optim""",
    )


def test_updates_inside_the_backward_find_the_parameters_there():
    check(
        THREE,
        """READ c0:param, F0.0, DROP c0:param, READ c1:param, F1.0, DROP c1:param, READ c2:param, F2.0, B2.0
        READ c2:optim, STEP c2, WRITE c2:param, WRITE c2:optim
        READ c1:param, B1.0, READ c1:optim, STEP c1, WRITE c1:param, WRITE c1:optim
        READ c0:param, B0.0, READ c0:optim, STEP c0, WRITE c0:param, WRITE c0:optim, NORM""",
        update="backward",
    )


@pytest.mark.parametrize(
    ("distance", "expected"),
    [
        (
            1,
            """READ c0:param, READ c1:param, F0.0, DROP c0:param, READ c2:param, F1.0, READ c2:optim, F2.0, B2.0
            STEP c2, WRITE c2:param, WRITE c2:optim, READ c1:optim, B1.0
            READ c0:param, STEP c1, WRITE c1:param, WRITE c1:optim
            READ c0:optim, B0.0, STEP c0, WRITE c0:param, WRITE c0:optim, NORM""",
        ),
        (
            2,
            """READ c0:param, READ c1:param, READ c2:param, F0.0, READ c2:optim, F1.0, F2.0, B2.0, READ c1:optim
            STEP c2, WRITE c2:param, WRITE c2:optim, B1.0, READ c0:optim, STEP c1, WRITE c1:param, WRITE c1:optim
            B0.0, STEP c0, WRITE c0:param, WRITE c0:optim, NORM""",
        ),
        (
            3,
            """READ c0:param, READ c1:param, READ c2:param, READ c2:optim, F0.0, F1.0, READ c1:optim, F2.0, B2.0
            STEP c2, WRITE c2:param, WRITE c2:optim, READ c0:optim, B1.0, STEP c1, WRITE c1:param, WRITE c1:optim
            B0.0, STEP c0, WRITE c0:param, WRITE c0:optim, NORM""",
        ),
    ],
)
def test_prefetch_reads_so_many_uses_ahead(distance, expected):
    check(THREE, expected, update="backward", prefetch=distance)


def test_a_tied_chunk_stays_where_its_next_use_is_near():
    check(
        chain((0,), (1,), (2, 0)),
        """READ c0:param, F0.0, READ c1:param, F1.0, DROP c1:param, READ c2:param, F2.0, B2.0, DROP c0:param
        READ c2:optim, STEP c2, WRITE c2:param, WRITE c2:optim
        READ c1:param, B1.0, READ c1:optim, STEP c1, WRITE c1:param, WRITE c1:optim
        READ c0:param, B0.0, READ c0:optim, STEP c0, WRITE c0:param, WRITE c0:optim, NORM""",
        update="backward",
    )


def test_a_held_chunk_is_there_for_every_unit():
    check(
        chain((1,), (2,), held=(0,)),
        """READ c0:param, READ c1:param, F0.0, DROP c1:param, READ c2:param, F1.0, B1.0, DROP c2:param
        READ c1:param, B0.0, NORM, STEP c0, WRITE c0:param, STEP c1, WRITE c1:param
        READ c2:param, STEP c2, WRITE c2:param""",
        on_disk="parameters",
    )


def test_frozen_chunks_are_dropped_and_never_written():
    check(
        chain((0,), (1,), (2,), frozen=(0, 1), no_backward=(0,)),
        """READ c0:param, F0.0, DROP c0:param, READ c1:param, F1.0, READ c2:param, F2.0, B2.0, B1.0, DROP c1:param, NORM
        READ c2:optim, STEP c2, WRITE c2:param, WRITE c2:optim""",
    )


def test_micro_batches_one_after_the_other_read_again_what_did_not_fit():
    check(
        THREE,
        """READ c0:param, F0.0, DROP c0:param, READ c1:param, F1.0, READ c2:param, F2.0, B2.0, DROP c2:param, B1.0
        READ c0:param, B0.0, F0.1, DROP c0:param, F1.1, READ c2:param, F2.1, B2.1, DROP c2:param, B1.1
        READ c0:param, B0.1, NORM, STEP c0, WRITE c0:param, STEP c1, WRITE c1:param
        READ c2:param, STEP c2, WRITE c2:param""",
        on_disk="parameters",
        micro_batches=2,
        cache_bytes=2 * PAGE,
    )


def test_micro_batches_that_take_turns_are_one_use_and_read_once():
    check(
        THREE,
        """READ c0:param, READ c1:param, F0.0, F0.1, DROP c0:param, READ c2:param, F1.0, F1.1
        READ c2:optim, F2.0, B2.0, F2.1, B2.1, STEP c2, WRITE c2:param, WRITE c2:optim
        READ c1:optim, B1.0, B1.1, READ c0:param, STEP c1, WRITE c1:param, WRITE c1:optim
        READ c0:optim, B0.0, B0.1, STEP c0, WRITE c0:param, WRITE c0:optim, NORM""",
        micro_batches=2,
        order="by-unit",
        update="backward",
        prefetch=1,
    )


def test_the_optimizer_alone_is_read_for_updates_only():
    check(
        THREE,
        """F0.0, F1.0, F2.0, B2.0, B1.0, B0.0, NORM, READ c0:optim, READ c1:optim, STEP c0, WRITE c0:optim
        READ c2:optim, STEP c1, WRITE c1:optim, STEP c2, WRITE c2:optim""",
        on_disk="optimizer",
        prefetch=1,
    )


def test_an_optimizer_without_slots_has_nothing_to_move_and_its_update_is_no_use_of_its_own():
    check(
        chain((0,), (1,), slots=0),
        """READ c0:param, READ c1:param, F0.0, F1.0, B1.0, STEP c1, WRITE c1:param
        B0.0, STEP c0, WRITE c0:param, NORM""",
        update="backward",
        prefetch=1,
    )


def test_with_room_for_everything_each_chunk_is_read_once_a_step():
    for micro_batches, order in ((1, "sequential"), (3, "sequential"), (3, "by-unit")):
        plan = plan_of(THREE, micro_batches=micro_batches, order=order, cache_bytes=1 << 30, prefetch=1)
        actions = add_moves(before_moves(THREE, plan), THREE, plan).actions
        assert num_moved_bytes(actions, THREE) == {Kind.READ: 9 * PAGE, Kind.WRITE: 9 * PAGE}
        assert not [action for action in actions if action.kind is Kind.DROP]


def test_what_is_being_written_is_read_again_only_when_its_use_has_come():
    plan = plan_of(THREE, prefetch=2, cache_bytes=1 << 30)
    moved = add_moves(read("STEP c0, F1.0, F0.0"), THREE, plan)
    assert text(moved.actions) == text(
        read(
            """READ c0:param, READ c0:optim, READ c1:param, STEP c0, WRITE c0:param, WRITE c0:optim
            F1.0, DROP c1:param, READ c0:param, F0.0, DROP c0:param"""
        )
    )


# ---- several ranks


def test_on_several_ranks_a_gather_reads_the_shard_and_needs_it_no_longer():
    check(
        chain((0,), (1,)),
        """READ c0:param, GATHER c0.0, DROP c0:param, F0.0, READ c1:param, GATHER c1.0, DROP c0.0, F1.0, B1.0
        REDUCE c1.0, READ c1:optim, STEP c1, WRITE c1:param, WRITE c1:optim
        READ c0:param, GATHER c0.0, DROP c1.0, B0.0, REDUCE c0.0
        READ c0:optim, STEP c0, WRITE c0:param, WRITE c0:optim, DROP c0.0, NORM""",
        ranks=2,
        update="backward",
    )


def test_ranks_that_share_nothing_read_what_they_compute_with():
    check(
        chain((0,), (1,)),
        """READ c0:param, F0.0, READ c1:param, F1.0, B1.0, DROP c1:param, REDUCE c1.0, B0.0, REDUCE c0.0, NORM
        READ c0:optim, STEP c0, WRITE c0:param, WRITE c0:optim
        READ c1:param, READ c1:optim, STEP c1, WRITE c1:param, WRITE c1:optim""",
        ranks=2,
        sharded=False,
    )


# ---- lifetimes


def test_a_buffer_is_taken_from_its_read_to_its_drop_or_until_its_write_had_its_time():
    plan = plan_of(THREE, update="backward", prefetch=1)
    moved = add_moves(before_moves(THREE, plan), THREE, plan)
    spans = {
        name: [(str(moved.actions[first]), str(moved.actions[last])) for first, last in lifetimes]
        for name, lifetimes in moved.lifetimes.items()
    }
    assert spans == {
        "c0:param": [("READ c0:param", "DROP c0:param"), ("READ c0:param", "NORM")],
        "c1:param": [("READ c1:param", "B0.0")],  # one use more after its update
        "c2:param": [("READ c2:param", "B1.0")],
        "c0:optim": [("READ c0:optim", "NORM")],
        "c1:optim": [("READ c1:optim", "B0.0")],
        "c2:optim": [("READ c2:optim", "B1.0")],
    }


@pytest.mark.parametrize("seed", range(150))
def test_lifetimes_cover_every_use_and_end_with_the_last(seed):
    rng = random.Random(seed)
    shape = random_shape(rng)
    plan = random_plan(rng, shape)
    moved = add_moves(before_moves(shape, plan), shape, plan)
    kept = [a for a in moved.actions if a.kind not in (Kind.READ, Kind.WRITE) and a.slot is None]
    assert kept == before_moves(shape, plan), "moves change nothing else"
    for name, spans in moved.lifetimes.items():
        chunk, slot = name[1:].split(":")
        mine = Item(int(chunk), slot)
        move = {kind: Action(kind, mine.chunk, None, slot) for kind in (Kind.READ, Kind.DROP, Kind.WRITE)}
        uses = {p for p, action in enumerate(moved.actions) if mine in items_of(action, shape, plan)}
        assert sum(action == move[Kind.READ] for action in moved.actions) == len(spans)
        for (first, last), following in zip(spans, [*spans[1:], (len(moved.actions), 0)], strict=True):
            assert moved.actions[first] == move[Kind.READ]
            inside = {p for p in uses if first < p <= last}
            assert inside, "read for nothing"
            if moved.actions[last] == move[Kind.DROP]:
                between = moved.actions[max(inside) + 1 : last]
                assert all(action.kind is Kind.DROP for action in between), "dropped later than need be"
            else:
                assert move[Kind.WRITE] in moved.actions[max(inside) : last + 1]
            assert not [p for p in uses if last < p < following[0]], "used while it is away"


# ---- against the optimum


@pytest.mark.parametrize("seed", range(120))
def test_without_prefetch_and_with_equal_sizes_no_step_can_read_less(seed):
    rng = random.Random(seed)
    shape = equal_sizes(random_shape(rng))
    plan = replace(random_plan(rng, shape), world_size=1, prefetch=0, micro_batches=rng.randint(1, 2))
    actions = before_moves(shape, plan)
    least = max((PAGE * len(items_of(action, shape, plan)) for action in actions), default=0)
    capacity = least + rng.randint(0, 2) * PAGE
    moved = add_moves(actions, shape, replace(plan, cache_bytes=capacity))
    reads = num_moved_bytes(moved.actions, shape)[Kind.READ]
    assert reads == optimum_moved_bytes(actions, shape, plan, capacity)


@pytest.mark.parametrize("seed", range(60))
def test_no_plan_reads_less_than_the_optimum(seed):
    rng = random.Random(1000 + seed)
    shape = random_shape(rng)
    plan = replace(random_plan(rng, shape), micro_batches=1)
    actions = before_moves(shape, plan)
    moved = add_moves(actions, shape, plan)
    taken = peak_bytes(moved.lifetimes, dict(enumerate(shape.chunks)))
    assert num_moved_bytes(moved.actions, shape)[Kind.READ] >= optimum_moved_bytes(actions, shape, plan, taken)
    once = sum(
        use.param_bytes * (f"c{c}:param" in moved.lifetimes) + use.optim_bytes * (f"c{c}:optim" in moved.lifetimes)
        for c, use in enumerate(shape.chunks)
    )
    assert num_moved_bytes(moved.actions, shape)[Kind.READ] >= once


def equal_sizes(shape: StepShape) -> StepShape:
    uses = (replace(use, param_bytes=PAGE, optim_bytes=PAGE * (use.optim_bytes > 0)) for use in shape.chunks)
    return replace(shape, chunks=tuple(uses))


def peak_bytes(lifetimes, chunks) -> int:
    sizes = {name: chunk_bytes(name, chunks) for name in lifetimes}
    positions = {p for spans in lifetimes.values() for p, _ in spans}
    return max(
        (sum(sizes[n] for n, spans in lifetimes.items() if any(a <= p <= b for a, b in spans)) for p in positions),
        default=0,
    )


def chunk_bytes(name, chunks) -> int:
    chunk, slot = name[1:].split(":")
    return chunks[int(chunk)].param_bytes if slot == "param" else chunks[int(chunk)].optim_bytes


FORWARD = list(range(8))
BACKWARD = FORWARD[::-1]


@pytest.mark.parametrize(
    ("trace", "num_reads"),
    [
        ((FORWARD + BACKWARD) * 3, 28),
        ((FORWARD + BACKWARD + BACKWARD) * 3, 40),
        ((FORWARD + BACKWARD + FORWARD) * 3, 40),
        (([8, *FORWARD, 8, 8, *BACKWARD, 8]) * 3, 34),
        (FORWARD * 4 + BACKWARD * 4, 36),
        (FORWARD * 2, 12),
    ],
    ids=["zigzag", "sweep backward", "sweep ascending", "tied", "accumulation", "cyclic"],
)
def test_four_chunks_of_memory_need_the_reads_of_the_table(trace, num_reads):
    """ALGORITHMS 2.6, column OPT: 8 chunks (9 with a tied one), of which 4 fit."""
    shape = chain(*((c,) for c in range(9)), frozen=tuple(range(9)))
    actions = [Action(Kind.F, unit, moment) for moment, unit in enumerate(trace)]
    moved = add_moves(actions, shape, plan_of(shape, cache_bytes=4 * PAGE))
    assert sum(action.kind is Kind.READ for action in moved.actions) == num_reads
