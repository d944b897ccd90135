"""Numbers that users give: Python's, numpy's or torch's of one element; never strings and never truth values."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch

__all__ = ["as_real", "as_whole"]


def as_whole(value: Any) -> int | None:
    """`value` as an int; None where it is no whole number. A float is none, even without a fraction."""
    try:
        return None if _is_none(value) else operator.index(value)
    except TypeError:
        return None


def as_real(value: Any) -> float | None:
    """`value` as a float; None where it is no number."""
    if _is_none(value) or not hasattr(type(value), "__float__"):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # of several elements, complex, or too large
        return None


def _is_none(value: Any) -> bool:
    """Is it text or a truth value, which numpy and torch would take for a number?"""
    return isinstance(value, bool | str | np.bool_ | np.str_) or getattr(value, "dtype", None) is torch.bool
