"""Attention after pruning: whole heads gone, or head_dim smaller at the softmax scale of the original one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .attention_calls import AttentionCall

__all__ = ["Pinned", "PinnedScaleProcessor", "apart", "normed", "prepared", "qkv"]


class Pinned:
    """A diffusers attention processor that passes the softmax scale, and lets q/k and v differ in width.

    Args:
        scale: factor on the attention logits, 1/sqrt(head_dim) of the dense network; of what is left where None.
    """

    def __init__(self, scale: float | None) -> None:
        self.scale = scale


class PinnedScaleProcessor(Pinned):
    """As diffusers' AttnProcessor2_0, which ignores ``attn.scale`` and takes 1/sqrt(head_dim) of whatever is left."""

    def mix(self, call: AttentionCall) -> Tensor:
        """The attention itself."""
        return call.run()

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape if hidden_states.dim() == 4 else None
        if image_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        mask = prepared(attn, attention_mask, context)
        found = [apart(attn, x).transpose(1, 2) for x in qkv(attn, hidden_states, context)]
        query, key, value = normed(found, attn.norm_q, attn.norm_k)
        mixed = self.mix(AttentionCall(query, key, value, mask, scale=self.scale))
        hidden_states = mixed.transpose(1, 2).flatten(2).to(query.dtype)
        for layer in attn.to_out:
            hidden_states = layer(hidden_states)
        if image_shape is not None:
            hidden_states = hidden_states.transpose(1, 2).reshape(image_shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor  # type: ignore[no-any-return]


def prepared(attn: Any, mask: Tensor | None, tokens: Tensor) -> Tensor | None:
    """A mask of the keys made from `tokens`, as [batch, heads, queries or 1, keys]."""
    if mask is None:
        return None
    mask = attn.prepare_attention_mask(mask, tokens.shape[1], len(tokens))
    return mask.view(len(tokens), attn.heads, -1, mask.shape[-1])


def qkv(attn: Any, tokens: Tensor, context: Tensor | None = None) -> list[Tensor]:
    """Queries of the tokens, keys and values of the context; of the tokens themselves where it is None."""
    context = tokens if context is None else context
    return [attn.to_q(tokens), attn.to_k(context), attn.to_v(context)]


def apart(attn: Any, tokens: Tensor) -> Tensor:
    """[batch, tokens, heads * dim] -> [batch, tokens, heads, dim]."""
    found: Tensor = tokens.unflatten(-1, (attn.heads, -1))
    return found


def normed(found: list[Tensor], q: nn.Module | None, k: nn.Module | None) -> list[Tensor]:
    """Queries, keys and values, the first two through norms of their own or none."""
    return [x if norm is None else norm(x) for norm, x in zip((q, k, None), found, strict=True)]
