"""How the kernels of group normalisation divide their work: plain integers, from shapes alone.

The sizes of tiles and the numbers of warps are those that the compiler keeps in registers on every architecture
(tests/test_group_norm_aot.py); which of them are fastest has not been measured on a GPU yet.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple, TypeAlias

__all__ = ["OnePass", "Shape", "TwoPass", "plan_of", "power_of_two"]

PROGRAMS = 2 * 132  # enough for every multiprocessor of an H100 or H200, twice
_HELD = 16384  # elements that a program holds in registers: with twice as many some variants spill
_CACHED = 96 << 10  # bytes of x that, with as many of dy, stay in the caches while a program reads them again
_WIDEST = 1024  # channels of a program, which holds several numbers of each
_PAIRS = 1024  # channels times groups of a program, which compares each with each
_FEW = 4  # positions: a group of so few elements is as exact as torch's only where a small tile is held
_TILE = 8192  # elements of two tensors, or of one and its sums, that a program keeps in registers

Slabs: TypeAlias = tuple[tuple[int, int, int, int], ...]


class Shape(NamedTuple):
    """A tensor of `itemsize` bytes an element, [n, c, hw]; last: the channels lie contiguous."""

    n: int
    c: int
    hw: int
    itemsize: int
    last: bool

    @property
    def unit(self) -> int:
        """Up to 8: what divides the size that lies contiguous, and so the alignment of every row."""
        size = self.c if self.last else self.hw
        return next(unit for unit in (8, 4, 2, 1) if size % unit == 0)


class OnePass(NamedTuple):
    """A program takes a slab, [cb, hw], of one sample.

    Args:
        slabs: (first channel, its end, first group, its end) of each, channels divided by unit.
        unit: divides every slab's first channel and end.
        cb, gb: channels and groups of a slab, padded to powers of two.
        forward, backward: (positions of a tile, warps, held in registers), the first padded to a power of two.
    """

    slabs: Slabs
    unit: int
    cb: int
    gb: int
    forward: tuple[int, int, bool]
    backward: tuple[int, int, bool]


class TwoPass(NamedTuple):
    """A program takes a tile, [cb, rb], of one sample.

    Args:
        chunks, blocks: tiles along positions and channels.
        small: (channels, chunks) that the programs between the passes take at a time.
        forward, backward: warps.
    """

    cb: int
    rb: int
    chunks: int
    blocks: int
    small: tuple[int, int]
    forward: int
    backward: int


def power_of_two(size: int) -> int:
    """The smallest that is not below size."""
    return 1 << max(0, size - 1).bit_length()


@lru_cache(maxsize=1024)
def plan_of(shape: Shape, offsets: tuple[int, ...]) -> OnePass | TwoPass:
    """One pass where a program can hold a group; offsets: where the groups begin, and C."""
    if shape.c * shape.hw < 1 << 31:
        held = _HELD // power_of_two(shape.hw)
        found = _slabs(shape, offsets, held)
        if found and _reads_well(shape, *found[1:]):
            return _one_pass(shape, *found, held=True)
        found = _slabs(shape, offsets, _CACHED // shape.itemsize // shape.hw)
        if found and 2 * shape.n * len(found[0]) >= PROGRAMS and _reads_well(shape, *found[1:]):
            return _one_pass(shape, *found, held=False)
    return _two_pass(shape, offsets)


def _reads_well(shape: Shape, unit: int, cb: int) -> bool:
    """Channels last, rows of less than a sector and needlessly narrow loads lose more than a second pass costs.

    Not so where there are a few positions in all.
    """
    rows, loads = cb * shape.itemsize, unit * shape.itemsize
    return (
        not shape.last
        or shape.hw <= _FEW
        or (rows >= min(32, shape.c * shape.itemsize) and (loads >= 8 or unit == shape.unit))
    )


def _one_pass(shape: Shape, slabs: Slabs, unit: int, cb: int, *, held: bool) -> OnePass:
    gb = power_of_two(max(slab[3] - slab[2] for slab in slabs))
    rows = power_of_two(shape.hw)
    cached = _TILE // 2 // cb, 16, False
    forward = (rows, _warps(cb * rows // 1024, 16), True) if held else cached
    backward = (rows, _warps(cb * rows // 512, 16), True) if held and cb * rows <= _TILE else cached
    return OnePass(slabs, unit, cb, gb, forward, backward)


def _slabs(shape: Shape, offsets: tuple[int, ...], most: int) -> tuple[Slabs, int, int] | None:
    """Slabs of at most `most` channels, their unit, and their padded width: wide loads first, then small programs.

    Wider than a group where rows would be shorter than 64 bytes (channels last) or programs smaller than 4096 elements.
    """
    wanted = max(4096 // shape.hw, 64 // shape.itemsize if shape.last else 1, 1)
    wanted, most = min(power_of_two(wanted), power_of_two(shape.c)), min(most, _WIDEST)
    widths = [1 << i for i in range(power_of_two(most).bit_length())] if most else []
    widths = [width for width in widths if width >= wanted] + [width for width in widths[::-1] if width < wanted]
    for unit in [unit for unit in (8, 4, 2) if shape.last and shape.unit % unit == 0] + [1]:
        for width in widths:
            if slabs := _cut(offsets, min(width, most), unit):
                return slabs, unit, power_of_two(max(end - first for first, end, *_ in slabs) * unit)
    return None


def _cut(offsets: tuple[int, ...], width: int, unit: int) -> Slabs:
    """Runs of whole groups, each as long as can be and beginning at a multiple of unit; () where there are none."""
    slabs, at, groups = [], 0, len(offsets) - 1
    while at < groups:
        first = offsets[at]
        ends = range(min(bisect_right(offsets, first + width) - 1, at + _PAIRS), at, -1)
        few = (end for end in ends if power_of_two(end - at) * power_of_two(offsets[end] - first) <= _PAIRS)
        end = next((end for end in few if offsets[end] % unit == 0), None)
        if end is None:
            return ()
        slabs.append((first // unit, offsets[end] // unit, at, end))
        at = end
    return tuple(slabs)


def _two_pass(shape: Shape, offsets: tuple[int, ...]) -> TwoPass:
    size = 2 * _TILE // shape.itemsize
    while size > 1024 and shape.n * shape.c * shape.hw < size * PROGRAMS:
        size //= 2
    if shape.last:
        cb = _block(shape.c, 64)
        rb = min(size // cb, power_of_two(shape.hw))
    else:
        rb = _block(shape.hw, size)
        cb = min(size // rb, power_of_two(shape.c))
    chunks, blocks = -(-shape.hw // rb), -(-shape.c // cb)
    widest = max(b - a for a, b in pairwise(offsets))
    group = min(64, power_of_two(widest))
    small = group, min(power_of_two(chunks), 1024 // group)
    kibibytes = cb * rb * shape.itemsize // 1024
    return TwoPass(cb, rb, chunks, blocks, small, _warps(kibibytes // 2, 8), _warps(kibibytes, 16))


def _warps(wanted: int, most: int) -> int:
    return min(max(wanted, 4), most)


def _block(size: int, most: int) -> int:
    """The largest power of two, of at most `most`, that pads size by at most a fifth."""
    blocks = (1 << i for i in range(min(most, power_of_two(size)).bit_length()))
    return max(block for block in blocks if -(-size // block) * block <= 1.2 * size)
