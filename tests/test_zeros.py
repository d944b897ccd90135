"""Products of two activations count whatever removed channels hold: where that may not be zero, the axis stays."""

from __future__ import annotations

from collections.abc import Callable

import laws
import pytest
import torch
from test_residual import drawn
from torch import Tensor, nn
from torch.nn import functional as F

import ebdiff

KEEPING: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda x: x,
    "silu": F.silu,
    "relu squared": lambda x: x.relu() ** 2,
    "gated": lambda x: x * x.sigmoid(),
    "scaled": lambda x: 0.5 * x / (1 + x.abs()),
}
LEAKING: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "elu + 1": lambda x: F.elu(x) + 1,
    "exp": torch.exp,
    "1 - tanh": lambda x: 1 - x.tanh(),
    "reciprocal": lambda x: 1 / (1 + x.square()),
}


class LinearAttention(nn.Module):
    def __init__(self, feature: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(4, 3)
        self.feature = feature

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.feature(self.q(x)) @ self.feature(self.k(x)).transpose(1, 2) @ x)
        return y


class PositiveWeights(nn.Module):
    """Both the activations and the weights that are multiplied differ from zero where a channel is removed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.weight, self.bias = nn.Linear(4, 8), nn.Parameter(torch.randn(3, 8)), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.a(x).sigmoid(), self.weight.exp(), self.bias)


@pytest.mark.parametrize("feature", KEEPING)
def test_zero_to_zero_prunes(feature: str) -> None:
    model, x = LinearAttention(KEEPING[feature]).double(), torch.randn(2, 5, 4).double()
    plan = ebdiff.trace(model, x)
    assert [(space.name, space.size) for space in plan] == [("q", 8)]
    laws.assert_law(model, {"x": x}, drawn(plan))


@pytest.mark.parametrize("feature", LEAKING)
def test_zero_to_something_is_frozen_with_the_reason(feature: str) -> None:
    plan = ebdiff.trace(LinearAttention(LEAKING[feature]), torch.randn(2, 5, 4))
    assert len(plan) == 0
    assert "zero does not map to zero" in {axis.name: axis.reason for axis in plan.frozen}["q.weight[0]"]


def test_weights_made_of_parameters_count_as_activations() -> None:
    plan = ebdiff.trace(nn.Sequential(PositiveWeights()), torch.randn(2, 4))
    assert len(plan) == 0
    assert "zero does not map to zero" in {axis.name: axis.reason for axis in plan.frozen}["0.weight[1]"]


def test_one_side_that_is_zero_is_enough() -> None:
    class Half(LinearAttention):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.out(self.q(x) @ self.k(x).exp().transpose(1, 2) @ x)
            return y

    model, x = Half(torch.exp).double(), torch.randn(2, 5, 4).double()
    plan = ebdiff.trace(model, x)
    assert [space.size for space in plan] == [8]
    laws.assert_law(model, {"x": x}, drawn(plan))
