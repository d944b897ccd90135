"""The configuration of a run: one schema, presets as YAML beside it, files and dotted overrides on top."""

from .resolve import FILE, PRESETS, keep, refuse_other, resolve
from .schema import Conditional, Config

__all__ = ["FILE", "PRESETS", "Conditional", "Config", "keep", "refuse_other", "resolve"]
