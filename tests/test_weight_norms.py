"""Layers that normalise their own weights, over inputs that may be pruned: right under the law, or frozen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_residual import assert_law, drawn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from unets import scatter

import ebdiff


def normalised(x: Tensor, eps: float = 1e-2) -> Tensor:
    """To root mean square one over all dimensions but the first; a large epsilon, so that an error would show."""
    length = torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())), keepdim=True)
    return x / (eps + length * (length.numel() / x.numel()) ** 0.5)


class MagnitudePreserving(nn.Module):
    """A convolution whose weight is normalised in the forward, and for good while training, as in EDM2."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))

    def forward(self, x: Tensor, gain: float = 1) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.weight.copy_(normalised(self.weight))
        weight = normalised(self.weight) * (gain / self.weight[0].numel() ** 0.5)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)


class Standardised(nn.Conv2d):
    """Weights of mean zero and variance one in every output."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        variance = self.weight.var((1, 2, 3), unbiased=False, keepdim=True)
        y: Tensor = self._conv_forward(x, (self.weight - mean) * (variance + 1e-2).rsqrt(), self.bias)
        return y


LAYERS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "weight norm": lambda i, o, k: weight_norm(nn.Conv2d(i, o, k)),
    "weight norm of the inputs": lambda i, o, k: weight_norm(nn.Conv2d(i, o, k), dim=1),
    "one weight norm": lambda i, o, k: weight_norm(nn.Conv2d(i, o, k), dim=None),
    "parametrized weight norm": lambda i, o, k: parametrizations.weight_norm(nn.Conv2d(i, o, k)),
    "spectral norm": lambda i, o, k: spectral_norm(nn.Conv2d(i, o, k)),
    "parametrized spectral norm": lambda i, o, k: parametrizations.spectral_norm(nn.Conv2d(i, o, k)),
    "magnitude preserving": MagnitudePreserving,
    "standardised": Standardised,
}


class Three(nn.Module):
    def __init__(self, layer: Callable[[int, int, int], nn.Module]) -> None:
        super().__init__()
        self.a, self.b, self.c = layer(2, 8, 3), layer(8, 12, 1), layer(12, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(F.silu(self.b(F.silu(self.a(x)))))
        return y


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_what_is_normalised_over_removed_inputs_is_normalised_anew(name: str, training: bool) -> None:
    torch.manual_seed(0)
    model, x = scatter(Three(LAYERS[name])).double().train(training), torch.randn(2, 2, 9, 9).double()
    model(x)  # hooks leave weights with a graph behind
    plan = ebdiff.trace(model, x)
    assert sorted(space.size for space in plan) == [8, 12]
    small = assert_law(model, drawn(plan), x)
    assert sum(p.numel() for p in small.parameters()) == plan.parameters(drawn(plan))


def test_forced_normalisation_keeps_step_while_training() -> None:
    """Both write their normalised weights back, so that the second call sees what the first one made."""
    model, x = scatter(Three(MagnitudePreserving)).double().train(), torch.randn(2, 2, 9, 9).double()
    mask = drawn(ebdiff.trace(model, x))
    small, dense = ebdiff.shrink(model, mask), ebdiff.masked(model, mask)
    for _ in range(3):
        torch.testing.assert_close(small(x), dense(x), rtol=1e-12, atol=1e-12)
    kept = mask.kept("b.weight")
    expected = dense.b.weight[kept[0]][:, kept[1]]
    torch.testing.assert_close(small.b.weight, expected, rtol=1e-12, atol=1e-12)


def test_orthogonal_weights_are_frozen_with_the_reason() -> None:
    model = Three(lambda i, o, k: parametrizations.orthogonal(nn.Conv2d(i, o, k)))
    plan = ebdiff.trace(model, torch.randn(2, 2, 9, 9))
    assert len(plan) == 0
    assert "has no rule" in {axis.name: axis.reason for axis in plan.frozen}["a.bias[0]"]
