"""Invariant 1 on several ranks: every ZeRO stage and transport gives the same bits, and DDP's results."""

import functools
import hashlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import CASES, GPT, Case
from ranks import run_ranks

from outgrow import Engine

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAMW = functools.partial(torch.optim.AdamW, lr=1e-2)
STEPS = 3


def rows(case: Case, step: int, samples: int, rank: int, size: int) -> Any:
    return tuple(tensor.tensor_split(size)[rank] for tensor in case.batch(step, samples))


def digest(state: dict[str, torch.Tensor]) -> str:
    content = hashlib.sha256()
    for name, value in state.items():
        content.update(name.encode() + value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


def outcome(rank: int, case: Case, samples: int, model: torch.nn.Module | None = None, **arguments: Any) -> Any:
    engine = Engine(model if model is not None else case.model(), loss=case.loss, **arguments)
    try:
        results = [engine.step(rows(case, step, samples, rank, dist.get_world_size())) for step in range(STEPS)]
        return digest(engine.state_dict()), [result.loss for result in results], [r.grad_norm for r in results]
    finally:
        engine.close()


def ddp(rank: int, case: Case, micro_batches: int, clip: float | None) -> Any:
    """Losses, the gradients of every step (after clipping) and final weights of the loop that a user would write."""
    model = case.model()
    parallel = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=case.name == "tied-frozen")
    optimizer = SGD(parallel.parameters())
    losses, gradients = [], []
    for step in range(STEPS):
        parts = [tensor.tensor_split(micro_batches) for tensor in rows(case, step, 12, rank, dist.get_world_size())]
        total = torch.zeros((), dtype=torch.float64)
        for part in zip(*parts, strict=True):
            loss = case.loss(parallel(*part[:-1]), part[-1])
            (loss / micro_batches).backward()
            total += loss.item() / micro_batches
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(parallel.parameters(), clip)
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses, gradients, model.state_dict()


class Recorder(torch.optim.SGD):
    """SGD that notes the gradients that go into it."""

    def __init__(self, params: Any, **arguments: Any) -> None:
        super().__init__(params, **arguments)
        self.seen: list[torch.Tensor] = []

    def step(self, closure: Any = None) -> Any:
        self.seen += [p.grad.detach().clone() for group in self.param_groups for p in group["params"]]
        return super().step(closure)


def compare_stages(rank: int, name: str, micro_batches: int, clip: float | None) -> None:
    case, size = CASES[name], dist.get_world_size()
    arguments = {"optimizer": SGD, "micro_batches": micro_batches, "clip_grad_norm": clip}
    outcomes = {
        (zero, transport): outcome(rank, case, 12, zero=zero, transport=transport, **arguments)
        for zero in range(4)
        for transport in (("shared-memory", "gloo") if zero in (1, 3) else ("shared-memory",))
    }
    first = outcomes[0, "shared-memory"]
    assert {key for key, value in outcomes.items() if value != first} == set()

    losses, gradients, weights = ddp(rank, case, micro_batches, clip)
    torch.testing.assert_close(torch.tensor(first[1]), torch.tensor(losses), rtol=1e-6, atol=0)
    engine = Engine(
        case.model(),
        loss=case.loss,
        zero=0,
        **(arguments | {"optimizer": functools.partial(Recorder, lr=0.1, momentum=0.9)}),
    )
    optimizer = engine._optimizer.optimizer
    assert isinstance(optimizer, Recorder)
    optimizer.seen.clear()
    engine.step(rows(case, 0, 12, rank, size))
    fields = [chunk.layout.fields[piece.index] for chunk in engine.state.chunks for piece in chunk.pieces]
    names = [field.name for field in fields if field.name in gradients[0]]
    mine, theirs = optimizer.seen, [gradients[0][name] for name in names]
    assert [g.shape for g in mine] == [g.shape for g in theirs]
    scale = max(g.abs().max().item() for g in theirs)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * scale)
    engine.step(rows(case, 1, 12, rank, size))
    engine.step(rows(case, 2, 12, rank, size))
    state = engine.state_dict()
    engine.close()
    trained = dict(case.model().named_parameters(remove_duplicate=False))
    for key in trained:
        if size == 2 and micro_batches == 1 and clip is None:
            assert torch.equal(state[key], weights[key]), key
        else:
            torch.testing.assert_close(state[key], weights[key], rtol=1e-5, atol=1e-6)
    for key in weights:  # running statistics are rank 0's, as DDP's are
        if rank == 0 and "running" in key and micro_batches == 1:
            torch.testing.assert_close(state[key], weights[key], rtol=1e-5, atol=1e-6)


def compare_cases(rank: int, names: tuple[str, ...], micro_batches: int, clip: float | None) -> None:
    for name in names:
        try:
            compare_stages(rank, name, micro_batches, clip)
        except AssertionError as error:
            error.add_note(f"model {name}")
            raise


# All models in one group of ranks: starting processes costs more than the steps.


def test_two_ranks() -> None:
    run_ranks(compare_cases, 2, tuple(CASES), 1, None)


def test_two_ranks_with_micro_batches_and_clipping() -> None:
    run_ranks(compare_cases, 2, ("gpt-tied", "conv", "tied-frozen"), 2, 0.5)


def test_three_ranks_with_micro_batches_and_clipping() -> None:
    run_ranks(compare_cases, 3, ("gpt-tied", "tied-frozen"), 2, 0.5)


def compare_adamw_bf16_and_dropout(rank: int) -> None:
    """What DDP cannot be compared with still has to agree between the stages."""
    case = CASES["gpt-tied"]
    for precision in ("float32", "bf16"):
        outcomes = set()
        for zero in range(4):
            for transport in ("shared-memory", "gloo"):
                torch.manual_seed(3)
                model = GPT(tied=True, dropout=0.3)
                arguments = {"optimizer": ADAMW, "precision": precision, "clip_grad_norm": 0.5, "micro_batches": 2}
                outcomes.add(repr(outcome(rank, case, 12, model, zero=zero, transport=transport, **arguments)))
        assert len(outcomes) == 1


def test_all_stages_agree_with_adamw_in_bf16_and_with_dropout() -> None:
    run_ranks(compare_adamw_bf16_and_dropout, 2)


def uneven(rank: int) -> Any:
    """5, then 1 samples over 2 ranks and 2 micro-batches: some ranks and micro-batches have none."""
    case = CASES["gpt"]
    results = []
    for zero, transport in ((0, "shared-memory"), (2, "shared-memory"), (3, "shared-memory"), (3, "gloo")):
        engine = Engine(case.model(), loss=case.loss, optimizer=SGD, micro_batches=2, zero=zero, transport=transport)
        losses = []
        for step, samples in enumerate((8, 5, 1)):
            batch = rows(case, step, samples, rank, 2)
            result = engine.step(batch if len(batch[0]) else None)
            losses.append((result.loss, result.num_samples, result.num_tokens))
        results.append((losses, digest(engine.state_dict())))
        weights = engine.state_dict()
        engine.close()
    assert all(result == results[0] for result in results)
    return results[0][0], weights


def test_a_batch_smaller_than_the_ranks_counts_every_sample_once() -> None:
    (losses, weights), (others, _) = run_ranks(uneven, 2)
    assert losses == others
    case = CASES["gpt"]
    model = case.model()
    optimizer = SGD(model.parameters())
    for step, samples in enumerate((8, 5, 1)):
        tokens, target = case.batch(step, samples)
        loss = case.loss(model(tokens), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert losses[step] == (pytest.approx(loss.item(), rel=1e-6), samples, samples * 12)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6)


def state_bytes(rank: int) -> list[dict[str, int]]:
    case, held = CASES["gpt"], []
    for zero in range(4):
        torch.manual_seed(0)
        engine = Engine(GPT(dim=64, layers=4), loss=case.loss, optimizer=ADAMW, zero=zero)
        for step in range(2):
            engine.step(rows(case, step, 12, rank, dist.get_world_size()))
        held.append(engine.statistics().peak_bytes_by_slot)
        engine.close()
    return held


@pytest.mark.parametrize("size", [2, 4])
def test_state_follows_the_formulas(size: int) -> None:
    """ALGORITHMS 1.2, float32 with Adam: 4 + 4 + 8 bytes a parameter, each divided by the ranks where it is sharded."""
    parameters = sum(p.numel() for p in GPT(dim=64, layers=4).parameters())
    by_rank = run_ranks(state_bytes, size)
    for zero in range(4):
        expected = {
            "param": 4 * parameters / (size if zero >= 3 else 1),
            "grad": 4 * parameters / (size if zero >= 2 else 1),
            "exp_avg": 4 * parameters / (size if zero >= 1 else 1),
            "exp_avg_sq": 4 * parameters / (size if zero >= 1 else 1),
        }
        for slot, num_bytes in expected.items():
            measured = sum(held[zero][slot] for held in by_rank) / size
            assert measured == pytest.approx(num_bytes, rel=0.05), (zero, slot)


def not_finite_on_one_rank(rank: int) -> None:
    case = CASES["conv"]
    engine = Engine(case.model(), loss=case.loss)
    engine.step(rows(case, 0, 8, rank, 2))
    images, target = rows(case, 1, 8, rank, 2)
    engine.step((images * float("inf") if rank == 1 else images, target))


def test_a_loss_that_is_not_finite_on_one_rank_stops_the_others() -> None:
    with pytest.raises(Exception, match=r"step 2, rank 1.*stem\.0"):
        run_ranks(not_finite_on_one_rank, 2)
