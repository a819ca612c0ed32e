"""Measuring the machine: plausible figures, kept once, measured anew when asked."""

import subprocess
import sys
import threading
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from outgrow.parallel.collectives import Transport, open_transport
from outgrow.runtime import probing
from outgrow.runtime.optimizer import PiecewiseOptimizer
from outgrow.runtime.probing import cache_folder, probe
from outgrow.scheduler.hardware import Hardware


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "_ELEMS", 1 << 16)
    monkeypatch.setattr(probing, "_DISK_BYTES", 1 << 20)


def test_figures_are_measured_kept_and_measured_anew(tmp_path: Path) -> None:
    disk, cache = tmp_path / "disk", tmp_path / "cache"
    disk.mkdir()
    found = probe(str(disk), folder=cache)
    assert found.disk is not None
    assert 1 <= found.disk.both_capacity <= 2
    assert 0 < found.action_s < 0.1
    assert list(disk.iterdir()) == [], "nothing is left behind"
    (file,) = cache.iterdir()
    assert Hardware.from_json(file.read_text()) == found
    other = replace(found, copy_bytes_per_s=1.0)
    file.write_text(other.to_json())
    assert probe(str(disk), folder=cache) == other, "from the cache"
    assert probe(str(disk), fresh=True, folder=cache) != other


def test_all_cores_compute_beside_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    at_work: list[tuple[str, int]] = []
    gelu = torch.nn.functional.gelu

    def noted(values: torch.Tensor) -> torch.Tensor:
        at_work.append((threading.current_thread().name, torch.get_num_threads()))
        return gelu(values)

    monkeypatch.setattr(torch.nn.functional, "gelu", noted)
    monkeypatch.setattr(probing, "num_cores", lambda: 3 * torch.get_num_threads())
    num_threads = torch.get_num_threads()
    probing._measure_disk(str(tmp_path))
    assert len(set(at_work)) == 3, "this rank, and as many as the other cores are there for"
    assert {count for _, count in at_work} == {num_threads}


def test_figures_of_another_version_are_measured_again(tmp_path: Path) -> None:
    probe(folder=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text('{"old": 1}')
    assert probe(folder=tmp_path).disk is None
    assert "old" not in file.read_text()


def test_the_cache_is_where_the_user_has_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "outgrow"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "outgrow"


def test_updates_have_a_call_and_elements() -> None:
    module = torch.nn.Linear(4, 4)
    optimizer = PiecewiseOptimizer(partial(torch.optim.AdamW, lr=0.1), dict(module.named_parameters()))
    before = [parameter.detach().clone() for parameter in module.parameters()]
    latency_s, elems_per_s = probing.update_figures(optimizer, 1 << 18)
    assert latency_s >= 0
    assert elems_per_s > 0
    assert all(torch.equal(parameter, value) for parameter, value in zip(module.parameters(), before, strict=True))


def test_latency_and_bandwidth_are_fitted() -> None:
    latency, speed = probing._fit([(size, 0.5 + size / 100) for size in (10, 50, 400)])
    assert latency == pytest.approx(0.5)
    assert speed == pytest.approx(100)
    assert probing._fit([(10, 1.0), (20, 0.5)]) == (0.0, 40.0)


_PEAK = """
import sys, torch
from pathlib import Path
from outgrow.memory.allocator import return_blocks_at_once
from outgrow.memory.process import peak_host_bytes, read_process_memory, reset_peak
from outgrow.runtime import probing
return_blocks_at_once()
parameter = torch.nn.Parameter(torch.ones(8))
parameter.grad = torch.ones(8)
torch.optim.AdamW([parameter], fused=True).step()  # loads what any training loads
begin = read_process_memory().resident_bytes
reset_peak()
probing.probe(sys.argv[1], folder=Path(sys.argv[1]))
print(peak_host_bytes(0) - begin, probing.PROBE_BYTES)
"""


def test_measuring_takes_no_more_than_is_asked_for(tmp_path: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-c", _PEAK, str(tmp_path)], capture_output=True, text=True, check=True, timeout=300
    )
    taken, asked = map(int, answer.stdout.split())
    assert asked // 2 < taken <= asked


def exchange_beside_computing(rank: int) -> tuple[list[float], bool, bool]:
    transport = open_transport(kind="shared-memory")
    computing: list[bool] = []
    rows = probing._net_rows

    def noted(transport: Transport) -> list[tuple[int, float, float]]:
        computing.append(any(thread.name == "compute" for thread in threading.enumerate()))
        return rows(transport)

    probing._net_rows = noted
    found = probing.measure_net(transport)
    is_over = not any(thread.name == "compute" for thread in threading.enumerate())
    return list(asdict(found).values()), all(computing) and bool(computing), is_over


def test_exchanges_are_measured_while_every_rank_computes() -> None:
    for numbers, computed, is_over in run_ranks(exchange_beside_computing, 2):
        assert numbers[0] > 0
        assert numbers[2] > 0
        assert min(numbers) >= 0
        assert computed
        assert is_over
