"""Scores of channels as computed by hand; gradients stay the user's; what does not fit is refused."""

import pytest
import torch
from toys import hidden, mlp

from ebdiff import importance
from ebdiff.errors import EbdiffError


def two_layers():
    """h = W1 x with W1 = [[1, 2], [3, 4]]; y = W2 h with W2 = [[5, 6]]."""
    model, plan = mlp(2, 2, 1)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        model[1].weight.copy_(torch.tensor([[5.0, 6.0]]))
    return model, plan


def close(scores, expected):
    torch.testing.assert_close(scores["h1"], torch.tensor(expected) / (sum(expected) / len(expected)))


def test_magnitudes_by_hand():
    model, plan = two_layers()
    close(importance(model, plan), [(1 + 4 + 25) / 2, (9 + 16 + 36) / 2])
    close(importance(model, plan, "magnitude-l1"), [(3 + 5) / 2, (7 + 6) / 2])


def test_taylor_and_diff_pruning_by_hand():
    model, plan = two_layers()
    x = torch.tensor([1.0, -1.0])  # h = [-1, -1]: dL/dW2 = h, dL/dW1 = W2' x'
    close(importance(model, plan, "taylor", [model(x).sum()]), [5.0, 6.0])
    both = importance(model, plan, "diff-pruning", [-model(x).sum()])
    close(both, [(5 + 10 + 5) / 2, (18 + 24 + 6) / 2])
    signed = importance(model, plan, "taylor", (model(y).sum() for y in (x, -x)))
    assert not signed["h1"].any(), "gradients are summed over losses before the absolute value"


def test_diff_pruning_stops_at_the_first_loss_below_its_threshold():
    model, plan = two_layers()
    seen = []

    def losses(*values):
        for value in values:
            seen.append(value)
            y = model(torch.tensor([value, 1.0])).sum()
            yield value * y / y.detach()

    found = importance(model, plan, "diff-pruning", losses(1.0, 0.06, 2.0, 0.06, 9.0))
    assert seen == [1.0, 0.06, 2.0, 0.06], "0.06 is above 5% of 1 and below 5% of 2"
    expected = importance(model, plan, "diff-pruning", losses(1.0, 0.06, 2.0), threshold=0.0)
    torch.testing.assert_close(found, expected)
    importance(model, plan, "taylor", losses(1.0, -1.0, 0.0))
    assert seen[-3:] == [1.0, -1.0, 0.0], "Taylor takes every loss, whatever its sign"


def test_importance_leaves_gradients_alone():
    model, plan = two_layers()
    model[0].weight.grad = torch.full((2, 2), 7.0)
    importance(model, plan, "taylor", [model(torch.ones(2)).sum()])
    importance(model, plan)
    assert model[0].weight.grad.eq(7).all()
    assert model[1].weight.grad is None


def test_importance_refuses_what_does_not_fit():
    model, plan = two_layers()
    for method, losses in (("taylor", None), ("taylor", []), ("magnitude", []), ("beauty", None)):
        with pytest.raises(EbdiffError, match="importance"):
            importance(model, plan, method, losses)
    with pytest.raises(EbdiffError, match="another architecture"):
        importance(hidden(1, 2, 3)[0], plan)
    x, (other, _) = torch.ones(2), two_layers()
    for method in ("taylor", "diff-pruning"):
        with pytest.raises(EbdiffError, match="with the model that was passed"):
            importance(model, plan, method, [other(x).sum()])
        for loss in (torch.tensor(1.0), model(x).sum().detach(), model(x).expand(3), 1.0):
            with pytest.raises(EbdiffError, match="scalar losses with a graph"):
                importance(model, plan, method, [loss])
    one = importance(model, plan, "taylor", [model(x).sum()])
    torch.testing.assert_close(importance(model, plan, "taylor", model(x).sum()), one)


def test_random_scores_follow_their_generator():
    model, plan = two_layers()
    a, b, c = (importance(model, plan, "random", generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a["h1"], b["h1"])
    assert not torch.equal(a["h1"], c["h1"])
