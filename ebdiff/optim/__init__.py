"""AdamW that keeps removed channels at zero and moves the average of the weights along, all in one pass over memory."""

from __future__ import annotations

from .adamw import AdamW
from .average import steps_ema

__all__ = ["AdamW", "steps_ema"]
