"""Invariant 1 on one rank with a device apart from the host: wherever state lies among three tiers, the bits are those
of training in one memory."""

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from lanes import PATIENCE_S
from models import CASES, DROPPING
from residency import OPTIMIZERS, covering, engine_of, every_pair_meets, in_memory, layout, outcome, places, unequal
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from outgrow import Engine, Memory
from outgrow.memory.errors import DoesNotFit
from outgrow.parallel.actions import Action, Kind
from outgrow.runtime import planning
from outgrow.runtime.executor import Executor
from outgrow.runtime.profiling import NotProfiled
from outgrow.scheduler.plan import Home, UpdateTime
from outgrow.scheduler.search import search

FACTORS: dict[str, tuple[Any, ...]] = {
    "name": tuple(CASES),
    "optimizer": ("adamw", "fused", "groups", "momentum", "adagrad"),
    "precision": ("float32", "bf16"),
    "turns": ((1, None), (3, "sequential"), (3, "by-unit")),
    "updates": ("after", "backward", "clipped"),
    "offload": ("none", "host", "optimizer", "all"),
    "activations": ("keep", "recompute", "offload:host", "offload:disk"),
    "prefetch": (0, 1, 2),
    "device_cache_bytes": (0, 1 << 14, 1 << 30),
}
ROWS = covering(FACTORS)
APART: dict[str, Any] = {"device_cache_bytes": 0}


pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_rows_cover_every_pair() -> None:
    assert every_pair_meets(FACTORS, ROWS)
    assert {row["optimizer"] for row in ROWS} <= OPTIMIZERS.keys()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(map(str, row.values())))
def test_the_bits_are_those_of_training_in_memory(row: dict[str, Any], tmp_path: Path) -> None:
    reference = in_memory(**layout(row))
    assert outcome(folder=str(tmp_path), **layout(row), **places(row)).differ(reference) == []
    assert list(tmp_path.iterdir()) == [], "the file is gone"


def test_programs_copy_between_the_tiers_and_arenas_have_their_exact_size(tmp_path: Path) -> None:
    with engine_of("gpt", "adamw", str(tmp_path), offload="all", activations="offload:host", **APART) as engine:
        engine.step(DROPPING["gpt"].batch(0, 6))
        assert engine.program is not None
        kinds = {action.kind for action in engine.program.actions()}
        assert kinds >= {Kind.UP, Kind.DOWN, Kind.READ, Kind.WRITE, Kind.SAVE, Kind.LOAD}
        assert engine._tiers is not None
        assert engine._tiers.device.arena_bytes == engine.program.arena_bytes("device") > 0
        assert engine._tiers.host.arena_bytes == engine.program.arena_bytes("host") > 0
        lanes = {span.lane for span in engine.timeline.spans}
        assert lanes >= {"compute", "h2d", "d2h", "read", "write"}


@pytest.mark.parametrize("order", ["sequential", "by-unit"])
@pytest.mark.parametrize("name", ["gpt", "tied-frozen"])
def test_smaller_and_empty_micro_batches(name: str, order: str, tmp_path: Path) -> None:
    batches = [CASES[name].batch(step, samples) for step, samples in enumerate((7, 2, 6, 1))]
    reference = outcome(name, "adamw", None, batches, micro_batches=3)
    arguments = {"offload": "all", "order": order, "micro_batches": 3, "activations": "offload:host", **APART}
    assert outcome(name, "adamw", str(tmp_path), batches, **arguments).differ(reference) == []


@pytest.mark.parametrize("wanted", list(UpdateTime))
def test_whatever_time_of_updates_is_chosen_the_norms_are_those_of_their_step(
    wanted: UpdateTime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def preferring(*arguments: Any) -> Any:
        *rest, _predict, policies, device_bytes = arguments
        return search(*rest, lambda found: 1.0 + (found.plan.update is not wanted), policies, device_bytes)

    monkeypatch.setattr(planning, "search", preferring)
    reference = outcome("gpt", "adamw", None)
    with engine_of("gpt", "adamw", str(tmp_path), offload="all", activations="keep", **APART) as engine:
        norms = [engine.step(DROPPING["gpt"].batch(step, 6)).grad_norm for step in range(3)]
        assert engine.plan.update is wanted
    assert norms == reference.norms


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("offload", ["none", "host", "all"])
def test_looking_at_the_weights_between_steps_changes_nothing(offload: str, precision: str, tmp_path: Path) -> None:
    case = DROPPING["gpt-tied"]
    weights = []
    with engine_of("gpt-tied", "adamw", None, precision=precision) as engine:
        for step in range(3):
            engine.step(case.batch(step, 6))
            weights.append(engine.state_dict())
    files = tmp_path / "weights.safetensors"
    with engine_of("gpt-tied", "adamw", str(tmp_path), precision=precision, offload=offload, **APART) as engine:
        for step in range(3):
            engine.step(case.batch(step, 6))
            if step == 0:
                assert unequal(engine.state_dict(), weights[0]) == []
                assert unequal(engine.state_dict(), weights[0]) == [], "and once more"
            elif step == 1:
                with engine.gathered() as model:
                    now = {key: value.float() for key, value in model.state_dict().items()}
                low = {key: value.bfloat16().float() for key, value in weights[1].items()}
                assert unequal(now, weights[1] if precision == "float32" else low) == []
                engine.export(files)
        assert unequal(engine.state_dict(), weights[2]) == []
        model = engine.model
    from safetensors.torch import load_file

    saved = load_file(files)
    assert unequal(saved, {key: weights[1][key] for key in saved}) == []
    if offload != "all" and precision == "float32":
        assert unequal(model.state_dict(), weights[2]) == [], "the model keeps its weights after the end"


class Broken(Exception):
    pass


def break_once(engine: Engine, where: str, module: str) -> None:
    """The model fails in the next forward or backward of one of its modules."""

    def forward(_module: Any, _args: Any, output: torch.Tensor) -> None:
        handle.remove()
        if where == "forward":
            raise Broken

        def backward(_grad: torch.Tensor) -> None:
            raise Broken

        output.register_hook(backward)

    handle = engine.model.get_submodule(module).register_forward_hook(forward)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("offload", ["none", "host", "all"])
def test_a_failing_model_leaves_the_weights_of_the_step_before(where: str, offload: str, tmp_path: Path) -> None:
    case = CASES["gpt"]
    arguments: dict[str, Any] = {"micro_batches": 2, "clip_grad_norm": 0.5}
    reference = outcome("gpt", "adamw", None, [case.batch(step, 6) for step in range(3)], case=case, **arguments)
    arguments |= {"offload": offload, "activations": "offload:host", "prefetch": 2, **APART}
    with engine_of("gpt", "adamw", str(tmp_path), case=case, **arguments) as engine:
        losses = []
        for step in range(3):
            if step:
                break_once(engine, where, "blocks.1")
                with pytest.raises(Broken):
                    engine.step(case.batch(9, 6))
            losses.append(engine.step(case.batch(step, 6)).loss)
        assert losses == reference.losses
        assert unequal(engine.state_dict(), dict(reference.weights)) == []


def peaks(folder: Path, **arguments: Any) -> tuple[int, int]:
    """What is predicted for the device and for the host."""
    with engine_of("gpt", "adamw", str(folder), **arguments, **APART) as engine:
        engine.step(DROPPING["gpt"].batch(0, 6))
        assert engine.predicted is not None
        assert engine.predicted_device is not None
        return engine.predicted_device.peak_bytes, engine.predicted.peak_bytes


def test_a_budget_between_all_and_nothing_keeps_some_chunks_on_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the bytes that plans move: the seconds of units this small are noise, and would decide."""

    def fail(*_: object) -> None:
        raise NotProfiled("this test has no clock")

    monkeypatch.setattr(planning.Profiler, "measure", fail)
    most, _ = peaks(tmp_path, offload="none", update="backward", activations="keep")
    least, _ = peaks(tmp_path, offload="host", update="backward", activations="keep")
    assert least < most
    memory = Memory(device=(most + least) // 2, host="4GiB", unified=False)
    reference = outcome("gpt", "adamw", None)
    with engine_of("gpt", "adamw", None, memory=memory, activations="keep") as engine:
        losses = [engine.step(DROPPING["gpt"].batch(step, 6)).loss for step in range(3)]
        homes = [chunk.parameter_home for chunk in engine.plan.chunks]
        assert set(homes) == {Home.DEVICE, Home.HOST}
        assert engine.predicted_device is not None
        assert engine.predicted_device.peak_bytes <= (most + least) // 2
        assert losses == reference.losses
        assert unequal(engine.state_dict(), dict(reference.weights)) == []


def test_with_room_everything_stays_on_the_device() -> None:
    with engine_of("gpt", "adamw", None, memory=Memory(device="1GiB", host="4GiB", unified=False)) as engine:
        engine.step(DROPPING["gpt"].batch(0, 6))
        assert {chunk.optimizer_home for chunk in engine.plan.chunks} == {Home.DEVICE}
        assert not engine.plan.activations


def test_a_device_that_is_too_small_is_refused_before_anything_runs() -> None:
    memory = Memory(device="64KiB", host="4GiB", unified=False)
    with engine_of("gpt", "adamw", None, memory=memory) as engine:
        with pytest.raises(DoesNotFit, match=r"no plan fits into the device budget of 64\.00 KiB.* more, at [FB]\d"):
            engine.step(DROPPING["gpt"].batch(0, 6))
        assert engine.program is None


def test_a_host_that_is_too_small_is_named(tmp_path: Path) -> None:
    memory = Memory(device="1GiB", host="16MiB", disk=tmp_path, unified=False)
    with (
        engine_of("gpt", "adamw", None, memory=memory, offload="host") as engine,
        pytest.raises(DoesNotFit, match="no plan fits into the host budget"),
    ):
        engine.step(DROPPING["gpt"].batch(0, 6))


class Census(TorchDispatchMode):
    """The most bytes of storages alive at once that operators of this thread made, whichever thread lets go of them."""

    def __init__(self, ignored: set[int]) -> None:
        super().__init__()
        self._ignored = ignored
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self._ignored:
                storage = tensor.untyped_storage()
                self._seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._seen = {key: seen for key, seen in self._seen.items() if not seen[0].expired()}
        self.most_bytes = max(self.most_bytes, sum(num_bytes for _, num_bytes in self._seen.values()))
        return out


def save_late(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on its way off the device stays there until the computing thread waits for a lane: what is counted is
    what is there then."""
    wanted, wait, save = threading.Event(), executor._wait, executor._handlers[Kind.SAVE]

    def waiting(*args: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            wait(*args)
            return
        wanted.set()
        try:
            wait(*args)
        finally:
            wanted.clear()

    def late(action: Action) -> Any:
        assert wanted.wait(PATIENCE_S), f"nobody ever waited for {action}"
        return save(action)

    monkeypatch.setattr(executor, "_wait", waiting)
    monkeypatch.setattr(executor, "_handlers", {**executor._handlers, Kind.SAVE: late})


@pytest.mark.parametrize("activations", ["keep", "recompute", "offload:host"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_what_is_predicted_for_the_device_is_what_it_takes(
    monkeypatch: pytest.MonkeyPatch, activations: str, micro_batches: int
) -> None:
    """Beside the arena, which has its exact size: what operators make in a step, where all state is on the host and
    there since the first step."""
    arguments: dict[str, Any] = {"offload": "host", "update": "after", "micro_batches": micro_batches, **APART}
    arguments["order"] = "sequential"
    with engine_of("gpt", "adamw", None, activations=activations, **arguments) as engine:
        batches = [DROPPING["gpt"].batch(step, 24) for step in range(3)]
        for batch in batches[:2]:
            engine.step(batch)
        assert engine.program is not None
        assert engine._tiers is not None
        there = [tensor for tensor in gc.get_objects() if isinstance(tensor, torch.Tensor)]
        there += [engine._tiers.device.buffer(name) for name in engine.program.places("device")]
        save_late(engine._executor, monkeypatch)
        with Census({tensor.untyped_storage().data_ptr() for tensor in there}) as census:
            engine.step(batches[2])
        assert engine.predicted_device is not None
        parts = engine.predicted_device.parts
        predicted = engine.predicted_device.peak_bytes - parts["buffers"]
        words = f"{census.most_bytes:,} bytes, and {predicted:,} predicted: {parts}"
        assert census.most_bytes <= predicted, words
        assert census.most_bytes >= 0.6 * predicted, words
