"""What `sparse_attention` computes, in plain torch: the specification, and what serves where no kernel does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .block_mask import expanded

__all__ = ["Gradients", "Pattern", "backward", "forward", "result_like", "sparse_attention"]

Gradients: TypeAlias = tuple[Tensor | None, ...]  # of q, k, v


class Pattern(NamedTuple):
    """The tensors of a `BlockMask`: all that is asked of it but the lengths, which are those of q and k."""

    kept: Tensor
    row_start: Tensor
    row_at: Tensor
    column_start: Tensor
    column_at: Tensor
    block: int


def forward(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float) -> tuple[Tensor, Tensor]:
    """The result, and log(sum(exp(scores))) of each query, float32 at least [B, H, Sq]: -inf for one without keys."""
    wide = _wide(q, k, v, pattern)
    p, log_sum = _probabilities(wide, scale)
    return result_like(q, v).copy_(torch.matmul(p, wide.v)), log_sum


def result_like(q: Tensor, v: Tensor) -> Tensor:
    """Memory for the result, [B, H, Sq, Dv], that lies as [B, Sq, H, Dv]: heads are joined without a copy."""
    b, heads, length, _ = q.shape
    return q.new_empty((b, length, heads, v.shape[-1])).transpose(1, 2)


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float) -> Tensor:
    """`forward`'s result, differentiable to any order."""
    wide = _wide(q, k, v, pattern)
    return torch.matmul(_probabilities(wide, scale)[0], wide.v).to(q.dtype)


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, log_sum: Tensor, pattern: Pattern, scale: float,
    needs: Sequence[bool],
) -> Gradients:  # fmt: skip
    """Gradients of q, k and v, laid out as these; None where none is needed.

    With s = scale q k' and p = exp(s - log_sum): dv = p' do, ds = p (do v' - rowsum(o do)), dq = scale ds k,
    dk = scale ds' q; k and v take the sum over the heads of queries that share them.
    """
    wide = _wide(q, k, v, pattern)
    do_ = torch.where(wide.kept.any(-1, keepdim=True), do.to(wide.q.dtype), 0)
    p = torch.where(wide.kept, torch.exp(_scores(wide, scale) - log_sum[..., None]), 0)
    delta = (do_ * o.to(do_.dtype)).sum(-1, keepdim=True)
    ds = p * (do_ @ wide.v.mT - delta) * scale
    found = (ds @ wide.k, _shared(ds.mT @ wide.q, k), _shared(p.mT @ do_, v))
    return tuple(
        torch.empty_like(tensor).copy_(gradient) if need else None
        for gradient, tensor, need in zip(found, (q, k, v), needs, strict=True)
    )


class _Wide(NamedTuple):
    """q, k and v in float32 at least, as many heads of each, and 0 in tokens without partners, whatever they hold."""

    q: Tensor
    k: Tensor
    v: Tensor
    kept: Tensor  # bool [B or 1, H, Sq, Sk]


def _wide(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> _Wide:
    kept = expanded(pattern.kept, pattern.block, q.shape[2], k.shape[2])
    dtype, repeats = torch.promote_types(q.dtype, torch.float32), q.shape[1] // k.shape[1]
    k, v = (t.to(dtype).repeat_interleave(repeats, 1) for t in (k, v))
    asked = kept.any(-2)[..., None]
    q = torch.where(kept.any(-1)[..., None], q.to(dtype), 0)
    return _Wide(q, torch.where(asked, k, 0), torch.where(asked, v, 0), kept)


def _scores(wide: _Wide, scale: float) -> Tensor:
    return (wide.q @ wide.k.mT * scale).masked_fill(~wide.kept, -torch.inf)


def _probabilities(wide: _Wide, scale: float) -> tuple[Tensor, Tensor]:
    """p, with rows of 0 for queries without keys; log_sum."""
    scores = _scores(wide, scale)
    log_sum = scores.logsumexp(-1)
    has_keys = wide.kept.any(-1, keepdim=True)
    p = torch.where(has_keys, scores, 0).softmax(-1)
    return torch.where(has_keys, p, 0), log_sum


def _shared(gradient: Tensor, like: Tensor) -> Tensor:
    """[B, H, S, D] -> [B, Hkv, S, D]."""
    b, heads, *rest = like.shape
    found: Tensor = gradient.view(b, heads, gradient.shape[1] // heads, *rest).sum(2)
    return found
