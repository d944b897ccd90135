"""nn.MultiheadAttention whose heads, head_dim and width may differ from one another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["MultiheadAttention", "unnest"]


class MultiheadAttention(nn.Module):
    """Stands in for an nn.MultiheadAttention that was pruned; torch's own asserts that embed_dim = heads * head_dim.

    Parameters, state dict keys and arguments of its forward are those of nn.MultiheadAttention, the softmax scale that
    of its original head_dim. Averaged attention weights are averages over the heads that are left.

    Args:
        attention: what it stands in for: torch's, without bias_k, bias_v and add_zero_attn (see `stands_for`), or one
            of these.
    """

    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    q_proj_weight: Tensor
    k_proj_weight: Tensor
    v_proj_weight: Tensor
    out_proj: nn.Linear
    _qkv_same_embed_dim = False  # torch's fused encoder layers read embed_dim: they are to leave this one alone

    def __init__(self, attention: Any) -> None:
        super().__init__()
        vars(self).update({key: held for key, held in vars(attention).items() if "hooks" in key})
        self._parameters.update(attention._parameters)
        self._modules.update(attention._modules)
        self.num_heads, self.dropout, self.batch_first = attention.num_heads, attention.dropout, attention.batch_first
        self.scale: float = getattr(attention, "scale", None) or attention.head_dim**-0.5
        self.train(attention.training)

    @staticmethod
    def stands_for(module: nn.Module) -> bool:
        """Can one of these compute what this module does?"""
        plain = type(module) is nn.MultiheadAttention and module.bias_k is None and module.bias_v is None
        return plain and not module.add_zero_attn

    @property
    def embed_dim(self) -> int:
        """Width of the queries."""
        return (self.q_proj_weight if self.in_proj_weight is None else self.in_proj_weight).shape[1]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention's; `is_causal` is a hint there, and not needed here."""
        batched = query.dim() == 3
        tokens_first = batched and not self.batch_first
        inputs = [x.transpose(0, 1) if tokens_first else x if batched else x[None] for x in (query, key, value)]
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in self._projected(*inputs))
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            logits = q @ k.transpose(-2, -1) * self.scale
            weights = F.dropout((logits if mask is None else logits + mask).softmax(-1), dropout)
            mixed = weights @ v
            weights = self._averaged(weights) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=self.scale)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return (out.transpose(0, 1) if tokens_first else out if batched else out[0]), weights

    def _projected(self, *inputs: Tensor) -> list[Tensor]:
        apart = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        weights = apart if self.in_proj_weight is None else self._parts(self.in_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self._parts(self.in_proj_bias)
        return [F.linear(x, weight, bias) for x, weight, bias in zip(inputs, weights, biases, strict=True)]

    def _parts(self, joined: Tensor) -> tuple[Tensor, ...]:
        """Those of queries, keys and values; values may be of another width."""
        values = self.out_proj.weight.shape[1]
        parts: tuple[Tensor, ...] = joined.split([(len(joined) - values) // 2] * 2 + [values])
        return parts

    def _averaged(self, weights: Tensor) -> Tensor:
        return weights.mean(1)

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """What is added to the logits, of a shape that broadcasts to [batch, heads, queries, keys]."""
        parts = []
        if attn_mask is not None:
            whole = attn_mask.dim() == 3
            parts.append(attn_mask.unflatten(0, (len(q), self.num_heads)) if whole else attn_mask)
        if padding is not None:
            parts.append(padding[None if padding.dim() == 1 else slice(None), None, None])
        added = [
            torch.zeros_like(part, dtype=q.dtype).masked_fill(part, float("-inf")) if part.dtype == torch.bool else part
            for part in parts
        ]
        return added[0] + added[1] if len(added) == 2 else added[0] if added else None


def unnest(model: nn.Module) -> None:
    """Let no nn.TransformerEncoder make nested tensors of what one of these is to attend to."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(m, MultiheadAttention) for m in module.modules()
        ):
            module.use_nested_tensor = False
