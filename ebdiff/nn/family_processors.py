"""Attention of diffusers' transformers after pruning: processors that pass the softmax scale of the dense network.

diffusers' own take 1/sqrt(head_dim) of whatever width is left, and most view v at the width of k. These do the same in
the same order, at the widths that the projections have: one of q and k, one of v.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import EbdiffError
from .attention import Pinned, apart, normed, prepared, qkv
from .attention_calls import AttentionCall

__all__ = [
    "PinnedCogVideoXProcessor",
    "PinnedFluxProcessor",
    "PinnedJointProcessor",
    "PinnedLTXProcessor",
    "PinnedWanProcessor",
]


class PinnedJointProcessor(Pinned):
    """As diffusers' JointAttnProcessor2_0 (SD3): the tokens of the image and, behind them, those of the text."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        found = [apart(attn, x).transpose(1, 2) for x in qkv(attn, hidden_states)]
        found = normed(found, attn.norm_q, attn.norm_k)
        if encoder_hidden_states is not None:
            added = [apart(attn, x).transpose(1, 2) for x in _added_qkv(attn, encoder_hidden_states)]
            added = normed(added, attn.norm_added_q, attn.norm_added_k)
            found = [torch.cat(pair, dim=2) for pair in zip(found, added, strict=True)]
        query, key, value = found
        mixed = AttentionCall(query, key, value, scale=self.scale).run().transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return _projected(attn, mixed)
        image, text = mixed[:, : hidden_states.shape[1]], mixed[:, hidden_states.shape[1] :]
        text = text if attn.context_pre_only else attn.to_add_out(text)
        return _projected(attn, image), text


class PinnedCogVideoXProcessor(Pinned):
    """As diffusers' CogVideoXAttnProcessor2_0: text before video, one set of projections, rotary positions or none."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        words = encoder_hidden_states.shape[1]
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        mask = prepared(attn, attention_mask, tokens)
        found = [apart(attn, x).transpose(1, 2) for x in qkv(attn, tokens)]
        query, key, value = normed(found, attn.norm_q, attn.norm_k)
        if image_rotary_emb is not None:
            from diffusers.models.embeddings import apply_rotary_emb

            for turned in (query,) if attn.is_cross_attention else (query, key):
                turned[:, :, words:] = apply_rotary_emb(turned[:, :, words:], image_rotary_emb)
        mixed = AttentionCall(query, key, value, mask, scale=self.scale).run()
        both = _projected(attn, mixed.transpose(1, 2).flatten(2))
        text, video = both.split_with_sizes([words, both.shape[1] - words], dim=1)
        return video, text


class _Dispatching(Pinned):
    """A processor whose attention runs in the backend that diffusers was told to use; it says so on the processor."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def _dispatched(self, found: list[Tensor], mask: Tensor | None, parallel: bool = True) -> Tensor:
        """[batch, tokens, heads, dim] of q, k and v -> [batch, tokens, heads * dim of v]."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        mixed: Tensor = dispatch_attention_fn(
            *found,
            attn_mask=mask,
            scale=self.scale,
            backend=self._attention_backend,
            parallel_config=self._parallel_config if parallel else None,
        )
        return mixed.flatten(2, 3).to(found[0].dtype)


class PinnedFluxProcessor(_Dispatching):
    """As diffusers' FluxAttnProcessor, without fused projections: the tokens of the text, then those of the image."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        from diffusers.models.embeddings import apply_rotary_emb

        joint = encoder_hidden_states is not None and attn.added_kv_proj_dim is not None
        image = qkv(attn, hidden_states)
        text = _added_qkv(attn, encoder_hidden_states) if joint else []
        found = normed([apart(attn, x) for x in image], attn.norm_q, attn.norm_k)
        if joint:
            text = normed([apart(attn, x) for x in text], attn.norm_added_q, attn.norm_added_k)
            found = [torch.cat(pair, dim=1) for pair in zip(text, found, strict=True)]
        if image_rotary_emb is not None:
            found[:2] = [apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in found[:2]]
        mixed = self._dispatched(found, attention_mask)
        if encoder_hidden_states is None:
            return mixed
        words = encoder_hidden_states.shape[1]
        front, rest = mixed.split_with_sizes([words, mixed.shape[1] - words], dim=1)
        return _projected(attn, rest.contiguous()), attn.to_add_out(front.contiguous())


class PinnedWanProcessor(_Dispatching):
    """As diffusers' WanAttnProcessor without rotary positions and images: in cross-attention to text."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        _refuse_positions(rotary_emb)
        found = normed(qkv(attn, hidden_states, encoder_hidden_states), attn.norm_q, attn.norm_k)
        found = [apart(attn, x) for x in found]
        return _projected(attn, self._dispatched(found, attention_mask, parallel=encoder_hidden_states is None))


class PinnedLTXProcessor(_Dispatching):
    """As diffusers' LTXVideoAttnProcessor without rotary positions: in cross-attention to text."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        _refuse_positions(image_rotary_emb)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        mask = prepared(attn, attention_mask, context)
        found = normed(qkv(attn, hidden_states, context), attn.norm_q, attn.norm_k)
        found = [apart(attn, x) for x in found]
        return _projected(attn, self._dispatched(found, mask))


def _refuse_positions(rotary: Any) -> None:
    if rotary is not None:
        raise EbdiffError(
            "rotary positions for attention whose q and k have been cut",
            expected="none, as in the forward pass that was traced",
            got=type(rotary).__name__,
            remedy="trace the model with them: head_dim stays whole then",
        )


def _added_qkv(attn: Any, text: Any) -> list[Tensor]:
    return [attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)]


def _projected(attn: Any, tokens: Tensor) -> Tensor:
    """Through the output layer and its dropout."""
    found: Tensor = attn.to_out[1](attn.to_out[0](tokens))
    return found
