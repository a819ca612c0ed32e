"""Every pass alone, on the text form, for a chain of three units; then what holds for whole programs."""

import itertools

import pytest

from outgrow.parallel.actions import Action, Kind
from outgrow.scheduler.link import link
from outgrow.scheduler.moves import MovedActions
from outgrow.scheduler.passes import (
    add_gathers,
    add_reduces,
    add_updates,
    compile_program,
    order_micro_batches,
    prefetch,
)
from outgrow.scheduler.plan import ChunkPlan, GatheredFor, Plan
from outgrow.scheduler.program import ChunkUse, Lane, Program, StepShape, UnitUse, actions_from

DECISIONS = {
    0: ChunkPlan(),
    1: ChunkPlan(optimizer_sharded=True),
    2: ChunkPlan(gradients_sharded=True, optimizer_sharded=True),
    3: ChunkPlan(GatheredFor.USE, True, True),
    "pass": ChunkPlan(GatheredFor.PASS, True, True),
}


def plan_of(zero: int | str, ranks: int = 2, micro_batches: int = 1, clips: bool = False, distance: int = 0) -> Plan:
    stage = 3 if zero == "pass" else int(zero)
    return Plan(ranks, stage, micro_batches, "float32", clips, distance, (DECISIONS[zero],) * 5)


def shape_of(
    *units: tuple[int, ...],
    held: tuple[int, ...] = (),
    frozen: tuple[int, ...] = (),
    no_backward: tuple[int, ...] = (),
    num_chunks: int = 0,
) -> StepShape:
    """Units by the chunks that they use; chunk c has 100 + c bytes."""
    num_chunks = max([num_chunks, *(c + 1 for unit in units for c in unit), *(c + 1 for c in held)])
    uses = tuple(UnitUse(f"u{i}", chunks, i not in no_backward) for i, chunks in enumerate(units))
    return StepShape(uses, tuple(ChunkUse(100 + c, c not in frozen) for c in range(num_chunks)), held)


CHAIN = shape_of((0,), (1,), (2,))
TIED = shape_of((0,), (1,), (2, 0))  # the last unit uses the first one's chunk too
HELD = shape_of((1,), (2,), (3,), held=(0,))


def ordered(shape: StepShape, micro_batches: int = 1) -> list[Action]:
    return order_micro_batches(shape, micro_batches)


def read(text: str) -> list[Action]:
    return actions_from(text.replace("\n", ",").strip(" ,").split(","))


def check(found: list[Action], expected: str) -> None:
    assert [str(action) for action in found] == [str(action) for action in read(expected)]


# ---- the order of micro-batches


def test_forward_through_the_chain_then_backward_for_each_micro_batch():
    check(ordered(CHAIN, 2), "F0.0, F1.0, F2.0, B2.0, B1.0, B0.0, F0.1, F1.1, F2.1, B2.1, B1.1, B0.1")


def test_units_without_backward_have_none():
    check(ordered(shape_of((0,), (1,), (2,), no_backward=(0, 1))), "F0.0, F1.0, F2.0, B2.0")


# ---- gathers


def test_zero_3_gathers_before_every_use_and_drops_after_it_but_for_the_turning_point():
    check(
        add_gathers(ordered(CHAIN), CHAIN, plan_of(3)),
        """GATHER c0.0, F0.0, DROP c0.0, GATHER c1.0, F1.0, DROP c1.0, GATHER c2.0, F2.0, B2.0, DROP c2.0
        GATHER c1.0, B1.0, DROP c1.0, GATHER c0.0, B0.0, DROP c0.0""",
    )


def test_zero_3_keeps_the_first_chunk_from_one_micro_batch_to_the_next():
    check(
        add_gathers(ordered(shape_of((0,), (1,)), 2), shape_of((0,), (1,)), plan_of(3)),
        """GATHER c0.0, F0.0, DROP c0.0, GATHER c1.0, F1.0, B1.0, DROP c1.0, GATHER c0.0, B0.0
        F0.1, DROP c0.1, GATHER c1.1, F1.1, B1.1, DROP c1.1, GATHER c0.1, B0.1, DROP c0.1""",
    )


@pytest.mark.parametrize("zero", [1, 2])
def test_zero_1_and_2_gather_once_a_step_and_never_drop(zero):
    check(
        add_gathers(ordered(CHAIN, 2), CHAIN, plan_of(zero)),
        """GATHER c0, F0.0, GATHER c1, F1.0, GATHER c2, F2.0, B2.0, B1.0, B0.0
        F0.1, F1.1, F2.1, B2.1, B1.1, B0.1""",
    )


def test_zero_0_gathers_nothing():
    assert add_gathers(ordered(CHAIN, 2), CHAIN, plan_of(0)) == ordered(CHAIN, 2)


def test_gathered_for_a_pass_lives_from_forward_to_the_end_of_the_micro_batch():
    check(
        add_gathers(ordered(CHAIN, 2), CHAIN, plan_of("pass")),
        """GATHER c0.0, F0.0, GATHER c1.0, F1.0, GATHER c2.0, F2.0, B2.0, B1.0, B0.0, DROP c0.0, DROP c1.0, DROP c2.0
        GATHER c0.1, F0.1, GATHER c1.1, F1.1, GATHER c2.1, F2.1, B2.1, B1.1, B0.1, DROP c0.1, DROP c1.1, DROP c2.1""",
    )


def test_a_tied_chunk_is_gathered_wherever_it_is_used():
    check(
        add_gathers(ordered(TIED), TIED, plan_of(3)),
        """GATHER c0.0, F0.0, DROP c0.0, GATHER c1.0, F1.0, DROP c1.0, GATHER c2.0, GATHER c0.0, F2.0, B2.0
        DROP c0.0, DROP c2.0, GATHER c1.0, B1.0, DROP c1.0, GATHER c0.0, B0.0, DROP c0.0""",
    )


def test_a_held_chunk_stays_from_the_first_action_of_a_micro_batch_to_its_last():
    held = shape_of((1,), (2,), held=(0,))
    check(
        add_gathers(ordered(held, 2), held, plan_of(3)),
        """GATHER c0.0, GATHER c1.0, F0.0, DROP c1.0, GATHER c2.0, F1.0, B1.0, DROP c2.0, GATHER c1.0, B0.0, DROP c0.0
        GATHER c0.1, F0.1, DROP c1.1, GATHER c2.1, F1.1, B1.1, DROP c2.1, GATHER c1.1, B0.1, DROP c0.1, DROP c1.1""",
    )


def test_a_unit_without_backward_is_not_gathered_again():
    shape = shape_of((0,), (1,), frozen=(0,), no_backward=(0,))
    check(
        add_gathers(ordered(shape), shape, plan_of(3)),
        "GATHER c0.0, F0.0, DROP c0.0, GATHER c1.0, F1.0, B1.0, DROP c1.0",
    )


def test_chunks_may_be_treated_unlike():
    decisions = (DECISIONS[3], DECISIONS[1], DECISIONS[0])
    plan = Plan(2, 3, 1, "float32", False, 0, decisions)
    check(
        add_gathers(ordered(CHAIN), CHAIN, plan),
        """GATHER c0.0, F0.0, DROP c0.0, GATHER c1, F1.0, F2.0, B2.0, B1.0, GATHER c0.0, B0.0, DROP c0.0""",
    )


# ---- reductions and updates


def test_gradients_are_reduced_after_the_backward_that_completes_them_in_every_micro_batch():
    check(
        add_reduces(ordered(CHAIN, 2), CHAIN),
        """F0.0, F1.0, F2.0, B2.0, REDUCE c2.0, B1.0, REDUCE c1.0, B0.0, REDUCE c0.0
        F0.1, F1.1, F2.1, B2.1, REDUCE c2.1, B1.1, REDUCE c1.1, B0.1, REDUCE c0.1""",
    )


def test_a_tied_chunk_is_reduced_after_its_last_backward():
    check(
        add_reduces(ordered(TIED), TIED),
        "F0.0, F1.0, F2.0, B2.0, REDUCE c2.0, B1.0, REDUCE c1.0, B0.0, REDUCE c0.0",
    )


def test_held_and_unused_chunks_are_reduced_at_the_end_of_the_backward():
    shape = shape_of((1,), (2,), held=(0,), num_chunks=4)
    check(
        add_reduces(ordered(shape, 2), shape),
        """F0.0, F1.0, B1.0, REDUCE c2.0, B0.0, REDUCE c1.0, REDUCE c0.0, REDUCE c3.0
        F0.1, F1.1, B1.1, REDUCE c2.1, B0.1, REDUCE c1.1, REDUCE c0.1, REDUCE c3.1""",
    )


def test_the_end_of_the_backward_is_behind_the_last_drop_too():
    shape = shape_of((1,), held=(0,))
    check(
        add_reduces(add_gathers(ordered(shape), shape, plan_of(3)), shape),
        "GATHER c0.0, GATHER c1.0, F0.0, B0.0, REDUCE c1.0, REDUCE c0.0, DROP c0.0, DROP c1.0",
    )


def test_frozen_chunks_are_neither_reduced_nor_updated():
    shape = shape_of((0,), (1,), frozen=(0,))
    check(
        add_updates(add_reduces(ordered(shape), shape), shape),
        "F0.0, F1.0, B1.0, REDUCE c1.0, B0.0, NORM, STEP c1",
    )


def test_a_trainable_chunk_of_a_unit_without_backward_is_reduced_at_the_end():
    shape = shape_of((0,), (1,), no_backward=(0,))
    check(add_reduces(ordered(shape), shape), "F0.0, F1.0, B1.0, REDUCE c1.0, REDUCE c0.0")


def test_the_norm_and_all_updates_come_last():
    check(add_updates(read("F0.0, B0.0"), CHAIN), "F0.0, B0.0, NORM, STEP c0, STEP c1, STEP c2")


# ---- prefetch

GATHERED = add_gathers(ordered(CHAIN), CHAIN, plan_of(3))


def test_distance_0_changes_nothing():
    assert prefetch(GATHERED, 0) == read(
        # up to the compute action before, past what is none
        """GATHER c0.0, F0.0, GATHER c1.0, DROP c0.0, F1.0, GATHER c2.0, DROP c1.0, F2.0, B2.0
        GATHER c1.0, DROP c2.0, B1.0, GATHER c0.0, DROP c1.0, B0.0, DROP c0.0"""
    )


def test_distance_1_gathers_a_chunk_one_unit_ahead():
    check(
        prefetch(GATHERED, 1),
        """GATHER c0.0, GATHER c1.0, F0.0, GATHER c2.0, DROP c0.0, F1.0, DROP c1.0, F2.0, GATHER c1.0, B2.0
        GATHER c0.0, DROP c2.0, B1.0, DROP c1.0, B0.0, DROP c0.0""",
    )


def test_a_gather_never_passes_a_drop_of_its_own_chunk_or_another_gather():
    check(
        prefetch(GATHERED, 99),
        """GATHER c0.0, GATHER c1.0, GATHER c2.0, F0.0, DROP c0.0, F1.0, DROP c1.0, GATHER c1.0, GATHER c0.0
        F2.0, B2.0, DROP c2.0, B1.0, DROP c1.0, B0.0, DROP c0.0""",
    )


# ---- lanes and dependencies


def waits(program: Program) -> list[tuple[str, str, list[str]]]:
    actions = program.actions()
    return [(str(i.action), str(i.lane), [str(actions[before]) for before in i.after]) for i in program.instructions]


def test_a_whole_program_of_two_ranks_by_hand():
    shape = shape_of((0,), (1,))
    program = compile_program(shape, plan_of(3))
    assert waits(program) == [
        ("GATHER c0.0", "net", []),
        ("F0.0", "compute", ["GATHER c0.0"]),
        ("GATHER c1.0", "net", ["F0.0"]),
        ("DROP c0.0", "compute", ["GATHER c0.0", "F0.0"]),
        ("F1.0", "compute", ["GATHER c1.0"]),
        ("B1.0", "compute", ["GATHER c1.0", "F1.0"]),
        ("REDUCE c1.0", "net", ["B1.0"]),
        ("GATHER c0.0", "net", ["DROP c0.0", "B1.0"]),
        ("DROP c1.0", "compute", ["GATHER c1.0", "F1.0", "B1.0"]),
        ("B0.0", "compute", ["F0.0", "GATHER c0.0"]),
        ("REDUCE c0.0", "net", ["B0.0"]),
        ("DROP c0.0", "compute", ["GATHER c0.0", "B0.0"]),
        ("NORM", "net", ["REDUCE c1.0", "B0.0", "REDUCE c0.0"]),
        ("STEP c0", "compute", ["GATHER c0.0", "GATHER c0.0", "REDUCE c0.0", "DROP c0.0"]),
        ("STEP c1", "compute", ["GATHER c1.0", "REDUCE c1.0", "DROP c1.0"]),
    ]
    sizes = {str(i.action): i.num_bytes for i in program.instructions if i.num_bytes}
    assert sizes == {"GATHER c0.0": 100, "GATHER c1.0": 101, "REDUCE c0.0": 100, "REDUCE c1.0": 101}


def test_with_clipping_updates_wait_for_the_norm():
    program = waits(compile_program(CHAIN, plan_of(3, clips=True)))
    steps = [after for action, _, after in program if action.startswith("STEP")]
    assert len(steps) == 3
    assert all("NORM" in after for after in steps)


def test_on_one_rank_there_is_no_net_lane_and_nothing_to_gather_or_reduce():
    program = compile_program(CHAIN, plan_of(0, ranks=1, micro_batches=2))
    assert {i.lane for i in program.instructions} == {Lane.COMPUTE}
    check(
        program.actions(),
        """F0.0, F1.0, F2.0, B2.0, B1.0, B0.0, F0.1, F1.1, F2.1, B2.1, B1.1, B0.1
        NORM, STEP c0, STEP c1, STEP c2""",
    )


def test_on_one_rank_in_bf16_gradients_are_still_summed_in_float32():
    plan = Plan(1, 0, 1, "bf16", False, 1, (ChunkPlan(),) * 3)
    program = compile_program(CHAIN, plan)
    assert {i.lane for i in program.instructions} == {Lane.COMPUTE}
    check(program.actions(Kind.REDUCE), "REDUCE c2.0, REDUCE c1.0, REDUCE c0.0")


def test_an_action_that_no_pass_makes_is_our_own_mistake():
    with pytest.raises(AssertionError, match=r"R0\.0"):
        link(MovedActions(read("R0.0"), {}), CHAIN, plan_of(3))


# ---- what holds for every program

SHAPES = {
    "chain": CHAIN,
    "tied": TIED,
    "held": HELD,
    "tied and held": shape_of((0, 1), (2,), (1, 3), held=(0,)),
    "frozen": shape_of((0,), (1,), (2,), frozen=(0, 1), no_backward=(0,)),
    "twice": shape_of((0,), (1,), (1,), (0,)),
    "unused": shape_of((0,), (1,), num_chunks=3),
}
EVERY = [
    pytest.param(shape, plan_of(zero, ranks, micro_batches, clips, distance), id=f"{name}-{zero}-{ranks}-{distance}")
    for (name, shape), zero, (ranks, micro_batches, clips), distance in itertools.product(
        SHAPES.items(), [0, 1, 2, 3, "pass"], [(1, 2, True), (2, 1, False), (3, 2, True)], [0, 1, 3]
    )
    if ranks > 1 or zero == 0
]


def before(program: Program) -> list[set[int]]:
    """For every position: all that is certainly done when it starts (its dependencies, theirs, and the rest of its
    lane)."""
    done: list[set[int]] = []
    last_of_lane: dict[Lane, int] = {}
    for position, instruction in enumerate(program.instructions):
        direct = {*instruction.after}
        if instruction.lane in last_of_lane:
            direct.add(last_of_lane[instruction.lane])
        done.append(direct.union(*(done[p] for p in direct)))
        last_of_lane[instruction.lane] = position
    return done


@pytest.mark.parametrize(("shape", "plan"), EVERY)
def test_every_use_has_its_data_whatever_the_timing(shape, plan):
    program = compile_program(shape, plan)
    done = before(program)
    actions = program.actions()
    gathered: dict[int, int | None] = {}
    for position, action in enumerate(actions):
        c = action.index
        if action.kind is Kind.GATHER:
            gathered[c] = position
        elif action.kind is Kind.DROP:
            uses = [p for p, a in enumerate(actions[:position]) if a.kind.is_compute and c in needs(shape, a)]
            assert set(uses) <= done[position], f"{action} does not wait for all uses"
            gathered[c] = None
        elif action.kind.is_compute:
            for chunk in needs(shape, action):
                if plan.world_size > 1 and plan.chunks[chunk].optimizer_sharded:
                    place = gathered.get(chunk)
                    assert place is not None, f"{action} uses c{chunk}, which is not gathered"
                    assert place in done[position], f"{action} does not wait for {actions[place]}"
        elif action.kind is Kind.REDUCE:
            makers = [
                p
                for p, a in enumerate(actions)
                if a.kind is Kind.B and c in needs(shape, a) and a.micro_batch == action.micro_batch
            ]
            assert set(makers) <= done[position], f"{action} does not wait for every backward of its chunk"
        elif action.kind is Kind.STEP:
            reduces = [p for p, a in enumerate(actions) if a.kind is Kind.REDUCE and a.index == c]
            assert set(reduces) <= done[position], f"{action} does not wait for the sums"
            assert len(reduces) == (plan.micro_batches if plan.world_size > 1 else 0)
            if plan.clips_gradients:
                assert actions.index(Action(Kind.NORM)) in done[position]
        elif action.kind is Kind.NORM:
            reduces = [p for p, a in enumerate(actions) if a.kind is Kind.REDUCE]
            assert set(reduces) <= done[position]


def needs(shape: StepShape, action: Action) -> set[int]:
    assert action.index is not None
    return {*shape.held, *shape.units[action.index].chunks}


@pytest.mark.parametrize(("shape", "plan"), EVERY)
def test_each_chunk_is_updated_once_and_nothing_gathered_for_a_use_is_left_over(shape, plan):
    program = compile_program(shape, plan)
    assert sorted(a.index or 0 for a in program.actions(Kind.STEP)) == [
        c for c, use in enumerate(shape.chunks) if use.trainable
    ]
    held: set[int | None] = set()
    for action in program.actions():
        if action.kind is Kind.GATHER:
            assert action.index not in held, "gathered twice without a drop"
            held.add(action.index)
        elif action.kind is Kind.DROP:
            held.remove(action.index)
    assert held <= {c for c, decision in enumerate(plan.chunks) if decision.gathered_for is GatheredFor.STEP}


def test_collectives_are_in_the_same_order_whatever_a_rank_does():
    """The net lane is the part of a program that all ranks must agree on: it is a function of shape and plan alone."""
    first, second = (compile_program(TIED, plan_of(3, micro_batches=2, distance=1)) for _ in range(2))
    assert first == second
    assert [str(first.actions()[p]) for p in first.by_lane[Lane.NET]][-1] == "NORM"
