"""Random numbers from (seed, purpose, step): nothing has to be stored to go on exactly where a run stopped."""

from __future__ import annotations

import hashlib

import torch

__all__ = ["generator", "seed_for"]


def seed_for(seed: int, purpose: str, *counters: int) -> int:
    """63 bits that depend on every argument."""
    digest = hashlib.sha256(repr((int(seed), purpose, *map(int, counters))).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, purpose: str, *counters: int) -> torch.Generator:
    """A fresh CPU generator for one purpose at one step."""
    return torch.Generator().manual_seed(seed_for(seed, purpose, *counters))
