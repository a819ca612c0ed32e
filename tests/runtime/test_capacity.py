import pytest

from outgrow.runtime.capacity import Resources, check_capacity, choose_resources
from outgrow.runtime.config import RuntimeConfig


def test_workers_share_this_machine():
    assert choose_resources(RuntimeConfig(workers=2), 8, 0, 0) == Resources({"CPU": 4}, 4)
    assert choose_resources(RuntimeConfig(workers=3), 8, 0, 0) == Resources({"CPU": 2}, 2)
    assert choose_resources(RuntimeConfig(workers=2), 2, 0, 1) == Resources({"CPU": 1}, 1)
    assert choose_resources(RuntimeConfig(workers=2), 8, 2, 0).uses_gpu


def test_workers_ask_a_cluster_for_one_cpu_unless_told_otherwise():
    assert choose_resources(RuntimeConfig(workers=2), None, 0, 0) == Resources({"CPU": 1}, 1)
    told = RuntimeConfig(workers=2, resources_per_worker={"CPU": 3, "GPU": 0})
    assert choose_resources(told, None, 4, 0) == Resources({"CPU": 3, "GPU": 0}, 3)
    assert not choose_resources(told, None, 4, 0).uses_gpu
    half = RuntimeConfig(workers=2, resources_per_worker={"CPU": 0.5})
    assert choose_resources(half, 2, 0, 0).num_threads == 1


@pytest.mark.parametrize(
    ("workers", "each", "there", "spare", "words"),
    [
        (3, {"CPU": 1}, {"CPU": 2}, 0, r"ask for 3 CPU, and the cluster has 2; .*workers=2; .*\{\"CPU\": 0.67\}"),
        (2, {"CPU": 1, "GPU": 1}, {"CPU": 8, "GPU": 1}, 0, r"ask for 2 GPU, .* has 1; .*workers=1; .*\"GPU\": 0"),
        (2, {"CPU": 1}, {"CPU": 2}, 1, "and 1 CPU for Ray Data ask for 3 CPU"),
        (1, {"CPU": 1, "TPU": 1}, {"CPU": 8}, 0, "ask for 1 TPU, and the cluster has 0"),
    ],
)
def test_says_what_is_asked_what_is_there_and_what_to_change(workers, each, there, spare, words):
    with pytest.raises(ValueError, match=words):
        check_capacity(RuntimeConfig(workers=workers), Resources(each, 1), there, spare)


def test_what_fits_passes():
    check_capacity(RuntimeConfig(workers=2), Resources({"CPU": 1, "GPU": 0}, 1), {"CPU": 2}, 0)
