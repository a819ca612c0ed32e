import pytest
import torch
from models import CASES
from torch import nn
from torch.utils.checkpoint import checkpoint

from outgrow.runtime.split_backward import Deferred, SplitBackward, run_backward


@pytest.mark.parametrize("name", sorted(CASES))
def test_both_parts_together_are_the_whole_backward_pass(name: str):
    case = CASES[name]
    whole, split = case.model(), case.model()
    deferred = Deferred()
    for step in range(3):
        batch = case.batch(step, 4)
        case.loss(whole(*batch[:-1]), batch[-1]).backward()
        with SplitBackward(deferred):
            loss = case.loss(split(*batch[:-1]), batch[-1])
            run_backward([loss], [torch.ones_like(loss)])
        assert len(deferred)
        missing = sum(p.grad is None for p in split.parameters()) > sum(p.grad is None for p in whole.parameters())
        assert missing == (step == 0)
        deferred.finish()
        for one, other in zip(whole.parameters(), split.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None)
            if one.grad is None or other.grad is None:
                continue
            if step == 0 and name in ("gpt", "conv", "lstm"):  # where no weight is used twice
                assert torch.equal(one.grad, other.grad)  # later ones are added without a product of their own
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-6 * one.grad.abs().max().item())


def test_torch_s_split_gives_the_same():
    from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    theirs = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    theirs.load_state_dict(ours.state_dict())
    x, y = (torch.ones(5, 4, requires_grad=True) for _ in range(2))
    deferred = Deferred()
    with SplitBackward(deferred):
        out = ours(x)
        run_backward([out], [torch.ones_like(out)])
    assert ours[0].weight.grad is None
    deferred.finish()
    result = theirs(y)
    gradients, groups = stage_backward_input([result], [torch.ones_like(result)], [y], theirs.parameters())
    stage_backward_weight(theirs.parameters(), groups)
    assert torch.equal(x.grad, gradients[0])
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-6)


def test_checkpoints_of_the_model_s_own_save_the_same_tensors_again():
    layer, x = nn.Linear(4, 4), torch.ones(2, 4, requires_grad=True)
    deferred = Deferred()
    with SplitBackward(deferred):
        out = checkpoint(layer, x, use_reentrant=False)
        run_backward([out], [torch.ones_like(out)])
    assert len(deferred) == 1
    deferred.finish()
    assert torch.equal(layer.weight.grad, torch.full((4, 4), 2.0))


def test_at_once_nothing_waits():
    layer = nn.Linear(4, 4)
    with SplitBackward(Deferred(at_once=True)):
        layer(torch.ones(2, 4)).sum().backward()
    assert torch.equal(layer.weight.grad, torch.full((4, 4), 2.0))
