"""torch's less common layers: activations with weights, norms of single images, shuffles, products of two inputs."""

from __future__ import annotations

from typing import ClassVar

import torch
from foreign_nets import C, Image
from torch import Tensor, nn
from torch.nn import functional as F


class Slopes(Image):
    """A slope for every channel, then one for all."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.same = nn.PReLU(C), nn.PReLU()

    def middle(self, h: Tensor) -> Tensor:
        return self.same(h + self.each(h))


class GatedHalves(Image):
    """GLU as a function and as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.glu = nn.Conv2d(C // 2, 20, 1), nn.Conv2d(10, C, 1), nn.GLU(dim=-3)

    def middle(self, h: Tensor) -> Tensor:
        return self.b(self.glu(self.a(F.glu(h, 1))))


class InstanceNormed(Image):
    """Statistics of single images, nothing else."""

    options: ClassVar[dict[str, bool]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a = nn.InstanceNorm2d(C, **self.options), nn.Conv2d(C, C, 1)

    def middle(self, h: Tensor) -> Tensor:
        return self.a(F.silu(self.norm(h)))


class InstanceNormedAffine(InstanceNormed):
    options: ClassVar[dict[str, bool]] = {"affine": True}


class InstanceNormedRunning(InstanceNormed):
    options: ClassVar[dict[str, bool]] = {"affine": True, "track_running_stats": True}


class InstanceNormedRunningOnly(InstanceNormed):
    options: ClassVar[dict[str, bool]] = {"track_running_stats": True}


class PixelShuffled(Image):
    """A cell of the image into channels and, of others, back."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4 * C, 8, 1), nn.Conv2d(8, 4 * C, 1)

    def middle(self, h: Tensor) -> Tensor:
        return F.pixel_shuffle(self.b(F.silu(self.a(F.pixel_unshuffle(h, 2)))), 2)


class PixelShuffledAtOnce(Image):
    """Up and down with nothing between: each channel's cell is to stay whole."""

    def middle(self, h: Tensor) -> Tensor:
        return F.pixel_unshuffle(F.silu(F.pixel_shuffle(h, 2)), 2)


class ShuffledChannels(Image):
    """ShuffleNet's layer."""

    def __init__(self) -> None:
        super().__init__()
        self.shuffle = nn.ChannelShuffle(3)

    def middle(self, h: Tensor) -> Tensor:
        return self.shuffle(F.silu(h))


class BilinearPooled(Image):
    """A product of two pooled vectors weighs the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.q, self.both = nn.Linear(C, 7), nn.Linear(C, 5), nn.Bilinear(7, 5, C)

    def middle(self, h: Tensor) -> Tensor:
        pooled = h.mean((2, 3))
        return h * self.both(self.p(pooled), torch.sigmoid(self.q(pooled)))[..., None, None]


class Maxout(Image):
    """The largest of three pieces, which lie beside one another or apart."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(C, 3 * 8, 1), nn.Conv2d(8, 3 * C, 1)

    def middle(self, h: Tensor) -> Tensor:
        h = self.a(h).unflatten(1, (-1, 3)).max(2).values
        return torch.max(self.b(h).unflatten(1, (3, -1)).amin(1), -self.b(h).unflatten(1, (3, -1)).min(1)[0])


class MaxoutByLiteral(Image):
    """The number of units is written down."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(C, 3 * C, 1)

    def middle(self, h: Tensor) -> Tensor:
        y = self.a(h)
        return y.view(len(y), C, 3, *y.shape[2:]).max(2).values


class AcrossChannels(Image):
    """A response normalised over neighbouring channels: who is next to whom would change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LocalResponseNorm(3)

    def middle(self, h: Tensor) -> Tensor:
        return self.norm(h)


class PickedRows(Image):
    """A table of rows, picked by an index, is added: for every image, and for every position."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.places = nn.Parameter(torch.ones(9, C)), nn.Parameter(torch.ones(1, C, 9, 2))
        self.register_buffer("order", torch.tensor([4, 1]))

    def middle(self, h: Tensor) -> Tensor:
        near, far = torch.arange(6)[:, None], self.order[:1].expand(6)[None]
        places = self.places.index_select(-1, torch.tensor([1]))[..., 0]
        return h + self.rows[self.order][:, :, None, None] + self.places[:, :, near, far % 2] + places[:, :, :6, None]


class ExpandedByWidth(Image):
    """One number is spread over as many channels as the module remembers; removed ones are to get none of it."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.shift, self.scale = C, nn.Parameter(torch.ones(1)), nn.Conv2d(C, C, 1)

    def middle(self, h: Tensor) -> Tensor:
        return F.silu(self.scale(h) + self.shift.expand(self.width)[:, None, None])


class ExpandedIntoProducts(ExpandedByWidth):
    """The channels are added up in a product of two of them, in which the spread number would count."""

    def middle(self, h: Tensor) -> Tensor:
        spread = (self.scale(h) + self.shift.expand(self.width)[:, None, None]).flatten(2)
        return h * (spread.transpose(1, 2) @ spread).mean((1, 2))[:, None, None, None]
