from outgrow.parallel.actions import Action
from outgrow.scheduler.pipeline_data import StageCosts, loop
from outgrow.scheduler.pipeline_timing import simulate
from outgrow.scheduler.pipelines import NAMES, schedule
from outgrow.scheduler.stage_memory import StageMemory, open_micro_batches

MEMORY = StageMemory(
    1000,
    (frozenset({"a"}), frozenset({"a", "b"}), frozenset({"c"})),
    {"a": 100.0, "b": 10.0, "c": 1.0},
    (5, 6, 7),
    (0, 2, 0),
    (20, 40, 30),
)


def test_what_ranks_hold_is_the_peak_of_the_schedule():
    for name in NAMES:
        for ranks, count in ((2, 3), (4, 8)):
            order = schedule(name, ranks, count)
            stages = range(order.num_stages)
            saved = tuple(3 + stage % 4 for stage in stages)
            nothing = {"": 0.0}
            memory = StageMemory(
                0, (frozenset({""}),) * len(stages), nothing, saved, (0,) * len(stages), (0,) * len(stages)
            )
            costs = StageCosts.of_stages([1.0] * len(stages), [1.0] * len(stages), [1.0] * len(stages), saved)
            spans = [(stage, stage + 1) for stage in stages]
            if not name.startswith("pipeoffload"):
                assert tuple(memory.needs(order).ranks(spans)) == simulate(order, costs).peak_activations
            for stage in stages:
                assert (
                    memory.needs(order).alone(stage, spans[stage])
                    <= memory.needs(order).ranks(spans)[order.placement[stage]]
                )


def test_the_fullest_moments_of_an_order():
    words = ["F0.0", "F0.1", "I0.0", "F1.0", "W0.0", "B1.0", "I0.1", "W0.1"]
    order = [Action.parse(word) for word in words]
    assert open_micro_batches(order, 2) == [((2, 1), (1, 0))]
    copied = [Action.parse(word) for word in ("F0.0", "SAVE a0.0", "F1.0", "B1.0", "LOAD a0.0", "B0.0")]
    assert open_micro_batches(copied, 2, copies=True) == [((1, 0), (0, 0)), ((0, 1), (0, 0))]
    assert open_micro_batches(copied[:1] + copied[2:4] + copied[5:], 2) == [((1, 1), (0, 0))]


def test_shared_parameters_count_once_and_stages_of_a_rank_work_in_turns():
    needs = MEMORY.needs(schedule("1f1b", 2, 4))
    assert needs.alone(0, (0, 2)) == 110 + 2 * 11 + 40
    assert needs.alone(1, (2, 3)) == 1 + 7 + 30
    assert needs.ranks([(0, 2), (2, 3)]) == [172, 38]
    split = MEMORY.needs(schedule("zb-h1", 2, 4))
    assert split.alone(1, (1, 2)) == 110 + 2 * 6 + 2 * 2 + 40  # two that wait for their weights' gradients
    assert MEMORY.room_bytes(loop(2), [(0, 2), (2, 3)]) == (1000 - 110 - 40, 1000 - 1 - 30)
