"""Rules for diffusers' own classes: what their forwards read about channels, and how it follows the parameters."""

from __future__ import annotations

from math import sqrt
from typing import Any

from torch import nn

from ..nn.attention import Pinned, PinnedScaleProcessor
from ..nn.family_processors import (
    PinnedCogVideoXProcessor,
    PinnedFluxProcessor,
    PinnedJointProcessor,
    PinnedLTXProcessor,
    PinnedWanProcessor,
)
from .mask import ChannelMask

__all__ = ["adapt_attention", "is_attention", "is_diffusers", "splits_its_own_axes", "width_of_views"]

# The processors that take the softmax scale from the width of q, and most of them that of v too; and what may.
_PINNED: dict[str, type[Pinned]] = {
    "AttnProcessor2_0": PinnedScaleProcessor,
    "JointAttnProcessor2_0": PinnedJointProcessor,
    "CogVideoXAttnProcessor2_0": PinnedCogVideoXProcessor,
    "FluxAttnProcessor": PinnedFluxProcessor,
    "LTXVideoAttnProcessor": PinnedLTXProcessor,
    "WanAttnProcessor": PinnedWanProcessor,
}
_WIDE = (PinnedLTXProcessor, PinnedWanProcessor)  # for processors that take the width of v as it is
_PROCESSORS = {"AttnProcessor", *_PINNED, *(kind.__name__ for kind in _PINNED.values())}


def is_diffusers(module: nn.Module, *names: str) -> bool:
    """Is this one of the named diffusers classes (or a subclass)? Without importing diffusers."""
    return any(c.__name__ in names and c.__module__.startswith("diffusers.") for c in type(module).__mro__)


def is_attention(module: nn.Module) -> bool:
    """Is this attention of which `adapt_attention` knows what it keeps?"""
    return is_diffusers(module, "Attention", "FluxAttention", "LTXAttention", "WanAttention")


def splits_its_own_axes(module: nn.Module) -> bool:
    """Does `adapt_attention` update the integers by which this module views its channels as heads x head_dim?"""
    attn: Any = module
    if not is_attention(module) or type(attn.processor).__name__ not in _PROCESSORS:
        return False
    with_images = is_diffusers(module, "WanAttention") and attn.add_k_proj is not None
    return not with_images and not getattr(attn, "fused_projections", False)


def width_of_views(module: nn.Module) -> str | None:
    """The parameter along whose rows lies the width with which a module views its captions, whatever theirs is."""
    names = {
        "PixArtTransformer2DModel": "pos_embed.proj.weight",
        "SanaTransformer2DModel": "patch_embed.proj.weight",
        "LTXVideoTransformer3DModel": "proj_in.weight",
    }
    return next((name for kind, name in names.items() if is_diffusers(module, kind)), None)


def adapt_attention(module: nn.Module, name: str, mask: ChannelMask) -> None:
    """Heads and widths, and the softmax scale of the original head_dim where that changed."""
    prefix = f"{name}." if name else ""
    own = (f"{prefix}to_q.weight", f"{prefix}to_v.weight")
    query, value = (mask.plan.aliases.get(weight, weight) for weight in own)
    before = mask.plan.shapes.get(query)
    if before is None:
        return
    attn: Any = module
    dense_heads = attn.heads
    for space, _ in mask.plan.by_parameter.get(query, {}).get(0, []):
        if space.unit == "head":
            attn.heads = int(mask.keep[space.name].sum())
    widths = {"sliceable_head_dim": attn.heads}
    widths["inner_dim"], widths["query_dim"] = attn.to_q.weight.shape
    widths["head_dim"] = widths["inner_dim"] // attn.heads
    if attn.to_k is not None:
        widths["inner_kv_dim"], widths["cross_attention_dim"] = attn.to_k.weight.shape
        widths["kv_inner_dim"] = widths["inner_kv_dim"]
    to_out = getattr(attn, "to_out", None)
    out = next(iter(to_out.children()), None) if to_out is not None else None  # none in an nn.Identity
    if out is not None:
        widths["out_dim"] = out.weight.shape[0]
    for key in widths.keys() & vars(attn).keys():
        setattr(attn, key, widths[key])
    pinned = _PINNED.get(type(attn.processor).__name__)
    if pinned is None:
        return
    of_query = attn.to_q.weight.shape[0] // attn.heads != before[0] // dense_heads
    of_value = attn.to_v.weight.shape[0] // attn.heads != mask.plan.shapes[value][0] // dense_heads
    if of_query or (of_value and pinned not in _WIDE):
        processor = pinned(1 / sqrt(before[0] // dense_heads))
        vars(processor).update(vars(attn.processor))  # such as the backend that diffusers was told to use
        attn.set_processor(processor)
