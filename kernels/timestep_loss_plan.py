"""How the kernels of the timestep loss divide their work: plain integers, from shapes alone.

Not measured on a GPU yet: the blocks are those that the compiler keeps in registers with several loads under way.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from triton import cdiv, next_power_of_2

__all__ = ["Plan", "plan_of", "unit_of"]

PROGRAMS = 4 * 132  # enough for every multiprocessor of an H100 or H200, four times
_BLOCK = 4096
_STEPS = 4
_SMALL = 1024


class Plan(NamedTuple):
    """`chunks` programs for each sample; each takes `steps` blocks of `block` elements.

    small: (samples, chunks) that the last program adds up at a time, powers of two.
    """

    chunks: int
    steps: int
    block: int
    warps: int
    small: tuple[int, int]


@lru_cache(maxsize=1024)
def plan_of(samples: int, size: int) -> Plan:
    """For so many samples of so many elements."""
    block = min(_BLOCK, max(32, next_power_of_2(size)))
    blocks = cdiv(size, block)
    steps = min(_STEPS, max(1, samples * blocks // PROGRAMS), blocks)
    chunks = cdiv(blocks, steps)
    across = min(_SMALL // 16, next_power_of_2(chunks))
    small = min(_SMALL // across, next_power_of_2(samples)), across
    return Plan(chunks, steps, block, max(4, block // 256), small)


def unit_of(size: int) -> int:
    """Up to 8: what divides it, and so the alignment of every row of that size."""
    return next(unit for unit in (8, 4, 2, 1) if size % unit == 0)
