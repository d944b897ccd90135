"""Forwards as others write them: integers, views, sharing and indexing that a tracer must follow or freeze."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops.layers.torch import Rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

C = 12


class Image(nn.Module):
    """[batch, 3, 6, 6] -> the same; subclasses say what happens to C channels in between."""

    def __init__(self, inner: int = C) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, C, 3, padding=1), nn.Conv2d(inner, 3, 1)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.middle(self.first(x)))

    def middle(self, h: Tensor) -> Tensor:
        raise NotImplementedError


# Pieces ---------------------------------------------------------------------------------------------------------------


class OneHalfUsed(Image):
    """Two chunks, of which one reaches the output: they must stay equally wide all the same."""

    def __init__(self) -> None:
        super().__init__(C // 2)
        self.log_variance: Tensor | None = None

    def middle(self, h: Tensor) -> Tensor:
        mean, self.log_variance = h.chunk(2, 1)
        return mean


class UnequalChunks(Image):
    """Twelve channels in chunks of five, five and two."""

    def middle(self, h: Tensor) -> Tensor:
        return torch.cat([F.silu(part) for part in h.split(5, 1)], 1)


class SplitByAttribute(Image):
    """Sizes that the module remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [8, 4]

    def middle(self, h: Tensor) -> Tensor:
        a, b = h.split(self.sizes, 1)
        return torch.cat((F.silu(a), F.relu(b)), 1)


class HalvesBySlicing(Image):
    """A gated unit whose halves are slices, the middle computed from the tensor."""

    def __init__(self) -> None:
        super().__init__(C // 2)

    def middle(self, h: Tensor) -> Tensor:
        half = h.shape[1] // 2
        return h[:, :half] * F.gelu(h[:, half:])


class IndependentHalves(HalvesBySlicing):
    """The halves go to layers of their own, so nothing else ties their widths."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(C // 2, 6, 1), nn.Conv2d(C // 2, 6, 1)

    def middle(self, h: Tensor) -> Tensor:
        half = h.shape[1] // 2
        return self.a(h[:, :half]) + self.b(h[:, half:])


class LiteralSlice(Image):
    """The first four channels are treated apart."""

    def middle(self, h: Tensor) -> Tensor:
        return torch.cat((F.silu(h[:, :4]), h[:, 4:]), 1)


class WrittenInPlace(Image):
    """A fresh buffer filled slice by slice."""

    def middle(self, h: Tensor) -> Tensor:
        y = torch.zeros_like(h)
        y[:, :4] = F.silu(h[:, :4])
        y[:, 4:] = h[:, 4:]
        return y


class Gated(Image):
    """SwiGLU over channels, its two halves from one fused layer."""

    def __init__(self) -> None:
        super().__init__(16)
        self.fused = nn.Conv2d(C, 32, 1)

    def middle(self, h: Tensor) -> Tensor:
        gate, value = self.fused(h).chunk(2, 1)
        return F.silu(gate) * value


class Modulated(Image):
    """AdaGN: scale and shift from a mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.both = nn.GroupNorm(3, C), nn.Linear(C, 2 * C)

    def middle(self, h: Tensor) -> Tensor:
        scale, shift = self.both(h.mean((2, 3)))[..., None, None].chunk(2, 1)
        return F.silu(self.norm(h) * (1 + scale) + shift)


class ModulatedBySlices(Modulated):
    """The same, cut at the width of the norm."""

    def middle(self, h: Tensor) -> Tensor:
        both, n = self.both(h.mean((2, 3)))[..., None, None], self.norm.num_channels
        return F.silu(self.norm(h) * (1 + both[:, :n]) + both[:, n:])


# Shapes ---------------------------------------------------------------------------------------------------------------


class SpaceToDepth(Image):
    """einops' Rearrange down, a pixel shuffle up."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.a = Rearrange("b c (h p) (w q) -> b (c p q) h w", p=2, q=2), nn.Conv2d(4 * C, 8, 1)
        self.b, self.up = nn.Conv2d(8, 4 * C, 1), nn.PixelShuffle(2)

    def middle(self, h: Tensor) -> Tensor:
        return self.up(self.b(F.silu(self.a(self.down(h)))))


class ChannelShuffle(Image):
    """ShuffleNet's transpose of groups and channels."""

    def middle(self, h: Tensor) -> Tensor:
        return h.unflatten(1, (3, C // 3)).transpose(1, 2).flatten(1, 2)


class ConvNeXt(Image):
    """Depthwise, then a layer norm and an MLP over the channels at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(C, C, 3, padding=1, groups=C), nn.LayerNorm(C)
        self.a, self.b, self.gamma = nn.Linear(C, 20), nn.Linear(20, C), nn.Parameter(torch.ones(C))

    def middle(self, h: Tensor) -> Tensor:
        y = self.norm(self.depthwise(h).permute(0, 2, 3, 1))
        return h + (self.gamma * self.b(F.gelu(self.a(y)))).permute(0, 3, 1, 2)


class SqueezeExcite(Image):
    """Channels weighed by a small network of their means."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.slope = nn.Linear(C, 5), nn.Linear(5, C), nn.PReLU(C)

    def middle(self, h: Tensor) -> Tensor:
        return self.slope(h) * torch.sigmoid(self.b(F.relu(self.a(h.mean((2, 3))))))[..., None, None]


class Repeated(Image):
    """The channels twice, one after the other."""

    def __init__(self) -> None:
        super().__init__(2 * C)

    def middle(self, h: Tensor) -> Tensor:
        return h.repeat(1, 2, 1, 1)


class Gathered(Image):
    """Channels picked by an index that the module keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.randperm(C))

    def middle(self, h: Tensor) -> Tensor:
        return h[:, self.order]


class Transposed(Image):
    """Down by a strided convolution, up by a transposed one, and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm = nn.Conv2d(C, 10, 2, stride=2), nn.BatchNorm2d(10)
        self.up, self.instance = nn.ConvTranspose2d(10, C, 2, stride=2), nn.InstanceNorm2d(C, affine=True)

    def middle(self, h: Tensor) -> Tensor:
        return self.instance(self.up(F.silu(self.norm(self.down(h)))))


class Recurrent(Image):
    """Rows read by a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(C, C, batch_first=True)

    def middle(self, h: Tensor) -> Tensor:
        y, _ = self.gru(h.mean(2).transpose(1, 2))
        return h + y.transpose(1, 2)[:, :, None]


# Structure ------------------------------------------------------------------------------------------------------------


class Shared(Image):
    """One layer called three times, once on the sum of two others' outputs, and a weight used by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.twin = nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 1)
        self.twin.weight = self.again.weight

    def middle(self, h: Tensor) -> Tensor:
        h = F.silu(self.again(h))
        h = F.silu(self.again(h) + self.twin(h))
        return F.conv2d(self.again(h), self.again.weight)


class LongSkips(Image):
    """U-ViT's long skips: popped from a list, concatenated, and projected."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(C, C, 1) for _ in range(2))
        self.up = nn.ModuleDict({f"stage {i}": nn.Conv2d(2 * C, C, 1) for i in range(2)})

    def middle(self, h: Tensor) -> Tensor:
        skips = []
        for layer in self.down:
            h = F.silu(layer(h))
            skips.append(h)
        for name in self.up:
            h = F.silu(self.up[name](torch.cat([h, skips.pop()], dim=1)))
        return h


class Recomputed(LongSkips):
    """The same under torch's older, re-entrant checkpoint."""

    def middle(self, h: Tensor) -> Tensor:
        return checkpoint(super().middle, h, use_reentrant=True)


@dataclass
class Output:
    """What a library returns."""

    image: Tensor
    extra: dict[str, tuple[Tensor, ...]]


class Returning(Image):
    """A dataclass that holds a dict of tuples; some of it is a hidden layer, which must stay whole."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(C, 8, 1), nn.Conv2d(8, C, 1)

    def forward(self, x: Tensor) -> Output:
        h = self.first(x)
        hidden = self.a(h)
        return Output(self.last(self.b(F.silu(hidden)) + h), {"hidden": (hidden,)})
