"""accelerate(model): group norms and the SiLU behind them as one operator, in any model, and back again."""

from __future__ import annotations

from .model import accelerate, restore
from .report import Report

__all__ = ["Report", "accelerate", "restore"]
