"""Attention layers that compute only some blocks of queries and keys."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EbdiffError
from ..ops.block_mask import BlockMask
from ..ops.sparse_attention_ops import sparse_attention
from .attention import PinnedScaleProcessor
from .attention_calls import AttentionCall

__all__ = ["Attend", "SparseAttention", "SparseAttnProcessor"]


class Attend:
    """Answers the attention calls of one layer by its block mask.

    Heads that keep every block go to torch's attention. So does a call with an attention mask, dropout, or anything
    else that `ebdiff.ops.sparse_attention` has no argument for: with the block mask written out, which computes the
    same and saves nothing.

    Args:
        blocks: the mask; the same for every sample.
        name: of the layer, for messages.
        written_out: never compute by blocks. For comparisons.

    Attributes:
        fallbacks: {why the mask was written out: how often}.

    Raises:
        EbdiffError: a mask that differs between samples; when called, other lengths or heads than the mask's.
    """

    def __init__(self, blocks: BlockMask, name: str = "", written_out: bool = False) -> None:
        if len(blocks.kept) != 1:
            raise EbdiffError(
                f"block mask of {name or 'an attention layer'}",
                expected="one for all samples",
                got=f"{len(blocks.kept)} samples",
                remedy="call ebdiff.ops.sparse_attention with it yourself",
            )
        self.blocks, self.name, self.written_out = blocks, name, written_out
        self.fallbacks: Counter[str] = Counter()
        full = blocks.kept[0].flatten(1).all(1)
        self._some = None if not full.any() or full.all() else blocks.heads(~full)
        self._order = torch.cat((full.nonzero()[:, 0], (~full).nonzero()[:, 0]))

    def __call__(self, call: AttentionCall) -> Tensor:
        self._check(call)
        why = self._why_written_out(call)
        if why is not None:
            if not torch.compiler.is_compiling():
                self.fallbacks[why] += 1
            return self._through_torch(call)
        query, key, value = (t.reshape(-1, *t.shape[-3:]) for t in call[:3])
        if self._some is None:
            found = sparse_attention(query, key, value, self.blocks, call.scale)
        else:
            found = self._divided(query, key, value, self._some, call.scale)
        return found.reshape(*call.query.shape[:-1], value.shape[-1])

    def _check(self, call: AttentionCall) -> None:
        blocks = self.blocks
        expected = (blocks.kept.shape[1], blocks.q_len, blocks.k_len)
        got = (*call.query.shape[-3:-1], call.key.shape[-2])
        if got != expected:
            words = "{} heads, {} queries, {} keys"
            raise EbdiffError(
                f"the block mask of {self.name or 'this attention'} does not fit what it is called with",
                expected=words.format(*expected),
                got=words.format(*got) if len(got) == 3 else f"a query of shape {list(call.query.shape)}",
                remedy="run at the size the mask was drawn at, or take it out: ebdiff.nn.densify(model)",
            )

    def _why_written_out(self, call: AttentionCall) -> str | None:
        if self.written_out:
            return "asked for"
        if call.attn_mask is not None:
            return "an attention mask"
        if call.dropout_p > 0:
            return "dropout"
        if call.is_causal:
            return "causal"
        if max(call.query.shape[-1], call.value.shape[-1]) > 256:
            return "a head_dim above 256"
        samples = call.query.shape[:-3]
        return None if call.key.shape[:-3] == call.value.shape[:-3] == samples else "keys that samples share"

    def _through_torch(self, call: AttentionCall) -> Tensor:
        mask = self.blocks.to(call.query.device).dense()[0]
        if call.is_causal:
            mask = mask.tril()
        given = call.attn_mask
        if given is not None:
            mask = mask & given if given.dtype == torch.bool else given.masked_fill(~mask, -torch.inf)
        return call._replace(attn_mask=mask, is_causal=False).run()

    def _divided(self, query: Tensor, key: Tensor, value: Tensor, some: BlockMask, scale: float | None) -> Tensor:
        """Full heads by torch's attention, the others by blocks."""
        order = self._order.to(query.device)
        whole = len(order) - some.kept.shape[1]
        of_keys = order // (query.shape[1] // key.shape[1])

        def heads(at: slice) -> tuple[Tensor, Tensor, Tensor]:
            keys = of_keys[at]
            return query.index_select(1, order[at]), key.index_select(1, keys), value.index_select(1, keys)

        full = AttentionCall(*heads(slice(whole)), None, 0.0, False, scale).run()
        rest = sparse_attention(*heads(slice(whole, None)), some, scale)
        return torch.cat((full, rest), 1).index_select(1, order.argsort())


class SparseAttnProcessor(PinnedScaleProcessor):
    """diffusers' AttnProcessor2_0 with a block mask.

    Args:
        attend: what answers its attention calls.
        scale: factor on the attention logits; 1/sqrt(head_dim) where None.
        replaced: the processor in whose place it stands.
    """

    def __init__(self, attend: Attend, scale: float | None = None, replaced: Any = None) -> None:
        super().__init__(scale)
        self.attend, self.replaced = attend, replaced

    def mix(self, call: AttentionCall) -> Tensor:
        """The attention itself."""
        return self.attend(call)


class SparseAttention(nn.Module):
    """Multi-head attention with projections, of all blocks or of those that a block mask keeps.

    State dict keys as diffusers' Attention with separate projections: to_q, to_k, to_v, to_out.

    Args:
        dim: width of the tokens, in and out.
        heads: how many.
        head_dim: dim / heads where None.
        context_dim: width of the tokens that keys and values are made from, where it is another.
        blocks: which blocks are computed; all where None. `sparsify` and `densify` set and remove it.
        bias: of all four projections.

    Shape: x [B, Sq, dim], context [B, Sk, context_dim] (x where None) -> [B, Sq, dim].

    Raises:
        EbdiffError: heads that do not divide dim; when called, lengths other than the mask's.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int | None = None,
        context_dim: int | None = None,
        blocks: BlockMask | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if head_dim is None and dim % heads:
            raise EbdiffError("heads", expected=f"a divisor of {dim}", got=str(heads), remedy="pass head_dim")
        width = heads * (dim // heads if head_dim is None else head_dim)
        place: Any = {"bias": bias, "device": device, "dtype": dtype}
        self.heads = heads
        self.scale = (width // heads) ** -0.5  # also where head_dim is pruned
        self.to_q = nn.Linear(dim, width, **place)
        self.to_k = nn.Linear(context_dim or dim, width, **place)
        self.to_v = nn.Linear(context_dim or dim, width, **place)
        self.to_out = nn.Linear(width, dim, **place)
        self.attend = None if blocks is None else Attend(blocks)

    def forward(self, x: Tensor, context: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        query, key, value = (
            tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for tokens in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        call = AttentionCall(query, key, value, attn_mask, scale=self.scale)
        found = call.run() if self.attend is None else self.attend(call)
        result: Tensor = self.to_out(found.transpose(1, 2).flatten(2))
        return result
