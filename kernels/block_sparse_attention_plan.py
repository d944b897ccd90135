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

    def within(self, block: int, rows: str) -> Tile:
        """No larger than a block; with fewer warps where there are fewer of the rows that they share."""
        found = self._replace(queries=min(self.queries, block), keys=min(self.keys, block))
        share = getattr(self, rows) // getattr(found, rows)
        return found._replace(warps=max(1, self.warps // share))


class Plan(NamedTuple):
    """The padded head_dim, d1 + d2; and tiles."""

    d1: int
    d2: int
    forward: Tile
    dq: Tile
    dkdv: Tile


# {bytes of an element: [(head_dim up to, block from, (forward, dq, dkdv))]}, the first that fits
_TILES = {
    2: [
        (64, 128, (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 2))),
        (64, 16, (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(32, 64, 4, 2))),
        (128, 128, (Tile(128, 64, 8, 3), Tile(128, 32, 8, 2), Tile(32, 128, 8, 2))),
        (128, 16, (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(32, 64, 4, 2))),
        (256, 16, (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(16, 64, 8, 2))),
    ],
    4: [
        (64, 16, (Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2))),
        (128, 16, (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2))),
        (256, 16, (Tile(32, 16, 8, 2), Tile(16, 16, 8, 2), Tile(16, 16, 8, 2))),
    ],
}


@lru_cache(maxsize=1024)
def plan_of(width: int, block: int, itemsize: int) -> Plan:
    """For a head_dim of at most 256 and elements of 2 or 4 bytes."""
    d1, d2 = _padded(width)
    tiles = next(tiles for most, least, tiles in _TILES[itemsize] if d1 + d2 <= most and block >= least)
    rows = ("queries", "queries", "keys")
    return Plan(d1, d2, *(tile.within(block, of) for tile, of in zip(tiles, rows, strict=True)))


def _padded(width: int) -> tuple[int, int]:
    """A power of two of at least 16, or up to 128 a larger and a smaller one: whichever pads least."""
    if width > 128:
        return 256, 0
    powers = [1 << i for i in range(4, 8)]
    pairs = [(large, small) for large in powers for small in (0, *powers) if small < large]
    return min((pair for pair in pairs if sum(pair) >= width), key=lambda pair: (sum(pair), pair[1]))
