"""How the kernels of block-sparse attention divide their work: plain integers, from shapes alone.

The sizes of tiles are those that the compiler keeps in registers on every architecture
(tests/test_block_sparse_attention_aot.py); which of them are fastest has not been measured on a GPU yet.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

__all__ = ["Plan", "Tile", "plan_of"]


class Tile(NamedTuple):
    """What a program takes at a time: tokens of queries and of keys; warps, and tiles in flight."""

    queries: int
    keys: int
    warps: int
    stages: int

    def within(self, block: int) -> Tile:
        """No larger than a block, and with a warp for at most 16 of the rows that it keeps."""
        queries, keys = min(self.queries, block), min(self.keys, block)
        return Tile(queries, keys, min(self.warps, max(1, max(queries, keys) // 16)), self.stages)


class Plan(NamedTuple):
    """The padded head_dim, d1 + d2; and tiles."""

    d1: int
    d2: int
    forward: Tile
    dq: Tile
    dkdv: Tile


# {bytes of an element: [(head_dim up to, forward, dq, dkdv)]}
_TILES = {
    2: [
        (64, Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 2)),
        (128, Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
        (256, Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2)),
    ],
    4: [
        (64, Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
        (128, Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
        (256, Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    ],
}


@lru_cache(maxsize=1024)
def plan_of(width: int, block: int, itemsize: int) -> Plan:
    """For a head_dim of at most 256 and elements of 2 or 4 bytes."""
    d1, d2 = _padded(width)
    tiles = next(tiles for most, *tiles in _TILES[itemsize] if d1 + d2 <= most)
    forward, dq, dkdv = (tile.within(block) for tile in tiles)
    return Plan(d1, d2, forward, dq, dkdv)


def _padded(width: int) -> tuple[int, int]:
    """One power of two of at least 16, or a larger and a smaller one: whichever pads least."""
    powers = [1 << i for i in range(4, 9)]
    pairs = [(large, small) for large in powers for small in (0, *powers) if small < large]
    return min((pair for pair in pairs if sum(pair) >= width), key=lambda pair: (sum(pair), pair[1]))
