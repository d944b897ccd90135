"""Attention after pruning: whole heads gone, or head_dim smaller at the softmax scale of the original one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .attention_calls import AttentionCall

__all__ = ["Pinned", "PinnedScaleProcessor", "prepared"]


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

        def heads(tokens: Tensor) -> Tensor:
            return tokens.view(*tokens.shape[:-1], attn.heads, -1).transpose(1, 2)

        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        query, key, value = heads(query), heads(key), heads(value)
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
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
