"""Which blocks of an attention are computed: for each head, blocks of queries against blocks of keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn, TypeAlias

import torch
from torch import Tensor

from ..errors import EbdiffError

__all__ = ["BLOCKS", "BlockMask", "Blocks", "expanded"]

BLOCKS = (16, 32, 64, 128)  # tokens

Rule: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # places of rows and of columns of blocks -> which are kept


class Blocks(NamedTuple):
    """The kept blocks of every row, compressed: those of row i are at[start[i]:start[i + 1]], ascending.

    Args:
        start: int32 [rows + 1].
        at: int32 [kept blocks].
    """

    start: Tensor
    at: Tensor


@dataclass(frozen=True, eq=False)
class BlockMask:
    """The blocks of an attention that are computed. True = KEPT. Equal to another with the same contents.

    Args:
        kept: bool [B or 1, H, ceil(q_len / block), ceil(k_len / block)]; 1: the same for every sample.
        block: tokens in a block of queries, and in one of keys: 16, 32, 64 or 128.
        q_len, k_len: tokens; the last blocks may be shorter.

    Attributes:
        rows: for each (sample, head, block of queries) in order, its kept blocks of keys.
        columns: for each (sample, head, block of keys) in order, its kept blocks of queries.

    Raises:
        EbdiffError: a block of another size, or a shape that does not follow from the lengths.

    Making one waits for the device of `kept`, once.
    """

    kept: Tensor
    block: int
    q_len: int
    k_len: int
    rows: Blocks = field(init=False, repr=False)
    columns: Blocks = field(init=False, repr=False)
    _elsewhere: dict[torch.device, BlockMask] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.block not in BLOCKS:
            _refuse("block", "16, 32, 64 or 128 tokens", str(self.block))
        if min(self.q_len, self.k_len) < 1:
            _refuse("length", "at least one token", f"{self.q_len} queries, {self.k_len} keys")
        shape = [-(-self.q_len // self.block), -(-self.k_len // self.block)]
        kept = self.kept
        if kept.dtype != torch.bool or kept.dim() != 4 or list(kept.shape[2:]) != shape or 0 in kept.shape[:2]:
            _refuse("kept", f"bool [samples or 1, heads, {shape[0]}, {shape[1]}]", f"{kept.dtype} {list(kept.shape)}")
        if kept.numel() >= 1 << 31:
            _refuse("kept", "fewer than 2^31 blocks", str(kept.numel()))
        with torch.inference_mode(False):  # a mask that sampling has made or moved serves training too
            object.__setattr__(self, "kept", kept.detach().clone(memory_format=torch.contiguous_format))
            object.__setattr__(self, "rows", _compressed(self.kept))
            object.__setattr__(self, "columns", _compressed(self.kept.transpose(-1, -2)))

    @classmethod
    def full(cls, heads: int, q_len: int, k_len: int, block: int) -> BlockMask:
        """Every block."""
        return cls(_grid(heads, q_len, k_len, block, lambda row, column: row == row), block, q_len, k_len)

    @classmethod
    def local(cls, heads: int, q_len: int, k_len: int, block: int, window: int) -> BlockMask:
        """Blocks in which some query and some key are at most `window` tokens apart."""
        near = _nearness(block, window)
        return cls(_grid(heads, q_len, k_len, block, near), block, q_len, k_len)

    @classmethod
    def strided(cls, heads: int, q_len: int, k_len: int, block: int, stride: int, window: int = 0) -> BlockMask:
        """Every `stride`-th block of keys, from the first on, and what `local` keeps (Child et al. 2019)."""
        if stride < 1:
            _refuse("stride", "at least 1", str(stride))
        near = _nearness(block, window)
        kept = _grid(heads, q_len, k_len, block, lambda row, column: near(row, column) | (column % stride == 0))
        return cls(kept, block, q_len, k_len)

    @classmethod
    def top(cls, mass: Tensor, density: float, block: int, q_len: int, k_len: int) -> BlockMask:
        """Each head's blocks of most attention, and in every row of blocks the best one.

        Args:
            mass: finite [samples or 1, H, blocks of queries, blocks of keys], or without the first dimension.
            density: the share of each head's blocks that are kept, in (0, 1]; more where every row takes its one.
        """
        mass = mass[None] if mass.dim() == 3 else mass
        if not 0 < density <= 1:
            _refuse("density", "in (0, 1]", str(density))
        if mass.dim() != 4 or not bool(mass.isfinite().all()):
            _refuse("mass", "finite [samples or 1, heads, blocks, blocks]", str(list(mass.shape)))
        first = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, mass.argmax(-1, keepdim=True), True)
        order = mass.masked_fill(first, torch.inf).flatten(2).argsort(dim=-1, descending=True, stable=True)
        count = max(1, round(density * order.shape[-1]))
        kept = first.flatten(2).scatter(-1, order[..., :count], True).view(mass.shape)
        return cls(kept, block, q_len, k_len)

    @property
    def density(self) -> float:
        """The share of blocks that are kept."""
        return float(self.kept.float().mean())

    def heads(self, keep: Tensor) -> BlockMask:
        """The mask of the heads that stay; keep: bool [H]."""
        if keep.dtype != torch.bool or keep.shape != self.kept.shape[1:2] or not bool(keep.any()):
            _refuse("keep", f"bool [{self.kept.shape[1]}], one of them kept", f"{keep.dtype} {list(keep.shape)}")
        return BlockMask(self.kept[:, keep.to(self.kept.device)], self.block, self.q_len, self.k_len)

    def to(self, device: torch.device | str) -> BlockMask:
        """The same on another device, made once for each."""
        device = torch.device(device)
        if device == self.kept.device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = self._moved(device)
        return self._elsewhere[device]

    def _moved(self, device: torch.device) -> BlockMask:
        """What was made is moved, not made again: torch.compile cannot follow `_compressed`."""
        moved = object.__new__(BlockMask)
        with torch.inference_mode(False):
            made = {
                "kept": self.kept.to(device),
                "rows": Blocks(*(part.to(device) for part in self.rows)),
                "columns": Blocks(*(part.to(device) for part in self.columns)),
            }
        for name, value in {**vars(self), **made, "_elsewhere": {}}.items():
            object.__setattr__(moved, name, value)
        return moved

    def dense(self) -> Tensor:
        """bool [B or 1, H, q_len, k_len]."""
        return expanded(self.kept, self.block, self.q_len, self.k_len)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockMask):
            return NotImplemented
        same = (self.block, self.q_len, self.k_len) == (other.block, other.q_len, other.k_len)
        return same and torch.equal(self.kept.cpu(), other.kept.cpu())

    def __hash__(self) -> int:
        return hash((self.block, self.q_len, self.k_len, self.kept.shape))

    def __str__(self) -> str:
        heads, lengths = self.kept.shape[1], f"{self.q_len} x {self.k_len} tokens"
        return f"{heads} heads, {lengths} in blocks of {self.block}, {self.density:.1%} kept"


def expanded(kept: Tensor, block: int, q_len: int, k_len: int) -> Tensor:
    """bool [.., blocks, blocks] -> bool [.., q_len, k_len]."""
    whole = kept.repeat_interleave(block, -2).repeat_interleave(block, -1)
    return whole[..., :q_len, :k_len]


def _compressed(kept: Tensor) -> Blocks:
    counts = kept.sum(-1, dtype=torch.int32).flatten()
    start = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    return Blocks(start, kept.nonzero()[:, -1].to(torch.int32))


def _grid(heads: int, q_len: int, k_len: int, block: int, rule: Rule) -> Tensor:
    """bool [1, heads, blocks of queries, blocks of keys], the same for every head."""
    rows, columns = (torch.arange(-(-length // max(block, 1))) for length in (q_len, k_len))
    return rule(rows[:, None], columns[None, :]).expand(1, heads, len(rows), len(columns))


def _nearness(block: int, window: int) -> Rule:
    if window < 0:
        _refuse("window", "at least 0 tokens", str(window))
    # The nearest tokens of blocks that are d > 0 apart are d * block - (block - 1) apart.
    return lambda row, column: (row - column).abs() * block < window + block


def _refuse(what: str, expected: str, got: str) -> NoReturn:
    raise EbdiffError(f"block mask: {what}", expected=expected, got=got, remedy="see ebdiff.ops.BlockMask")
