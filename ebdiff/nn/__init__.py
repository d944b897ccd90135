"""Layers that stand in for a user's own."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .group_norm import GroupNormSiLU as GroupNormSiLU
    from .group_norm import RaggedGroupNorm as RaggedGroupNorm

__all__ = ["GroupNormSiLU", "RaggedGroupNorm"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'ebdiff.nn' has no attribute {name!r}")
    return getattr(import_module(".group_norm", __name__), name)
