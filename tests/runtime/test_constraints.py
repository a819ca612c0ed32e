"""Words about memory: which there are, which go together, and the plan that follows from them."""

import re
from dataclasses import replace

import pytest
import torch

from outgrow.memory.budget import Memory
from outgrow.memory.chunk import layout_chunk
from outgrow.runtime.constraints import Constraints
from outgrow.scheduler.plan import Activations, GatheredFor, Home, MicroBatchOrder, Plan, UpdateTime, plan_for_zero

LAYOUTS = [layout_chunk(i, f"u{i}", [(f"p{i}", torch.empty(3))], torch.float32, True) for i in range(3)]
DISK = Memory(disk="/scratch")
APART = Memory(device="1GiB", unified=False)


def applied(zero: int = 0, ranks: int = 1, clips: bool = False, **words: object) -> Plan:
    plan = plan_for_zero(LAYOUTS, zero, ranks, 2, clips_gradients=clips)
    return Constraints(**words).applied(plan, 3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("words", "memory", "clips", "micro_batches", "message"),
    [
        ({"offload": "cloud"}, DISK, False, 1, "offload='cloud': there is 'none', 'host', 'optimizer', 'all'"),
        ({"offload": "host"}, DISK, False, 1, "offload='host' has no effect where device and host are the same bytes"),
        ({}, Memory(device="1GiB"), False, 1, "has no effect: this machine has no accelerator"),
        ({}, Memory(unified=False), False, 1, "Memory(unified=False) needs the device's budget"),
        ({"order": "zigzag"}, DISK, False, 2, "order='zigzag': there is 'sequential', 'by-unit'"),
        ({"update": "never"}, DISK, False, 1, "update='never': there is 'after', 'backward'"),
        ({"activations": "forget"}, DISK, False, 1, "activations='forget': there is 'keep', 'recompute'"),
        ({"activations": ["keep", "forget", "keep"]}, DISK, False, 1, "activations='forget'"),
        ({"activations": ["keep", "keep"]}, DISK, False, 1, "activations gives 2 words, and the model has 3 units"),
        ({"offload": "all"}, Memory(), False, 1, "offload='all' needs a disk: give memory=Memory(disk="),
        ({"offload": "optimizer"}, Memory(host="1GiB"), False, 1, "offload='optimizer' needs a disk"),
        ({"activations": "offload:disk"}, Memory(), False, 1, "activations='offload:disk' needs a disk"),
        ({"update": "backward"}, DISK, True, 1, "update='backward' cannot be with clip_grad_norm"),
        ({"order": "by-unit"}, DISK, False, 1, "order='by-unit' has no effect with micro_batches=1"),
    ],
)
def test_words_that_cannot_hold_are_refused(words, memory, clips, micro_batches, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Constraints(**words).check(memory, 3, clips, micro_batches)


@pytest.mark.parametrize(
    ("words", "memory", "clips", "micro_batches"),
    [
        ({}, Memory(), True, 1),
        ({"offload": "none"}, Memory(), True, 1),
        ({"offload": "all", "update": "after"}, DISK, True, 1),
        ({"offload": "all", "update": "backward", "order": "by-unit"}, DISK, False, 2),
        ({"activations": "offload:host"}, Memory(), False, 1),
        ({"offload": "host"}, APART, False, 1),
        ({}, APART, True, 1),
        ({"activations": ["keep", "recompute", "offload:disk"]}, DISK, False, 1),
    ],
)
def test_words_that_go_together_are_accepted(words, memory, clips, micro_batches):
    Constraints(**words).check(memory, 3, clips, micro_batches)


def test_what_is_open_stays_as_it_is():
    assert applied() == plan_for_zero(LAYOUTS, 0, 1, 2)
    open_ = Constraints(order="by-unit").open(DISK)
    assert (open_.homes, open_.activations, open_.order, open_.update) == (True, True, False, True)
    assert not Constraints().open(Memory()).homes, "without a disk nothing can go there"
    assert not Constraints(offload="none").open(DISK).homes
    assert (Constraints().open(APART).homes, Constraints().open(APART).disk) == (True, False)


@pytest.mark.parametrize(
    ("offload", "parameters", "slots", "update"),
    [
        ("none", Home.HOST, Home.HOST, UpdateTime.AFTER),
        ("optimizer", Home.HOST, Home.DISK, UpdateTime.BACKWARD),
        ("all", Home.DISK, Home.DISK, UpdateTime.BACKWARD),
    ],
)
def test_offload_sets_homes_and_updates_in_the_backward_where_nothing_waits_for_the_norm(
    offload, parameters, slots, update
):
    plan = applied(offload=offload)
    assert {(chunk.parameter_home, chunk.optimizer_home) for chunk in plan.chunks} == {(parameters, slots)}
    assert plan.update is update
    assert applied(offload=offload, clips=True).update is UpdateTime.AFTER
    assert applied(offload=offload, update="after").update is UpdateTime.AFTER
    assert plan.uses_disk is (offload != "none")


@pytest.mark.parametrize(
    ("offload", "homes"),
    [
        ("none", (Home.DEVICE, Home.DEVICE)),
        ("host", (Home.HOST, Home.HOST)),
        ("optimizer", (Home.HOST, Home.DISK)),
        ("all", (Home.DISK, Home.DISK)),
    ],
)
def test_homes_where_the_device_has_memory_of_its_own(offload: str, homes: tuple[Home, Home]) -> None:
    plan = replace(plan_for_zero(LAYOUTS, 0, 1), unified=False)
    plan = Constraints(offload=offload).applied(plan, 3)
    assert {(chunk.parameter_home, chunk.optimizer_home) for chunk in plan.chunks} == {homes}


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_parameters_on_disk_have_no_gathered_copy_that_stays(zero):
    plan = applied(zero, 2, offload="all")
    assert {chunk.gathered_for for chunk in plan.chunks} == {GatheredFor.USE}
    assert all(chunk.gradients_sharded and chunk.optimizer_sharded for chunk in plan.chunks)
    kept = applied(zero, 2, offload="optimizer")
    assert kept.chunks[0].parameters_sharded is (zero == 3), "slots alone change nothing about parameters"


def test_ranks_that_share_nothing_share_nothing_on_disk():
    assert not any(chunk.optimizer_sharded for chunk in applied(0, 2, offload="all").chunks)


def test_one_word_for_all_units_or_one_for_each():
    assert applied(activations="recompute").activations == (Activations.RECOMPUTE,) * 3
    words = ("keep", "offload:host", "recompute")
    assert applied(activations=list(words)).activations == tuple(map(Activations, words))
    assert applied(order="by-unit").order is MicroBatchOrder.BY_UNIT
