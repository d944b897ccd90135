"""Forwards in which a number of channels becomes a factor: norms of weights, of pixels, of concatenations."""

from __future__ import annotations

from typing import Any

import torch
from foreign_nets import C, Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations


class ScaledByWidth(Image):
    """A factor computed from the number of channels."""

    def middle(self, h: Tensor) -> Tensor:
        return h * h.shape[1] ** -0.5


class MagnitudePreservingCat(Image):
    """Two branches weighed by their widths (EDM2's equation 103)."""

    def __init__(self) -> None:
        super().__init__(C + 8)
        self.other = nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> Any:
        a, b = self.first(x), self.other(x)
        n, m = a.shape[1], b.shape[1]
        return self.last((n + m) ** 0.5 * torch.cat((a / n**0.5, b / m**0.5), 1))


class PixelNorm(Image):
    """Channels divided by their root mean square."""

    def middle(self, h: Tensor) -> Tensor:
        return F.normalize(h, dim=1) * h.shape[1] ** 0.5


class EqualisedConv(nn.Module):
    """A convolution that normalises its weight over the fan-in on every call."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3))
        self.fan_in = inputs * 9

    def forward(self, x: Tensor) -> Tensor:
        norm = self.weight.flatten(1).norm(dim=1)[:, None, None, None]
        return F.conv2d(x, self.weight / norm * (self.weight[0].numel() / self.fan_in) ** 0.5, padding=1)


class Equalised(Image):
    """Two of them between ordinary ones."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = EqualisedConv(C, 8), EqualisedConv(8, C)

    def middle(self, h: Tensor) -> Tensor:
        return self.b(F.silu(self.a(h)))


class WeightNormed(Image):
    """torch's weight norm, as a parametrization, and its spectral norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a = parametrizations.weight_norm(nn.Conv2d(C, 8, 1))
        self.b = parametrizations.spectral_norm(nn.Conv2d(8, C, 1))

    def middle(self, h: Tensor) -> Tensor:
        return self.b(F.silu(self.a(h)))


class WeightStandardised(nn.Conv2d):
    """A convolution whose filters are centred and scaled on every call."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        deviation = self.weight.var((1, 2, 3), keepdim=True, unbiased=False).add(1e-5).sqrt()
        return F.conv2d(x, (self.weight - mean) / deviation, self.bias, padding=1)


class Standardised(Image):
    """As in Google's BiT, before a group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = WeightStandardised(C, 8, 3), nn.GroupNorm(2, 8)
        self.b = nn.Conv2d(8, C, 1)

    def middle(self, h: Tensor) -> Tensor:
        return self.b(F.silu(self.norm(self.a(h))))
