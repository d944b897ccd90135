"""Which blocks of attention matter: how much of it each holds, and the masks that were drawn from that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import EbdiffError
from ..numbers import as_real, as_whole
from ..ops.block_mask import BLOCKS, BlockMask
from ..seeds import seed_for
from .bits import BitHistory

__all__ = ["Attention", "BlockHistory", "Grid", "attention_mass", "union"]

_HELD = {"cpu": 1 << 20, "cuda": 1 << 24}  # scores that are in memory at a time: on the CPU, in its cache


@dataclass(frozen=True)
class Attention:
    """What is watched of attention.

    A layer that attends at several sizes in one forward (to its own tokens, and to those of a text) stays dense: no
    mask fits them all.

    Args:
        density: the share of each head's blocks that tickets KEEP.
        block: tokens in a block: 16, 32, 64 or 128.
        tokens: layers with fewer queries or keys stay dense: below about 2000 nothing is faster than dense attention.
        every: steps between looks at the attention; by default window / 200. A look costs about a forward of it.

    Raises:
        EbdiffError: values that make no sense.
    """

    density: float
    block: int = 64
    tokens: int = 2048
    every: int | None = None

    def __post_init__(self) -> None:
        density = as_real(self.density)
        if density is None or not 0 < density <= 1:
            raise EbdiffError("density", expected="a share kept in (0, 1]", got=repr(self.density), remedy="e.g. 0.25")
        object.__setattr__(self, "density", density)
        if self.block not in BLOCKS:
            raise EbdiffError("block", expected=f"one of {BLOCKS} tokens", got=repr(self.block), remedy="e.g. 64")
        for name in ("tokens", "every"):
            value = getattr(self, name)
            if value is not None and (as_whole(value) or 0) < 1:
                expected = "a whole number, at least 1"
                raise EbdiffError(f"attention: {name}", expected=expected, got=repr(value), remedy="see Attention")

    def is_due(self, step: int, window: int) -> bool:
        """Is this step, counted from 0, one to look at? Drawn, one of every few: regions may take turns in any way."""
        every = self.pace(window)
        stretch, place = divmod(step, every)
        return place == seed_for(0, "attention", stretch) % every

    def pace(self, window: int) -> int:
        """Steps between looks, where masks settle within so many steps."""
        return self.every or max(1, window // 200)


class Grid(NamedTuple):
    """The blocks of one layer."""

    heads: int
    q_len: int
    k_len: int
    block: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(heads, blocks of queries, blocks of keys)."""
        return self.heads, -(-self.q_len // self.block), -(-self.k_len // self.block)

    @property
    def size(self) -> int:
        """Blocks of all heads."""
        heads, rows, columns = self.shape
        return heads * rows * columns

    def mask(self, kept: Tensor) -> BlockMask:
        """The mask of these blocks, bool [size]."""
        return BlockMask(kept.view(1, *self.shape), self.block, self.q_len, self.k_len)

    def top(self, mass: Tensor, density: float) -> BlockMask:
        """Each head's blocks of most mass, [size], and one in every row: that of its own keys in self-attention."""
        mass = mass.view(self.shape)
        if self.q_len == self.k_len:
            mass = mass + 2 * torch.eye(self.shape[1], dtype=mass.dtype, device=mass.device)  # more than any mass
        return BlockMask.top(mass, density, self.block, self.q_len, self.k_len)


def attention_mass(
    query: Tensor, key: Tensor, block: int, scale: float | None = None, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """How much attention each block holds: the probabilities, summed over its keys, averaged over its queries.

    Some blocks of queries at a time; the matrix of all scores is never in memory.

    Args:
        query: [B, H, Sq, D]; averaged over the samples too.
        key: [B, Hkv, Sk, D]; Hkv divides H.
        block: tokens in a block of queries, and in one of keys.
        scale: of the scores; 1 / sqrt(D) where None.
        mask: as scaled_dot_product_attention takes it: bool, True = takes part, or added to the scores.
        causal: keys behind the query take no part.

    Returns:
        float32 [H, blocks of queries, blocks of keys]; every row sums to 1. Without gradient.
    """
    query, key = query.detach(), key.detach()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT
    samples, heads, q_len = query.shape[:3]
    k_len = key.shape[-1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    mask = None if mask is None else mask.expand(*torch.broadcast_shapes(mask.shape, (q_len, k_len)))
    held = _HELD.get(query.device.type, _HELD["cuda"])
    rows = max(1, held // (samples * heads * block * k_len)) * block
    found = []
    for start in range(0, q_len, rows):
        part = slice(start, min(start + rows, q_len))
        scores = (query[:, :, part] @ key).float() * scale
        if causal:
            at = torch.arange(q_len, device=query.device)[part, None]
            scores = scores.masked_fill(at < torch.arange(k_len, device=query.device), -torch.inf)
        if mask is not None:
            here = mask[..., part, :]
            scores = scores.masked_fill(~here, -torch.inf) if here.dtype == torch.bool else scores + here
        by_key = _summed(scores.softmax(-1).nan_to_num(0).mean(0), block)
        found.append(_summed(by_key.mT, block).mT)
    queries = torch.full((-(-q_len // block), 1), float(block), device=query.device)
    queries[-1] = q_len - (len(queries) - 1) * block
    return torch.cat(found, 1) / queries


def _summed(values: Tensor, block: int) -> Tensor:
    """[.., n] -> [.., blocks]: sums over blocks of the last dimension, of which the last may be shorter."""
    whole = torch.nn.functional.pad(values, (0, -values.shape[-1] % block))
    total: Tensor = whole.unflatten(-1, (-1, block)).sum(-1)
    return total


class BlockHistory(BitHistory):
    """The block masks of all watched layers, drawn together: the first and the last `keep`, as `MaskHistory`."""

    def __init__(self, grids: Mapping[str, Grid], keep: int = 64) -> None:
        super().__init__(sum(grid.size for grid in grids.values()), keep)
        self.grids = dict(grids)

    def add(self, step: int, masks: Mapping[str, BlockMask]) -> None:
        """Remember masks as drawn at `step`, one for each layer."""
        self._remember(step, torch.cat([masks[name].kept.flatten().cpu() for name in self.grids]))

    def __getitem__(self, index: int) -> dict[str, BlockMask]:
        """The masks at this place: 0 is the first, -1 the newest."""
        parts = torch.split(self._bits(index), [grid.size for grid in self.grids.values()])
        return {name: grid.mask(kept) for (name, grid), kept in zip(self.grids.items(), parts, strict=True)}


def union(masks: list[Mapping[str, BlockMask]]) -> dict[str, BlockMask]:
    """For each layer the blocks that some of these masks keep."""
    first, *others = masks
    joined: dict[str, BlockMask] = {}
    for name, mask in first.items():
        kept = mask.kept.clone()
        for other in others:
            kept |= other[name].kept
        joined[name] = BlockMask(kept, mask.block, mask.q_len, mask.k_len)
    return joined
