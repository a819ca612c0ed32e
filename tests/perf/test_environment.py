import os
import platform

import torch

from outgrow.perf.environment import Environment, ProcessorTime, installed_version


def test_the_fingerprint_is_of_this_machine_and_these_versions() -> None:
    here = Environment.detect()
    assert here.num_cores == len(os.sched_getaffinity(0))
    assert here.memory_bytes == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert here.python == platform.python_version()
    assert here.packages["torch"] == torch.__version__
    assert platform.release() in str(here)
    assert here.cpu


def test_a_package_that_is_not_there_has_no_version() -> None:
    assert installed_version("outgrow-no-such-distribution") is None


def test_processor_time_that_the_host_gave_to_others() -> None:
    before = ProcessorTime(used_s=100.0, lost_s=10.0)
    assert ProcessorTime(used_s=130.0, lost_s=20.0).lost_since(before) == 0.25
    assert before.lost_since(before) == 0.0
    now = ProcessorTime.now()
    sum(range(100_000))
    later = ProcessorTime.now()
    assert later.used_s >= now.used_s > 0
    assert 0 <= later.lost_since(now) <= 1
