"""Sparse attention on the CPU: the kept blocks of keys, gathered, go to torch's own flash attention.

Rows of blocks with as many keys go together, a few megabytes at a time. All in float32 at least: torch's attention in
16 bits is slower there, and rounds each block's part of the gradients. Arguments have been checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .sparse_attention_reference import Gradients, Pattern, result_like

__all__ = ["backward", "forward"]

_HELD = 4 << 20  # bytes of keys that are gathered at a time: they stay in a core's cache, or nearly
_aten = torch.ops.aten


class _Part(NamedTuple):
    """Rows of blocks that have as many queries, and keep as many keys.

    Args:
        rows: int64 [R], places of the rows among the blocks of queries of all samples and heads.
        blocks: int64 [R * kept], places of their kept blocks of keys among those of all samples and heads of keys.
        queries, keys: tokens of each.
    """

    rows: Tensor
    blocks: Tensor
    queries: int
    keys: int


def forward(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float) -> tuple[Tensor, Tensor]:
    """As `sparse_attention_reference.forward`."""
    width, block = max(q.shape[-1], v.shape[-1]), pattern.block
    queries, keys, values = (_blocked(tensor, block, width) for tensor in (q, k, v))
    o = torch.zeros_like(queries)
    log_sum = queries.new_full(queries.shape[:2], -torch.inf)
    for part in _parts(q, k, pattern, width):
        given = (_taken(queries, part.rows, part.queries), *_gathered(keys, values, part))
        found, normaliser = _aten._scaled_dot_product_flash_attention_for_cpu(*given, scale=scale)
        o[part.rows, : part.queries] = found[:, 0]
        log_sum[part.rows, : part.queries] = normaliser[:, 0]
    numbers = _joined(log_sum[..., None], q.shape, 1)[..., 0].contiguous()
    return result_like(q, v).copy_(_joined(o, q.shape, v.shape[-1])), numbers


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, log_sum: Tensor, pattern: Pattern, scale: float,
    needs: Sequence[bool],
) -> Gradients:  # fmt: skip
    """As `sparse_attention_reference.backward`. Blocks of keys add up what their rows give, in order."""
    width, block = max(q.shape[-1], v.shape[-1]), pattern.block
    queries, gradients, results = (_blocked(tensor, block, width) for tensor in (q, do, o))
    keys, values = (_blocked(tensor, block, width) for tensor in (k, v))
    normalisers = _blocked(log_sum[..., None], block, 1)[..., 0]
    dq, dk, dv = (torch.zeros_like(tensor) for tensor in (queries, keys, values))
    for part in _parts(q, k, pattern, width):
        here = (_taken(tensor, part.rows, part.queries) for tensor in (gradients, queries))
        given = (*here, *_gathered(keys, values, part), _taken(results, part.rows, part.queries))
        normaliser = normalisers[part.rows, None, : part.queries]
        found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, normaliser, 0.0, False, scale=scale)
        dq[part.rows, : part.queries] = found[0][:, 0]
        for total, gradient in zip((dk, dv), found[1:], strict=True):
            whole = F.pad(gradient[:, 0], (0, 0, 0, -part.keys % block))
            total.index_add_(0, part.blocks, whole.reshape(-1, block, width))
    return tuple(
        torch.empty_like(tensor).copy_(_joined(gradient, tensor.shape, tensor.shape[-1])) if need else None
        for gradient, tensor, need in zip((dq, dk, dv), (q, k, v), needs, strict=True)
    )


def _parts(q: Tensor, k: Tensor, pattern: Pattern, width: int) -> Iterator[_Part]:
    """All rows that keep a block."""
    block = pattern.block
    per_head, key_blocks = pattern.kept.shape[2:]
    counts = pattern.row_start.diff().long()
    row = torch.arange(q.shape[0] * q.shape[1] * per_head)
    same = row % counts.numel()  # the row of the pattern, which may be shared by all samples
    count, first = counts[same], pattern.row_start[same].long()
    last_key = pattern.row_at[(first + count - 1).clamp(min=0)] if pattern.row_at.numel() else torch.zeros_like(row)
    cut_keys, cut_queries = -k.shape[2] % block, -q.shape[2] % block
    keys = count * block - torch.where(last_key == key_blocks - 1, cut_keys, 0)
    queries = block - torch.where(row % per_head == per_head - 1, cut_queries, 0)
    head = row // per_head // (q.shape[1] // k.shape[1])  # of the keys, counted over all samples
    kinds, kind = torch.stack((queries, keys, count)).unique(dim=1, return_inverse=True)
    for place, (some, many, kept) in enumerate(kinds.T.tolist()):
        if kept:
            rows = (kind == place).nonzero()[:, 0]
            for few in rows.split(max(1, _HELD // (many * width * 4))):
                at = pattern.row_at[first[few, None] + torch.arange(kept)]
                yield _Part(few, (head[few, None] * key_blocks + at).flatten(), some, many)


def _blocked(tensor: Tensor, block: int, width: int) -> Tensor:
    """[B, H, S, D] -> float32 at least [B * H * blocks, block, width], with zeros behind D and behind S."""
    b, heads, length, d = tensor.shape
    blocks = -(-length // block)
    whole = F.pad(
        tensor.to(torch.promote_types(tensor.dtype, torch.float32)), (0, width - d, 0, blocks * block - length)
    )
    return whole.reshape(b * heads * blocks, block, width)


def _joined(blocks: Tensor, shape: Sequence[int], width: int) -> Tensor:
    """What `_blocked` has taken apart, [B, H, S, width], of the shape [B, H, S, *]."""
    b, heads, length = shape[:3]
    found: Tensor = blocks.view(b, heads, -1, blocks.shape[-1])[:, :, :length, :width]
    return found


def _taken(blocks: Tensor, rows: Tensor, tokens: int) -> Tensor:
    """[R, 1, tokens, D]: the first tokens of these blocks."""
    found: Tensor = blocks.index_select(0, rows)[:, None, :tokens]
    return found


def _gathered(keys: Tensor, values: Tensor, part: _Part) -> tuple[Tensor, Tensor]:
    """[R, 1, keys, D] of each."""
    rows, width = part.rows.numel(), keys.shape[-1]
    found = (t.index_select(0, part.blocks).view(rows, 1, -1, width)[:, :, : part.keys] for t in (keys, values))
    return next(found), next(found)
