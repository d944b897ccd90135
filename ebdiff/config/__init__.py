"""The configuration of a run: one schema, presets as YAML beside it, files and dotted overrides on top."""

from .resolve import FILE, PRESETS, completed, keep, read, refuse_other, resolve, validated
from .schema import Conditional, Config

__all__ = [
    "FILE",
    "PRESETS",
    "Conditional",
    "Config",
    "completed",
    "keep",
    "read",
    "refuse_other",
    "resolve",
    "validated",
]
