"""The operators: each with its reference in plain torch, and with the kernels that serve it where there are any."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .block_mask import BlockMask as BlockMask
    from .channel_mask import Axes as Axes
    from .channel_mask import apply_mask_ as apply_mask_
    from .channel_mask import channel_sums as channel_sums
    from .channel_mask import compact as compact
    from .channel_mask import mask_distance as mask_distance
    from .channel_mask import masked_adamw_ as masked_adamw_
    from .channel_mask import scatter_back as scatter_back
    from .group_norm import group_norm_silu as group_norm_silu
    from .sparse_attention_ops import sparse_attention as sparse_attention
    from .timestep_loss import LossStatistics as LossStatistics
    from .timestep_loss import PhiloxNoise as PhiloxNoise
    from .timestep_loss import TimestepLoss as TimestepLoss
    from .timestep_loss import noised as noised
    from .timestep_loss import weighted_timestep_loss as weighted_timestep_loss

_MASKS = ("Axes", "apply_mask_", "channel_sums", "compact", "mask_distance", "masked_adamw_", "scatter_back")
_LOSS = ("LossStatistics", "PhiloxNoise", "TimestepLoss", "noised", "weighted_timestep_loss")
_HOME = {
    "BlockMask": "block_mask",
    "group_norm_silu": "group_norm",
    "sparse_attention": "sparse_attention_ops",
    **dict.fromkeys(_MASKS, "channel_mask"),
    **dict.fromkeys(_LOSS, "timestep_loss"),
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ebdiff.ops' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
