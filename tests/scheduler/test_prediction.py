"""Predictions: what a simulation and ledgers say, placed in time, and their text."""

import json
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import chain, plan_of, random_plan, random_shape

from outgrow.parallel.actions import Kind
from outgrow.scheduler.ledger import Ledger
from outgrow.scheduler.passes import compile_program
from outgrow.scheduler.prediction import Fate, Prediction, TierPrediction, spans_by_position
from outgrow.scheduler.program import Instruction
from outgrow.scheduler.simulate import Simulated, Work, simulate

SECONDS = {Kind.F: 1.0, Kind.B: 2.0, Kind.STEP: 0.5, Kind.READ: 0.25, Kind.WRITE: 0.25}
FATES = (Fate("everything in memory", 1.5, 100, "chosen"), Fate("all on disk", None, 300, "refused: 100 B too much"))


def cost(instruction: Instruction) -> Work:
    return Work(SECONDS.get(instruction.action.kind, 0.0))


def small(budgets: dict[str, int]) -> tuple[Prediction, Simulated, Ledger]:
    """Two units whose state is on disk, updated in the backward pass; bytes by hand."""
    shape = chain((0,), (1,))
    plan = plan_of(shape, update="backward")
    program = compile_program(shape, plan)
    simulated = simulate(program, cost)
    sizes = {"F0.0": 10, "F1.0": 20, "B1.0": 50, "STEP c1": 40, "B0.0": 30, "STEP c0": 5}
    levels = tuple((n, sizes[str(i.action)]) for n, i in enumerate(program.instructions) if str(i.action) in sizes)
    held = Ledger(50, "B1.0", {"state": 45, "process": 5}, levels)
    return Prediction.of(program, shape, simulated, {"host": held}, budgets, FATES), simulated, held


def test_bytes_lie_where_their_actions_begin() -> None:
    found, simulated, _ = small({"host": 64})
    begins = {span.action: span.start_s for span in simulated.timeline.spans}
    (host,) = found.tiers
    assert (host.tier, host.peak_bytes, host.budget_bytes, host.where) == ("host", 50, 64, "B1.0")
    assert host.levels[0] == (0.0, 10), "before the first forward, which waits for the disk, as much as in it"
    order = ("F1.0", "B1.0", "STEP c1", "B0.0", "STEP c0")
    assert dict(host.levels[1:]) == {begins[word]: size for word, size in zip(order, (20, 50, 40, 30, 5), strict=True)}
    assert found.seconds == simulated.seconds
    assert found.units == ("u0", "u1")
    assert found.timeline.peak_bytes == {"host": 50}
    assert found.stalled_s("compute") == sum(simulated.stalls_s["compute"].values()) > 0
    assert found.stalled_s("no such lane") == 0


def test_a_tier_without_a_budget_says_so() -> None:
    assert small({})[0].tiers[0].budget_bytes is None


def test_actions_that_take_no_time_show_the_most_of_them() -> None:
    shape = chain((0,), (1,))
    program = compile_program(shape, plan_of(shape, update="backward"))
    levels = tuple((n, 7 + n % 2) for n, i in enumerate(program.instructions) if i.action.kind is Kind.F)
    found = Prediction.of(
        program, shape, simulate(program, lambda _: Work(0.0)), {"host": Ledger(9, "", {}, levels)}, {}
    )
    assert found.tiers[0].levels == ((0.0, max(size for _, size in levels)),)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_the_text_of_any_prediction_gives_the_same_one_back(seed: int) -> None:
    rng = random.Random(seed)
    shape = random_shape(rng)
    program = compile_program(shape, random_plan(rng, shape))
    simulated = simulate(program, lambda _: Work(rng.choice((0.0, rng.random() / 3))))
    levels = tuple((n, rng.randrange(1000)) for n in range(len(program.instructions)) if rng.random() < 0.5)
    ledgers = {"host": Ledger(1000, "B0.0", {"state": 3}, levels), "device": Ledger(7, "", {}, ())}
    found = Prediction.of(program, shape, simulated, ledgers, {"host": rng.randrange(10)}, FATES)
    found = replace(found, took_s={"searching": rng.random()})
    again = Prediction.from_json(found.to_json())
    assert again == found
    assert again.took_s == found.took_s
    spans = spans_by_position(program, found.timeline)
    assert sorted(spans) == list(range(len(program.instructions)))
    assert all(spans[n].action == str(i.action) for n, i in enumerate(program.instructions))


def test_other_texts_are_refused() -> None:
    text = small({"host": 64})[0].to_json()
    fields = json.loads(text)
    with pytest.raises(ValueError, match=r"version 1, and only version 2 can be read: use the version"):
        Prediction.from_json(json.dumps(fields | {"version": 1}))
    with pytest.raises(ValueError, match="version None"):
        Prediction.from_json("{}")
    with pytest.raises(ValueError, match="this is no prediction: Expecting"):
        Prediction.from_json("plan")
    with pytest.raises(ValueError, match="this is no prediction: AttributeError"):
        Prediction.from_json("[]")
    with pytest.raises(ValueError, match="this is no prediction: KeyError: 'spans'"):
        Prediction.from_json(json.dumps({name: value for name, value in fields.items() if name != "spans"}))
    with pytest.raises(ValueError, match="no span"):
        Prediction.from_json(json.dumps(fields | {"spans": [["compute", "F0.0", 2.0, 1.0, 0]]}))
    with pytest.raises(ValueError, match="no span"):
        Prediction.from_json(json.dumps(fields | {"spans": [["compute", "F0.0"]]}))


def test_levels_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="begin at second 0 and go forward"):
        TierPrediction("host", 10, None, ((1.0, 5),))
    with pytest.raises(ValueError, match="begin at second 0 and go forward"):
        TierPrediction("host", 10, None, ((0.0, 5), (2.0, 5), (1.0, 5)))
    with pytest.raises(ValueError, match="between 0 and its peak of 10 bytes"):
        TierPrediction("host", 10, None, ((0.0, 11),))


def test_a_timeline_of_another_program_is_refused() -> None:
    shape = chain((0,), (1,))
    program = compile_program(shape, plan_of(shape))
    other = compile_program(shape, plan_of(shape, micro_batches=2))
    with pytest.raises(ValueError, match="no timeline of this program: lane"):
        spans_by_position(other, simulate(program, cost).timeline)


def test_a_ledger_without_figures_for_actions_shows_its_peak_all_the_time() -> None:
    shape = chain((0,))
    program = compile_program(shape, plan_of(shape))
    prediction = Prediction.of(program, shape, simulate(program, cost), {"device": Ledger(9, "F0.0", {})}, {})
    assert prediction.tiers[0].levels == ((0.0, 9),)
