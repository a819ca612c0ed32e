"""Rounds of a measurement: what is walked over, when it is enough, what is made of them."""

import threading

import pytest
import torch
from torch import nn

from outgrow.scheduler import stopwatch
from outgrow.scheduler.stopwatch import CACHE_BYTES, Stopwatch, Way, expected, typical


def layer() -> tuple[nn.Linear, Way]:
    module, x = nn.Linear(8, 8), torch.randn(4, 8, requires_grad=True)
    return module, Way(lambda: module(x), [x], [x, *module.parameters()])


def test_the_typical_of_some_seconds() -> None:
    assert typical([3.0]) == 3.0
    assert typical([1.0, 3.0]) == 2.0
    assert typical([1.0, 2.0, 9.0]) == 2.0, "a stall is left out"
    assert typical([1.0, 2.0, 3.0, 5.0, 90.0]) == pytest.approx(10 / 3), "slower moments are not"


def test_what_is_expected_of_a_pass_has_its_slow_moments() -> None:
    assert expected([3.0]) == 3.0
    assert expected([1.0, 1.0, 1.0, 1.3]) == pytest.approx(4.3 / 4)
    assert expected([1.0, 1.0, 1.0, 90.0]) == pytest.approx(4.5 / 4), "a stall counts as half as much again"
    assert expected([0.0, 0.0]) == 0.0


def test_both_passes_of_every_way_are_timed_with_new_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "_LONG_S", 1e9)  # however slow the machine is
    module, whole = layer()
    weights = list(module.parameters())
    inputs_only = Way(whole.run, whole.given, whole.given, weights)
    seen = []
    watched = Way(lambda: seen.append([w.requires_grad for w in weights]) or module(whole.given[0]), *(
        whole.given, whole.given, weights))  # fmt: skip
    found = Stopwatch(1024).seconds([whole, inputs_only, watched])
    assert len(found) == 3
    assert all(forward_s > 0 and backward_s > 0 for forward_s, backward_s in found)
    assert {tuple(each) for each in seen} == {(False, False)}
    assert all(weight.requires_grad for weight in weights)
    assert all(weight.grad is None for weight in weights), "the last way made none"


def test_what_others_use_is_walked_over_before_each_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    _, way = layer()
    watch = Stopwatch(4096)
    walked = []
    walk = watch.others.walk

    def noted(fresh: list[torch.Tensor]) -> None:
        walked.append([tuple(tensor.shape) for tensor in fresh])
        walk(fresh)

    monkeypatch.setattr(watch.others, "walk", noted)
    watch._once(way)
    assert walked == [[(4, 8)], [(4, 8)]], "inputs before the forward pass, gradients before the backward"
    assert watch.others.nbytes == 4096
    assert Stopwatch(1 << 40).others.nbytes <= CACHE_BYTES


def test_what_has_no_backward_takes_none() -> None:
    x = torch.randn(4, 8)
    ((forward_s, backward_s),) = Stopwatch(4).seconds([Way(lambda: x * 2, [x], [])])
    assert forward_s > 0
    assert backward_s == 0


def test_rounds_end_when_they_have_settled() -> None:
    steady, restless = [[(0.05, 0.05)]] * 3, [[(0.01 * 3**n, 0.0)] for n in range(4)]
    assert stopwatch._is_enough(steady, 0.3)
    assert not stopwatch._is_enough(steady, 0.15), "too short to be sure"
    assert not stopwatch._is_enough(steady[:2], 0.3)
    assert not stopwatch._is_enough(restless, 0.3)
    assert stopwatch._is_enough(restless, 0.9), "they never will"
    assert stopwatch._is_enough([[(0.0, 0.0)]] * 30, 0.0)


def test_long_rounds_have_the_other_ways_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, way = layer()
    seen: list[str] = []

    def named(name: str) -> Way:
        return Way(lambda: seen.append(name) or way.run(), way.given, way.trained)

    monkeypatch.setattr(stopwatch, "_SHORT_S", 0.0)
    monkeypatch.setattr(stopwatch, "_LONG_S", 0.0)
    monkeypatch.setattr(stopwatch, "_is_enough", lambda rounds, spent_s: len(rounds) == 4)
    rounds = Stopwatch(4).rounds([named("whole"), named("kept")])
    assert seen == ["whole", "kept", "whole", "whole", "whole"]
    assert len(rounds[0]) == 2, "whatever it took"
    assert {len(each) for each in rounds[1:]} <= {1}


def test_rounds_that_stalled_are_left_out() -> None:
    short = [[(1.0, 1.0), (9.0, 0.0)], [(3.0, 1.1), (1.0, 0.0)], [(1.0, 1.1), (1.0, 0.0)]]
    assert stopwatch._without_stalls(short) == [short[0], short[2]], "by the first way"
    long = [[(9.0, 1.0), (9.0, 1.0)], [(1.0, 1.0)], [(1.1, 1.0)]]
    assert stopwatch._without_stalls(long) == long, "the only one of all ways"


def test_turns_are_taken_in_threads_that_end(monkeypatch: pytest.MonkeyPatch) -> None:
    module, way = layer()
    names = []
    watched = Way(lambda: names.append(threading.current_thread().name) or module(way.given[0]), way.given, way.trained)
    released = []
    monkeypatch.setattr(stopwatch, "_TURNS_S", 0.0001)
    monkeypatch.setattr(stopwatch, "release_kernel_buffers", lambda: released.append(threading.current_thread().name))
    assert Stopwatch(4).in_turns(watched) >= 1
    passes = [name for name in names if name.startswith("turn")]
    assert sorted(released) == sorted(passes * 2), "before each pass of a turn, and of no other"
    assert {name.split("_")[0] for name in names} == {"MainThread", "turn"}
    assert not any(each.name.startswith("turn") for each in threading.enumerate())


def test_kernels_without_helpers_have_no_turns_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    _, way = layer()
    monkeypatch.setattr(stopwatch.torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(Stopwatch, "_once", lambda *_: pytest.fail("it ran"))
    assert Stopwatch(4).in_turns(way) == 1.0
