"""Networks of a few weights whose plans are written by hand."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from ebdiff.pruning.plan import ChannelPlan, ChannelSpace, Member, Norm


def mlp(*widths: int) -> tuple[nn.Sequential, ChannelPlan]:
    """Linear layers without biases, and the plan of the axes between them: spaces "h1", "h2", ..."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in pairwise(widths)))
    inner = range(1, len(widths) - 1)
    spaces = tuple(
        ChannelSpace(f"h{i}", widths[i], (Member(f"{i - 1}.weight", 0), Member(f"{i}.weight", 1))) for i in inner
    )
    shapes = {f"{i}.weight": (widths[i + 1], widths[i]) for i in range(len(widths) - 1)}
    known = {i: f"h{i}" for i in inner}
    cost = []
    for i in range(len(widths) - 1):
        ends = (i, i + 1)
        coefficient = 1.0
        for end in ends:
            coefficient *= 1 if end in known else widths[end]
        cost.append((coefficient, tuple(known[end] for end in ends if end in known)))
    return layers, ChannelPlan(spaces, (), shapes, cost=tuple(cost))


def joined(a: int, b: int, groups: int) -> ChannelPlan:
    """Spaces "a" and "b" side by side in one group normalisation "norm", as after a skip connection."""
    spaces = (
        ChannelSpace("a", a, (Member("a.weight", 0), Member("norm.weight", 0))),
        ChannelSpace("b", b, (Member("b.weight", 0), Member("norm.weight", 0, offset=a))),
    )
    shapes = {"a.weight": (a, 3), "b.weight": (b, 3), "norm.weight": (a + b,)}
    size = (a + b) // groups
    return ChannelPlan(spaces, (), shapes, norms=(Norm("norm", (size,) * groups),), cost=((3.0, ("a",)), (3.0, ("b",))))


def hidden(*scores: float) -> tuple[nn.Sequential, ChannelPlan]:
    """An mlp(1, n, 1) whose channel c has the L1 magnitude scores[c]."""
    model, plan = mlp(1, len(scores), 1)
    rank(model, scores)
    return model, plan


def rank(model: nn.Sequential, scores: tuple[float, ...] | list[float]) -> None:
    """Give channel c of an mlp(1, n, 1) the L1 magnitude scores[c]."""
    with torch.no_grad():
        values = torch.tensor(scores)
        model[0].weight.copy_(values[:, None])  # type: ignore[operator, union-attr]
        model[1].weight.copy_(values[None, :])  # type: ignore[operator, union-attr]
