"""Numbers that users give: Python's, numpy's or torch's of one element; never strings and never truth values."""

from __future__ import annotations

import operator
from typing import Any

__all__ = ["as_real", "as_whole"]


def as_whole(value: Any) -> int | None:
    """`value` as an int; None where it is no whole number. A float is none, even without a fraction."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def as_real(value: Any) -> float | None:
    """`value` as a float; None where it is no number."""
    if isinstance(value, bool) or not hasattr(type(value), "__float__"):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # of several elements, complex, or too large
        return None
