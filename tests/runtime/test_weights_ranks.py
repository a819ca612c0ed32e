"""Weights of sharded models on several ranks: filled alike, whole on every rank, written by one, chunk by chunk."""

from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CASES
from ranks import run_ranks
from torch import nn

from outgrow.parallel.placement import GatheredParameters
from outgrow.runtime.building import build_model
from outgrow.runtime.engine import Engine
from outgrow.runtime.filling import InitFiller
from outgrow.runtime.weights import load_weights

CASE = CASES["gpt-tied"]


def init(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        nn.init.normal_(parameter, std=0.1)


def engine_without_values(precision: str, transport: str | None) -> Engine:
    model = build_model(CASE.build, 0, lambda num_bytes: False).model
    filler = InitFiller(init, 7, model)
    return Engine(model, loss=CASE.loss, precision=precision, transport=transport, zero=3, filler=filler)


def rows(step: int, rank: int) -> Any:
    return tuple(tensor[rank::2] for tensor in CASE.batch(step, 4))


def watch(engine: Engine) -> list[int]:
    """How many gathered copies there are at once while weights stream out."""
    seen: list[int] = []
    gathered_chunk = engine.state.gathered_chunk

    @contextmanager
    def watched(index: int):
        with gathered_chunk(index) as values:
            stores = [chunk.store for chunk in engine.state.chunks]
            seen.append(sum(isinstance(store, GatheredParameters) and store.full is not None for store in stores))
            yield values

    engine.state.gathered_chunk = watched
    return seen


def stream_out(rank: int, precision: str, transport: str, folder: str) -> tuple[dict[str, torch.Tensor], ...]:
    engine = engine_without_values(precision, transport)
    first = engine.state_dict()
    engine.step(rows(1, rank))
    held = engine.statistics().bytes_by_slot
    seen = watch(engine)
    state = engine.state_dict()
    engine.export(Path(folder) / "w")
    assert len(seen) == 2 * len(engine.state.chunks)
    assert max(seen) <= 1, "one chunk at a time"
    assert engine.statistics().bytes_by_slot == held, "nothing stays gathered"
    with engine.gathered() as model:
        engine.export(Path(folder) / f"again-{rank}")
        assert model.get_parameter("tok.weight").numel(), "what was gathered before stays"
    with pytest.raises(FileNotFoundError) if rank == 0 else nullcontext():  # rank 1 is not kept waiting
        engine.export(Path(folder) / "no" / "such" / "w")
    engine.step(rows(2, rank))
    engine.close()
    return first, state


@pytest.mark.parametrize(("precision", "transport"), [("bf16", "gloo"), ("float32", "shared-memory")])
def test_whole_weights_on_every_rank_and_in_one_file(tmp_path, precision, transport):
    outcomes = run_ranks(stream_out, 2, precision, transport, str(tmp_path))
    alone = engine_without_values(precision, None).state_dict()
    for first, _ in outcomes:
        assert all(torch.equal(first[name], value) for name, value in alone.items()), "as on one rank"
    expected = outcomes[0][1]
    assert not torch.equal(expected["tok.weight"], alone["tok.weight"])
    for state in (outcomes[1][1], load_weights(tmp_path / "w"), load_weights(tmp_path / "again-0")):
        assert state.keys() == expected.keys() == CASE.model().state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in expected.items())
        assert all(value.dtype is torch.float32 for value in state.values())
    assert not (tmp_path / "again-1").exists()
