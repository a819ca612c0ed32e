"""The verifier: it takes every program that is compiled, and refuses every mutant that would run otherwise."""

import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from meaning import Broken, Machine, expected, outcome
from steps import PAGE, chain, plan_of, random_plan, random_shape, separate, with_saved

from outgrow.memory.errors import InvalidProgram, OutgrowError
from outgrow.parallel.actions import Action, Kind
from outgrow.scheduler.copies import gathered_peak
from outgrow.scheduler.ledger import Ledger
from outgrow.scheduler.passes import compile_program
from outgrow.scheduler.plan import Activations, Plan
from outgrow.scheduler.program import Instruction, Lane, Program, StepShape
from outgrow.scheduler.verify import verify

NUM_RUNS = 6  # random orders in which a mutant is played

Case = tuple[StepShape, Plan, Program]


def random_case(rng: random.Random) -> Case:
    shape = random_shape(rng)
    plan = random_plan(rng, shape)
    kind = rng.randrange(4)
    if kind == 0:
        shape = with_saved(shape, rng)
        plan = separate(rng, shape, plan)
    elif kind == 1:
        shape = with_saved(shape, rng)
        words = (Activations.KEEP, Activations.OFFLOAD_DISK, Activations.OFFLOAD_DISK)
        plan = replace(plan, activations=tuple(rng.choice(words) for _ in shape.units))
    return shape, plan, compile_program(shape, plan)


def copies_of(shape: StepShape, plan: Plan) -> dict[int, int]:
    chunks = range(len(shape.chunks)) if plan.world_size > 1 else ()
    return {c: shape.chunks[c].num_bytes for c in chunks if plan.chunks[c].parameters_sharded}


def check(case: Case, program: Program) -> None:
    """Verify `program` within the bytes that the case's own program takes."""
    shape, plan, original = case
    copies = copies_of(shape, plan)
    peak, where = gathered_peak(program, copies)
    capacity = gathered_peak(original, copies)[0]
    verify(
        program, shape, plan, [original] * (plan.world_size - 1), {"host": capacity}, {"host": Ledger(peak, where, {})}
    )


# ---- what is compiled


@pytest.mark.parametrize("seed", range(200))
def test_every_program_that_is_compiled_is_accepted_and_means_what_plain_steps_do(seed):
    rng = random.Random(seed)
    case = random_case(rng)
    shape, plan, program = case
    verify(program, shape, plan, [program] * (plan.world_size - 1), {"host": program.arena_bytes("host")})
    for _ in range(2):
        assert outcome(program, shape, plan, rng) == expected(shape, plan)


@pytest.mark.parametrize("seed", range(60))
def test_gathered_copies_are_counted_as_they_come_in_any_order(seed):
    rng = random.Random(seed)
    shape = random_shape(rng)
    plan = plan_of(shape, rng.choice(("all", "optimizer")), ranks=2, micro_batches=2, prefetch=rng.randint(0, 2))
    program = compile_program(shape, plan)
    predicted, _ = gathered_peak(program, copies_of(shape, plan))
    machine = Machine(shape, plan, rng)
    for number in range(3):
        machine.play(program if number else program.without_carried(), number)
    assert machine.most_copies <= predicted
    largest = sorted((chunk.num_bytes for chunk in shape.chunks), reverse=True)
    uses = max(len({*unit.chunks, *shape.held}) for unit in shape.units)
    assert predicted <= sum(largest[: uses * (2 + plan.prefetch)]), "no more than the plan's distance asks for"


# ---- mutants


def mutate(program: Program, rng: random.Random) -> tuple[str, Program] | None:
    """Drop, duplicate, swap or move one instruction, or drop a dependency; None where nothing changes."""
    count = len(program.instructions)
    order = list(range(count))  # old positions, in their new order
    how = rng.choice(("drop", "duplicate", "swap", "move", "forget"))
    at, to = rng.randrange(count), rng.randrange(count)
    num_carried = program.num_carried
    after = {position: set(program.instructions[position].after) for position in order}
    name = f"{how} {program.instructions[at].action} at {at}"
    if how == "drop":
        del order[at]
        num_carried -= at < num_carried
    elif how == "duplicate":
        order.insert(to, at)
        num_carried += to < num_carried
    elif how == "swap":
        order[at], order[to] = order[to], order[at]
        name += f" and {program.instructions[to].action} at {to}"
    elif how == "move":
        del order[at]
        order.insert(to, at)
        num_carried += (to < num_carried) - (at < num_carried)
        name += f" to {to}"
    elif after[at]:
        gone = rng.choice(sorted(after[at]))
        after[at].discard(gone)
        name += f" {program.instructions[gone].action} at {gone}"
    instructions: list[Instruction] = []
    places: dict[int, list[int]] = {}
    for new, old in enumerate(order):
        waits = {place for before in after[old] for place in places.get(before, ())}
        instructions.append(replace(program.instructions[old], after=tuple(sorted(waits))))
        places.setdefault(old, []).append(new)
    mutant = Program(tuple(instructions), program.buffers, num_carried)
    return None if mutant == program else (name, mutant)


def goes_wrong(case: Case, mutant: Program, rng: random.Random) -> str | None:
    """What is wrong with a mutant, as far as some random runs show it."""
    shape, plan, program = case
    collectives = [
        [a for a in p.actions() if a.kind in (Kind.GATHER, Kind.REDUCE, Kind.NORM)] for p in (program, mutant)
    ]
    if plan.world_size > 1 and collectives[0] != collectives[1]:
        return "collectives in another order than the peers'"
    wanted = expected(shape, plan)
    allowed = gathered_peak(program, copies_of(shape, plan))[0]
    for _ in range(NUM_RUNS):
        try:
            machine = Machine(shape, plan, rng)
            for number in range(2):
                machine.play(mutant if number else mutant.without_carried(), number)
                if machine.most_copies > allowed:
                    return "more copies than there is room for"
            machine.play(mutant.only_carried(), None)
            if machine.result() != wanted:
                return "another result"
        except Broken as broken:
            return str(broken)
    return None


@settings(max_examples=700, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32))
def test_mutants_that_run_otherwise_are_refused(seed):
    rng = random.Random(seed)
    case = random_case(rng)
    for _ in range(3):
        found = mutate(case[2], rng)
        if found is None:
            continue
        name, mutant = found
        try:
            check(case, mutant)
        except InvalidProgram:
            continue
        wrong = goes_wrong(case, mutant, rng)
        assert wrong is None, f"{name} was accepted: {wrong}"


# ---- refusals, in words

TWO = chain((0,), (1,))


def refusal(program: Program, shape: StepShape = TWO, plan: Plan | None = None) -> str:
    with pytest.raises(InvalidProgram) as caught:
        verify(program, shape, plan or plan_of(TWO, update="backward", prefetch=1))
    assert isinstance(caught.value, OutgrowError)
    return str(caught.value)


def two(**words: object) -> Program:
    return compile_program(TWO, plan_of(TWO, update="backward", prefetch=1, **words))  # pyright: ignore[reportArgumentType]


def without(program: Program, action: str) -> Program:
    gone = program.actions().index(Action.parse(action))
    kept = [position for position in range(len(program.instructions)) if position != gone]
    place = {old: new for new, old in enumerate(kept)}
    instructions = [program.instructions[old] for old in kept]
    rest = (replace(i, after=tuple(place[b] for b in i.after if b in place)) for i in instructions)
    return Program(tuple(rest), program.buffers, program.num_carried)


def forgetting(program: Program, action: str, before: str) -> Program:
    """The program in which one instruction no longer waits for another."""
    actions = program.actions()
    at = max(position for position, each in enumerate(actions) if str(each) == action)
    instruction = program.instructions[at]
    after = tuple(b for b in instruction.after if str(actions[b]) != before)
    assert after != instruction.after
    changed = replace(instruction, after=after)
    return replace(program, instructions=(*program.instructions[:at], changed, *program.instructions[at + 1 :]))


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("F0.0", "F1.0 at 5 on lane compute: it needs F0.0, which comes later"),
        ("B0.0", "STEP c0 at 12 on lane compute: B0.0 is missing"),
        ("READ c1:param", "F1.0 at 5 on lane compute: chunk 1 is not in memory"),
        ("WRITE c1:optim", "at the end of the step: c1:optim is left in memory"),
        ("NORM", "at the end of the step: there is no NORM"),
    ],
)
def test_what_is_missing_is_named(gone: str, words: str) -> None:
    assert words in refusal(without(two(), gone))


def test_a_missing_order_names_both_instructions_and_what_they_touch() -> None:
    text = refusal(forgetting(two(), "F1.0", "READ c1:param"))
    assert "F1.0 at 6 on lane compute: nothing orders it behind READ c1:param at 3; both touch c1:param" in text
    assert "Around it: READ c1:param, F0.0, READ c1:optim, F1.0" in text


def test_a_buffer_that_is_filled_too_early_names_who_uses_its_bytes() -> None:
    shape = chain((0,), (1,), (2,))
    plan = plan_of(shape, "parameters", update="backward")
    program = compile_program(shape, plan)
    text = refusal(forgetting(program, "READ c2:param", "DROP c1:param"), shape, plan)
    assert "nothing orders it behind" in text
    assert "which uses these bytes" in text


def test_bytes_above_a_capacity_are_refused_with_how_much_is_missing() -> None:
    program = two()
    plan = plan_of(TWO, update="backward", prefetch=1)
    need = program.arena_bytes("host")
    verify(program, TWO, plan, capacity_bytes={"host": need})
    with pytest.raises(InvalidProgram, match="the buffers on host need"):
        verify(program, TWO, plan, capacity_bytes={"host": need - 1})
    with pytest.raises(InvalidProgram, match=r"host holds 3\.00 KiB at B1\.0, 1\.00 KiB more than its 2\.00 KiB"):
        verify(program, TWO, plan, (), {"host": 2048}, {"host": Ledger(3072, "B1.0", {})})


def test_only_writes_are_carried_and_units_run_on_the_compute_lane() -> None:
    assert "only writes run into the next step" in refusal(replace(two(), num_carried=3))
    program = two()
    at = program.actions().index(Action.parse("F0.0"))
    moved = replace(program.instructions[at], lane=Lane.NET)
    assert "units run on the compute lane" in refusal(
        replace(program, instructions=(*program.instructions[:at], moved, *program.instructions[at + 1 :]))
    )


def test_what_is_read_again_before_it_was_written_is_refused() -> None:
    late = replace(without(two(), "WRITE c0:param"), num_carried=1)
    assert "c0:param was not left in memory by the step before" in refusal(late)


def test_activations_do_not_pile_up_on_their_way_to_disk() -> None:
    shape = chain((0,), (1,), (2,), (3,))
    shape = replace(shape, units=tuple(replace(unit, saved_bytes=PAGE) for unit in shape.units))
    plan = replace(plan_of(shape, "optimizer"), activations=(Activations.OFFLOAD_DISK,) * 4)
    program = compile_program(shape, plan)
    verify(program, shape, plan)
    assert "2 units' activations may still be on their way" in refusal(
        forgetting(program, "F2.0", "SAVE a0.0"), shape, plan
    )
