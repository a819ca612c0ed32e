"""Pipelines beside other plans: floors rule out, prices are played, every layout has its fate."""

from dataclasses import replace
from math import inf

import pytest

from outgrow.memory.errors import DoesNotFit
from outgrow.scheduler.cost import TimeProfile
from outgrow.scheduler.cost import UnitSeconds as AloneSeconds
from outgrow.scheduler.hardware import NetFigures
from outgrow.scheduler.layout_choice import (
    Layout,
    LayoutFigures,
    Priced,
    beside_pipelines,
    choose_layout,
    floor_seconds,
    pipeline_layouts,
    pipeline_seconds,
    with_recompute,
)
from outgrow.scheduler.plan import ChunkPlan, Plan
from outgrow.scheduler.prediction import Fate
from outgrow.scheduler.stage_choice import UnitSeconds, choose_stages, schedule_of

PLAN = Plan(1, 0, 4, "float32", False, 1, (ChunkPlan(),))
TWO = Layout(2, 1, 4)
RUNS = (UnitSeconds(1.0, 1.0, 1.0, 2.0),) * 4  # F, I, W, B
FIGURES = LayoutFigures(
    RUNS, (0, 1), (8, 8, 8, 8), tuple(frozenset({f"p{run}"}) for run in range(4)), {f"p{run}": 10 for run in range(4)},
    send_bytes_per_s=inf, update_elems_per_s=10.0,
)  # fmt: skip


def seconds(name: str, layout: Layout = TWO, figures: LayoutFigures = FIGURES, zero: int = 0) -> float:
    pipeline = choose_stages(name, layout.num_ranks, layout.micro_batches, figures.runs, hosts=figures.hosts)
    order = schedule_of(pipeline, layout.micro_batches)
    return pipeline_seconds(layout, replace(PLAN, pipeline=pipeline, zero=zero), order, figures)


def test_pipelines_divide_the_ranks_and_have_no_more_stages_than_units() -> None:
    asked: list[tuple[int, int]] = []

    def counts(num_ranks: int, num_data: int) -> list[int]:
        asked.append((num_ranks, num_data))
        return [4, 8]

    found = pipeline_layouts(8, 5, counts)
    assert asked == [(2, 4), (4, 2)]
    assert found == [Layout(2, 4, 4), Layout(2, 4, 8), Layout(4, 2, 4), Layout(4, 2, 8)]
    assert [each.words for each in found[1:3]] == [
        "4 pipelines of 2 ranks, 8 micro-batches",
        "2 pipelines of 4 ranks, 4 micro-batches",
    ]


def test_a_step_of_1f1b_is_work_and_bubble_and_updates() -> None:
    work_s, bubble_s, update_s = 4 * 2 * 3.0, 2 * 3.0, 20 / 10.0
    assert seconds("1f1b") == pytest.approx(work_s + bubble_s + update_s)


def test_what_is_sent_takes_time_and_ranks_of_one_machine_gain_by_each_others_waiting() -> None:
    slow = replace(FIGURES, send_bytes_per_s=8.0)
    assert seconds("1f1b", figures=slow) >= seconds("1f1b") + 4 * 1.0, "a message a micro-batch, at least one way"
    alone = UnitSeconds(0.5, 0.5, 0.5, 1.0)
    together = replace(FIGURES, runs=tuple(replace(run, alone=alone) for run in RUNS), hosts=(0, 0))
    assert seconds("1f1b", figures=together) == pytest.approx(24.0 + 2.0), "a bubble leaves its cores to the other rank"


def test_pipelines_beside_each_other_exchange_gradients_and_share_updates() -> None:
    net = NetFigures(40.0, 1.0, 80.0, 0.5)
    layout, figures = Layout(2, 2, 4), replace(FIGURES, net=net)
    base_s = seconds("1f1b") - 2.0
    reduce_s = 4 * (0.5 + 80 / 80.0)
    assert seconds("1f1b", layout, figures, 0) == pytest.approx(base_s + 2.0 + reduce_s)
    assert seconds("1f1b", layout, figures, 1) == pytest.approx(base_s + 1.0 + reduce_s + (1 + 80 / 40.0))
    assert seconds("1f1b", layout, figures, 3) == pytest.approx(base_s + 1.0 + reduce_s + 8 * (1 + 80 / 40.0))
    shared = replace(figures, shares_parameters=True)
    assert seconds("1f1b", layout, shared, 3) == pytest.approx(base_s + 1.0 + reduce_s)


@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "interleaved", "zb-v", "auto"])
def test_no_schedule_is_below_the_floor(name: str) -> None:
    times = TimeProfile(tuple(AloneSeconds(1.0, 2.0, 1.0, 1.0) for _ in RUNS))
    floor_s = floor_seconds(TWO, times, 40, 10.0)
    assert floor_s == pytest.approx(4 * 12.0 / 2 + 2.0)
    assert seconds(name) >= floor_s - 1e-9
    alone = UnitSeconds(0.5, 0.5, 0.5, 1.0)
    figures = replace(FIGURES, runs=tuple(replace(run, alone=alone) for run in RUNS), hosts=(0, 0))
    assert seconds(name, figures=figures) >= floor_s - 1e-9, "also where ranks are faster while others wait"


def test_recomputing_counts_to_the_backward() -> None:
    again = with_recompute(UnitSeconds(1.0, 2.0, 3.0, 4.0, UnitSeconds(0.5, 1.0, 1.5, 2.0)))
    assert again == UnitSeconds(1.0, 3.0, 3.0, 5.0, UnitSeconds(0.5, 1.5, 1.5, 2.5))


def choice(best_s: float, floors: dict[int, float], prices: dict[str, float | Exception]):
    asked: list[tuple[int, str]] = []

    def floor(layout: Layout) -> float:
        return floors[layout.num_ranks]

    def priced(layout: Layout, name: str) -> Priced:
        asked.append((layout.num_ranks, name))
        price = prices[name]
        if isinstance(price, Exception):
            raise price
        return Priced(PLAN, price, 7, f"{layout.words}, {name}")

    layouts = [Layout(size, 4 // size, 4) for size in floors]
    return *choose_layout(best_s, layouts, floor, priced, tuple(prices)), asked


def test_a_floor_that_is_too_high_spares_the_rest() -> None:
    best, fates, asked = choice(10.0, {2: 12.0, 4: 9.9}, {"1f1b": 1.0})
    assert best is None
    assert asked == []
    assert [fate.fate for fate in fates] == [
        "slower by at least 20%",
        "faster by 1.0% at the very most, no more than a prediction can tell",
    ]


def test_the_fastest_is_taken_the_simplest_of_those_alike_and_what_does_not_fit_says_so() -> None:
    prices = {"1f1b": 8.1, "zb-v": 8.0, "auto": DoesNotFit("too much"), "interleaved": 9.0}
    best, fates, _ = choice(10.0, {4: 5.0}, prices)
    assert best is not None
    assert best.words.endswith("1f1b")
    said = {fate.words.rsplit(", ", 1)[1]: fate.fate for fate in fates}
    assert said == {
        "1f1b": "chosen",
        "zb-v": "faster by 1.2%, no more than a prediction can tell",
        "interleaved": "slower by 11%",
        "auto": "refused: too much",
    }
    every = beside_pipelines([Fate("zero=3", 10.0, 0, "chosen"), Fate("zero=0", None, 0, "refused: x")], fates, best)
    assert every[0].fate == "chosen"
    assert [fate.fate for fate in every if fate.words == "zero=3"] == ["slower by 23%"]
    assert [fate.seconds is None for fate in every] == sorted(fate.seconds is None for fate in every)


def test_one_that_is_not_faster_by_more_than_a_prediction_tells_is_left_and_any_is_taken_where_nothing_else_fits() -> (
    None
):
    best, fates, _ = choice(10.0, {4: 5.0}, {"1f1b": 9.9})
    assert best is None
    assert [fate.fate for fate in fates] == ["faster by 1.0%, no more than a prediction can tell"]
    best, fates, _ = choice(inf, {4: 5.0}, {"1f1b": 99.0})
    assert best is not None
    assert [fate.fate for fate in fates] == ["chosen"]
