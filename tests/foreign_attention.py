"""Attention as others write it: every way of making heads that a tracer meets, none of them diffusers'."""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

WIDTH, HEADS, HEAD_DIM = 16, 4, 4


class Tokens(nn.Module):
    """[batch, 6, 5] -> [batch, 6, 3]; subclasses say how tokens mix in a residual stream of WIDTH."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.read = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.num_heads, self.head_dim = HEADS, HEAD_DIM

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        return self.read(h + self.mix(h))

    def mix(self, h: Tensor) -> Tensor:
        raise NotImplementedError


class Projections(Tokens):
    """Separate q, k, v and out."""

    def __init__(self, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, kv_heads * HEAD_DIM)
        self.v, self.o = nn.Linear(WIDTH, kv_heads * HEAD_DIM), nn.Linear(WIDTH, WIDTH)
        self.kv_heads = kv_heads

    def heads_of(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def mix(self, h: Tensor) -> Tensor:
        y = self.attend(*(self.heads_of(part(h)) for part in (self.q, self.k, self.v)))
        return self.o(y.transpose(1, 2).flatten(2))


class ByHeadCount(Projections):
    """The view names the number of heads and leaves head_dim open."""

    def heads_of(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.num_heads, -1).transpose(1, 2)


class Explicit(Projections):
    """Softmax by hand, with the scale taken from the tensor's own last axis."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


class GroupedQuery(Projections):
    """Two heads of k and v for four of q."""

    def __init__(self) -> None:
        super().__init__(kv_heads=2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        times = self.num_heads // self.kv_heads
        return super().attend(q, k.repeat_interleave(times, 1), v.repeat_interleave(times, 1))


class GroupedQueryInSDPA(GroupedQuery):
    """The same, left to torch."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


class NormedQueryKey(Projections):
    """A layer norm over head_dim of q and of k."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.LayerNorm(HEAD_DIM), nn.RMSNorm(HEAD_DIM)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(self.q_norm(q), self.k_norm(k), v)


class Rotary(Projections):
    """Rotary positions by halves: head_dim is matched with a table, heads are not."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.arange(6.0)[:, None] * torch.tensor([1.0, 0.1]).repeat(2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(self.turn(q), self.turn(k), v)

    def turn(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * self.cos + torch.cat((-b, a), -1) * self.sin


class ComplexRotary(Rotary):
    """Rotary positions by multiplying complex numbers."""

    def turn(self, x: Tensor) -> Tensor:
        turns = torch.complex(self.cos[:, :2], self.sin[:, :2])
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(-2)


class HeadByHead(Projections):
    """A Python loop over slices of head_dim."""

    def mix(self, h: Tensor) -> Tensor:
        q, k, v, d = self.q(h), self.k(h), self.v(h), self.head_dim
        parts = [slice(i * d, i * d + d) for i in range(self.num_heads)]
        y = torch.cat([self.attend(q[..., s], k[..., s], v[..., s]) for s in parts], -1)
        return self.o(y)


class Fused(Tokens):
    """timm's layout: one linear layer whose rows are [3, heads, head_dim]."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = HEAD_DIM**-0.5
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.gamma = nn.Parameter(torch.ones(WIDTH))

    def split(self, h: Tensor) -> tuple[Tensor, ...]:
        batch, tokens, _ = h.shape
        return self.qkv(h).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)

    def mix(self, h: Tensor) -> Tensor:
        q, k, v = self.split(self.norm1(h))
        y = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        h = h + self.gamma * self.proj(y.transpose(1, 2).reshape(*h.shape[:2], -1))
        return h + self.fc2(F.gelu(self.fc1(self.norm2(h))))


class FusedHeadsFirst(Fused):
    """The rows are [heads, 3, head_dim], as in GPT-NeoX."""

    def split(self, h: Tensor) -> tuple[Tensor, ...]:
        qkv = self.qkv(h).view(*h.shape[:2], self.num_heads, 3 * self.head_dim)
        return tuple(part.transpose(1, 2) for part in qkv.chunk(3, -1))


class FusedHeadsMiddle(Fused):
    """[heads, 3, head_dim] again, as five axes."""

    def split(self, h: Tensor) -> tuple[Tensor, ...]:
        qkv = self.qkv(h).view(*h.shape[:2], self.num_heads, 3, self.head_dim)
        return qkv.permute(3, 0, 2, 1, 4).unbind(0)


class FusedSplit(Fused):
    """Cut by the width it remembers, then by the number of heads."""

    def split(self, h: Tensor) -> tuple[Tensor, ...]:
        parts = self.qkv(h).split(self.num_heads * self.head_dim, dim=-1)
        return tuple(p.view(*h.shape[:2], self.num_heads, self.head_dim).transpose(1, 2) for p in parts)


class Einops(Fused):
    """rearrange with a named number of heads, and einsum for both products."""

    def mix(self, h: Tensor) -> Tensor:
        parts = self.qkv(h).chunk(3, dim=-1)
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=self.num_heads) for part in parts)
        weights = einsum(q * self.scale, k, "b h i d, b h j d -> b h i j").softmax(-1)
        return self.proj(rearrange(einsum(weights, v, "b h i j, b h j d -> b h i d"), "b h n d -> b n (h d)"))


class Linear(Fused):
    """Attention that is linear in the tokens: softmax over head_dim of q and over the tokens of k."""

    def mix(self, h: Tensor) -> Tensor:
        q, k, v = self.split(h)
        context = k.softmax(-2).transpose(-2, -1) @ v
        return self.proj((q.softmax(-1) @ context).transpose(1, 2).flatten(2))


class Joint(Projections):
    """Learned text tokens join along the sequence, and leave again."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Parameter(torch.randn(1, 2, WIDTH))
        self.add_q, self.add_k, self.add_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def mix(self, h: Tensor) -> Tensor:
        text = self.text.expand(len(h), -1, -1)
        both = [
            self.heads_of(torch.cat((extra(text), own(h)), 1))
            for extra, own in ((self.add_q, self.q), (self.add_k, self.k), (self.add_v, self.v))
        ]
        return self.o(self.attend(*both).transpose(1, 2).flatten(2)[:, text.shape[1] :])


class Parallel(Tokens):
    """Attention and an MLP from one projection, and one projection back (Flux's single blocks, ViT-22B)."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = [3 * WIDTH, 24]
        self.both, self.proj = nn.Linear(WIDTH, sum(self.parts)), nn.Linear(WIDTH + 24, WIDTH)

    def mix(self, h: Tensor) -> Tensor:
        qkv, hidden = self.both(h).split(self.parts, -1)
        q, k, v = (p.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for p in qkv.chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(torch.cat((y, F.gelu(hidden)), -1))


class Modulated(Fused):
    """DiT's block: six chunks of one linear layer scale, shift and gate the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(5, 6 * WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        a, b, gate, c, d, second = self.modulation(x.mean(1))[:, None].chunk(6, -1)
        h = self.embed(x)
        q, k, v = self.split(self.norm1(h) * (1 + a) + b)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = h + gate * self.proj(y)
        return self.read(h + second * self.fc2(F.gelu(self.fc1(self.norm2(h) * (1 + c) + d))))


class Checkpointed(Fused):
    """Activations are recomputed; in train mode only, as everywhere."""

    def mix(self, h: Tensor) -> Tensor:
        inner: Callable[[Tensor], Tensor] = super().mix
        return checkpoint(inner, h, use_reentrant=False) if self.training else inner(h)


class MultiHead(Tokens):
    """nn.MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def mix(self, h: Tensor) -> Tensor:
        return self.attention(h, h, h, need_weights=False)[0]


class MultiHeadWithWeights(MultiHead):
    """Other widths of k and v, and the averaged weights asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, kdim=5, vdim=5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        y, weights = self.attention(*(t.transpose(0, 1) for t in (h, x, x)))
        return self.read(h + y.transpose(0, 1)) + weights.sum(-1, keepdim=True)


class EncoderLayers(Tokens):
    """nn.TransformerEncoderLayer, before and after its norms."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 24, dropout=0.0, batch_first=True, norm_first=first)
            for first in (True, False)
        )

    def mix(self, h: Tensor) -> Tensor:
        for layer in self.layers:
            h = layer(h)
        return h
