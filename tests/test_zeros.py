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
    "times a number": lambda x: x * torch.ones(1, dtype=x.dtype),
    "less itself": lambda x: torch.add(x, x, alpha=-0.5),
    "normalised over tokens": lambda x: F.normalize(x, dim=1),
    "root with epsilon": lambda x: x * (x.square().sum(1, keepdim=True) + 1e-6).rsqrt(),
}
LEAKING: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "elu + 1": lambda x: F.elu(x) + 1,
    "exp": torch.exp,
    "1 - tanh": lambda x: 1 - x.tanh(),
    "reciprocal": lambda x: 1 / (1 + x.square()),
    "plus a number in a tensor": lambda x: x + torch.ones(1, dtype=x.dtype),
    "at least a number": lambda x: torch.maximum(x, torch.tensor(0.2, dtype=x.dtype)),
    "ones_like": lambda x: torch.ones_like(x) - x,
    "full_like": lambda x: x + torch.full_like(x, 0.5),
    "softmax over tokens": lambda x: x.softmax(1),
    "log softmax over tokens": lambda x: x.log_softmax(1),
    "logsumexp over tokens": lambda x: x + x.logsumexp(1, keepdim=True),
    "written in place": lambda x: _first_set(x.clone()),
}
SINGULAR: dict[str, Callable[[Tensor], Tensor]] = {
    "div": lambda x: x / x.sum(1, keepdim=True),
    "sqrt": lambda x: x * x.square().sum(1, keepdim=True).sqrt(),
    "rsqrt": lambda x: x * x.square().sum(1, keepdim=True).rsqrt(),
    "pow": lambda x: x * x.square().sum(1, keepdim=True) ** -0.5,
    "log": lambda x: x.abs().log(),
    "addcdiv": lambda x: torch.addcdiv(x, x, x.abs()),
    "fmod": lambda x: torch.fmod(x, x.sum(1, keepdim=True)),
    "remainder": lambda x: torch.remainder(x, x.sum(1, keepdim=True)),
    "hypot": lambda x: torch.hypot(x, x.sum(1, keepdim=True)),
    "lgamma": lambda x: x.lgamma(),
    "digamma": lambda x: x.digamma(),
}


def _first_set(x: Tensor) -> Tensor:
    x[:, 0] = 1.0
    return x


class LinearAttention(nn.Module):
    def __init__(self, feature: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(4, 3)
        self.feature = feature

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.feature(self.q(x)) @ self.feature(self.k(x)).transpose(1, 2) @ x)
        return y


class Mixed(LinearAttention):
    """Queries and keys whose tokens a linear layer mixes: its bias is there in every channel."""

    def __init__(self, bias: bool) -> None:
        super().__init__(F.relu)
        self.tokens = nn.Linear(5, 5, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (self.tokens(made(x).transpose(1, 2)).transpose(1, 2) for made in (self.q, self.k))
        y: Tensor = self.out(q @ k.transpose(1, 2) @ x)
        return y


class Shifted(LinearAttention):
    """A learned number that every channel is shifted by, as StarReLU's."""

    def __init__(self) -> None:
        super().__init__(F.relu)
        self.shift = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        q, k = (self.feature(made(x)) + self.shift for made in (self.q, self.k))
        y: Tensor = self.out(q @ k.transpose(1, 2) @ x)
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


@pytest.mark.parametrize("name", SINGULAR)
def test_what_has_no_value_at_zero_is_frozen_with_the_reason(name: str) -> None:
    """The masked model would be NaN, or its gradients."""
    plan = ebdiff.trace(LinearAttention(SINGULAR[name]), torch.randn(2, 5, 4))
    assert len(plan) == 0
    reason = {axis.name: axis.reason for axis in plan.frozen}["q.weight[0]"]
    assert reason.startswith(f"{name} in LinearAttention")
    assert "no value or no slope at the zeros" in reason


@pytest.mark.parametrize("model", [Shifted(), Mixed(bias=True)], ids=["shifted", "mixed"])
def test_what_is_added_to_every_channel_is_there_in_removed_ones(model: nn.Module) -> None:
    plan = ebdiff.trace(model, torch.randn(2, 5, 4))
    assert "q" not in plan
    assert "zero does not map to zero" in {axis.name: axis.reason for axis in plan.frozen}["q.weight[0]"]


def test_tokens_that_are_mixed_without_a_bias_leave_channels_zero() -> None:
    model, x = Mixed(bias=False).double(), torch.randn(2, 5, 4).double()
    plan = ebdiff.trace(model, x)
    assert [space.name for space in plan] == ["q"]
    laws.assert_law(model, {"x": x}, drawn(plan))


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
