"""Forwards that read integers: head counts in every hiding place, and forwards that lie about theirs."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, HEAD_DIM = 12, 6, 4


class Attention(nn.Module):
    """[batch, tokens, WIDTH] to the same; subclasses say how many heads there are."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * HEADS * HEAD_DIM), nn.Linear(HEADS * HEAD_DIM, WIDTH)
        self.remember()

    def remember(self) -> None:
        """Set the attributes."""

    def heads(self, x: Tensor) -> int:
        raise NotImplementedError

    def scale(self, q: Tensor) -> float | None:
        return None

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).view(*x.shape[:2], 3, self.heads(x), -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k, v = parts
        return self.out(F.scaled_dot_product_attention(q, k, v, scale=self.scale(q)).transpose(1, 2).flatten(2))


class Namesakes(Attention):
    """Other attributes hold the same number, before and after the one that is read."""

    def remember(self) -> None:
        self.depth, self.num_heads, self.patches = HEADS, HEADS, [HEADS, HEADS]

    def heads(self, x: Tensor) -> int:
        return self.num_heads


class InTuple(Attention):
    def remember(self) -> None:
        self.layout = (3, HEADS, HEAD_DIM)

    def heads(self, x: Tensor) -> int:
        return self.layout[1]


class InList(Attention):
    def remember(self) -> None:
        self.layout = [[7, HEADS], [HEAD_DIM]]

    def heads(self, x: Tensor) -> int:
        return self.layout[0][1]


class Settings:
    """A plain object that modules share."""

    def __init__(self) -> None:
        self.heads, self.patch = HEADS, HEADS


SHARED = Settings()


class OnObject(Attention):
    def remember(self) -> None:
        self.settings = SHARED

    def heads(self, x: Tensor) -> int:
        return self.settings.heads


class ByWidth(Attention):
    """The number of heads comes from two attributes, one of which is a width."""

    def remember(self) -> None:
        self.inner_dim, self.head_dim = HEADS * HEAD_DIM, HEAD_DIM

    def heads(self, x: Tensor) -> int:
        return self.inner_dim // self.head_dim


class Both(Attention):
    """The view names both factors, and the softmax scale is a constant."""

    def remember(self) -> None:
        self.num_heads, self.head_dim, self.constant = HEADS, HEAD_DIM, HEAD_DIM**-0.5

    def scale(self, q: Tensor) -> float:
        return self.constant

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, scale=self.constant).transpose(1, 2)
        return self.out(mixed.reshape(*x.shape[:2], self.num_heads * self.head_dim))


class OfTheParent(nn.Module):
    """The module around the attention holds the number and passes it on."""

    class Inner(Attention):
        count = 0

        def heads(self, x: Tensor) -> int:
            return self.count

        def forward(self, x: Tensor, count: int = 0) -> Tensor:
            OfTheParent.Inner.count = count
            return super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.num_heads = self.Inner(), HEADS

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, self.num_heads)


class Lazy(Attention):
    """The number is found out in the first forward pass, and remembered."""

    def remember(self) -> None:
        self.count: int | None = None

    def heads(self, x: Tensor) -> int:
        if self.count is None:
            self.count = self.qkv.out_features // (3 * HEAD_DIM)
        return self.count


HONEST: list[type[nn.Module]] = [Namesakes, InTuple, InList, OnObject, ByWidth, Both, OfTheParent, Lazy]


class Literal(Attention):
    def heads(self, x: Tensor) -> int:
        return HEADS


class Absorbed(Attention):
    """Of two heads: a view takes a missing one out of head_dim, which stays whole, and no scale gives that away."""

    def remember(self) -> None:
        self.qkv, self.out = nn.Linear(WIDTH, 3 * 2 * HEAD_DIM), nn.Linear(2 * HEAD_DIM, WIDTH)

    def heads(self, x: Tensor) -> int:
        return 2

    def scale(self, q: Tensor) -> float:
        q[..., ::2]
        return 0.5


class Squared(Attention):
    """The number is computed from another, which holds no size of an axis."""

    def remember(self) -> None:
        self.area = HEADS**2

    def heads(self, x: Tensor) -> int:
        return int(self.area**0.5)


class InDictionary(Attention):
    def remember(self) -> None:
        self.sizes = {"heads": HEADS}

    def heads(self, x: Tensor) -> int:
        return self.sizes["heads"]


class Weighed(Attention):
    """Runs at any number of heads, and multiplies by it."""

    def remember(self) -> None:
        self.num_heads = HEADS

    def heads(self, x: Tensor) -> int:
        return self.num_heads

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.num_heads


class WeighedByTensor(Weighed):
    """The same, by way of a tensor made of the number."""

    def forward(self, x: Tensor) -> Tensor:
        return Attention.forward(self, x) / torch.tensor(float(self.num_heads))


LYING: list[type[nn.Module]] = [Literal, Squared, InDictionary, Weighed, WeighedByTensor]


class Blocks(nn.Module):
    """Blocks of one class in one state, but for what `kinds` says of each."""

    def __init__(self, *kinds: type[nn.Module]) -> None:
        super().__init__()
        self.embed, self.read = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList(kind() for kind in kinds)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = h + block(h)
        return self.read(h)


class Either(Attention):
    """A class whose instances differ in a flag: some read their number of heads, some a literal."""

    def __init__(self, honest: bool) -> None:
        self.honest = honest
        super().__init__()

    def remember(self) -> None:
        self.num_heads = HEADS

    def heads(self, x: Tensor) -> int:
        return self.num_heads if self.honest else HEADS


class Erratic(Blocks):
    """Now with one activation, now with another."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(20):
            x = x.relu() if random.random() < 0.5 else x.sigmoid()
        return super().forward(x)


class LiteralStart(nn.Module):
    """A cut of the right length at the wrong place: three parts, of which the middle one is read by numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.read = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 3)
        self.c = nn.Linear(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat((self.a(x), self.b(x), self.c(x)), -1)
        return self.read(h[..., 8:16])


def namespace(**values: Any) -> SimpleNamespace:
    """A plain object with these attributes."""
    return SimpleNamespace(**values)
