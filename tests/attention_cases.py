"""Attentions over blocks, and what every implementation of them has to give."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ebdiff.ops import BlockMask
from ebdiff.ops import sparse_attention_reference as reference
from ebdiff.ops.sparse_attention_reference import Pattern

EVERY = [True] * 3
NAMES = ("o", "dq", "dk", "dv")


class Case(NamedTuple):
    """Sizes of an attention.

    Args:
        tokens: of queries, of keys.
        width: head_dim of q and k; of v where it is another.
        heads: of q; of k and v.
        density: the share of blocks that are kept. Of the first head the first row and the first column never are, and
            the last block of the last row is: but for densities of 0 and 1.
        per_sample: a mask for each sample.
        size: of the numbers in q, k and v.
        laid: "heads" as [B, H, S, D], "tokens" as [B, S, H, D], "fused" as a third of [B, S, H, 3, D].
    """

    tokens: tuple[int, int] = (40, 40)
    width: tuple[int, int] | int = 16
    heads: tuple[int, int] = (2, 2)
    block: int = 16
    samples: int = 2
    density: float = 0.5
    per_sample: bool = False
    size: float = 1.0
    laid: str = "heads"

    @property
    def scale(self) -> float:
        return (self.width if isinstance(self.width, int) else self.width[0]) ** -0.5

    def mask(self) -> BlockMask:
        blocks = [-(-length // self.block) for length in self.tokens]
        made = torch.Generator().manual_seed(1)
        kept = torch.rand(self.samples if self.per_sample else 1, self.heads[0], *blocks, generator=made) < self.density
        if 0 < self.density < 1:
            kept[:, 0, 0], kept[:, 0, :, 0] = False, False
            kept[:, 0, -1, -1] = True
        return BlockMask(kept, self.block, *self.tokens)

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> Tensors:
        made = torch.Generator().manual_seed(0)
        width, wide = (self.width, self.width) if isinstance(self.width, int) else self.width

        def values(heads: int, tokens: int, channels: int) -> Tensor:
            shape = (self.samples, tokens, heads, 3, channels)
            x = (torch.randn(shape, generator=made, dtype=torch.float64) * self.size).to(device, dtype)[..., 1, :]
            x = x if self.laid == "fused" else x.contiguous()
            return x.transpose(1, 2) if self.laid != "heads" else x.transpose(1, 2).contiguous()

        (q_len, k_len), (heads, shared) = self.tokens, self.heads
        q, k, v = values(heads, q_len, width), values(shared, k_len, width), values(shared, k_len, wide)
        return Tensors(q, k, v, values(heads, q_len, wide) / self.size, self.mask().to(device), self.scale)


class Tensors(NamedTuple):
    """q, k, v, the gradient of the result, and what is not a tensor of numbers."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    mask: BlockMask
    scale: float

    def double(self) -> Tensors:
        q, k, v, do = (tensor.double() for tensor in self[:4])
        return Tensors(q, k, v, do, *self[4:])


def pattern_of(mask: BlockMask) -> Pattern:
    return Pattern(mask.kept, *mask.rows, *mask.columns, mask.block)


def everything(case: Tensors, module: Any) -> dict[str, Tensor]:
    """The result, log_sum and the three gradients, by a module with `forward` and `backward`."""
    q, k, v, do, mask, scale = case
    pattern = pattern_of(mask)
    o, log_sum = module.forward(q, k, v, pattern, scale)
    found = module.backward(do, q, k, v, o, log_sum, pattern, scale, EVERY)
    return dict(zip(("log_sum", *NAMES), (log_sum, o, *found), strict=True))


def truth_of(case: Tensors) -> dict[str, Tensor]:
    return everything(case.double(), reference)


def torchs(case: Tensors) -> dict[str, Tensor]:
    """What torch makes of it with a dense mask, which it needs not be given where everything is kept."""
    q, k, v = (tensor.detach().requires_grad_() for tensor in case[:3])
    repeats = q.shape[1] // k.shape[1]
    dense = case.mask.dense()
    mask = None if bool(dense.all()) else dense
    some = dense.any(-1)[..., None]  # torch gives NaN to queries without keys
    width, wide = q.shape[-1], v.shape[-1]
    given = (q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1))
    # As wide as each other: else torch's attention is another.
    q_, k_, v_ = (F.pad(t, (0, max(width, wide) - t.shape[-1])) for t in given)
    o = F.scaled_dot_product_attention(q_, k_, v_, mask if mask is None else mask | ~some, scale=case.scale)
    o = torch.where(some, o, 0)[..., :wide]
    return dict(zip(NAMES, (o, *torch.autograd.grad(o, (q, k, v), case.do)), strict=True))


def error(found: Tensor, true: Tensor) -> tuple[float, float]:
    """The largest, and the root of the mean of squares."""
    apart = (found.detach().double() - true).abs()
    return float(apart.max()), float(apart.square().mean().sqrt())


def errs_no_more(
    found: dict[str, Tensor], others: dict[str, Tensor], truth: dict[str, Tensor], scores: float = 0.0
) -> None:
    """Than 1.2 times what others do, in the mean of squares, and twice at any place; but for the order of sums.

    The weights of scores as large as `scores`, computed twice in another order, differ by a rounding of the scores.
    """
    largest = max(float(truth[name].abs().max()) for name in others)
    for name, other in others.items():
        mine, true = found[name], truth[name]
        sums = 64 if mine.dtype == true.dtype else 8  # the truth is no wider there
        order = (sums + scores) * torch.finfo(torch.promote_types(torch.float32, mine.dtype)).eps * largest
        ours, theirs = error(mine, true), error(other, true)
        assert mine.dtype == other.dtype, name
        assert ours[1] <= 1.2 * theirs[1] + order, f"{name}: {ours[1]:.2e} against {theirs[1]:.2e}"
        assert ours[0] <= 2 * theirs[0] + order, f"{name}: {ours[0]:.2e} against {theirs[0]:.2e} at most"
