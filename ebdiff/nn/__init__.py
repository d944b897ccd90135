"""Layers that stand in for a user's own, and block masks put into attention layers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .group_norm import GroupNormSiLU as GroupNormSiLU
    from .group_norm import RaggedGroupNorm as RaggedGroupNorm
    from .sparse_attention import SparseAttention as SparseAttention
    from .sparse_attention import SparseAttnProcessor as SparseAttnProcessor
    from .sparse_model import blocks_of as blocks_of
    from .sparse_model import densify as densify
    from .sparse_model import sparsify as sparsify

_HOME = {
    **dict.fromkeys(("GroupNormSiLU", "RaggedGroupNorm"), "group_norm"),
    **dict.fromkeys(("SparseAttention", "SparseAttnProcessor"), "sparse_attention"),
    **dict.fromkeys(("blocks_of", "densify", "sparsify"), "sparse_model"),
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ebdiff.nn' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
