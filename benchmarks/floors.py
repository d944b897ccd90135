"""How many bytes an operation on channel masks has to move, whoever does it.

Memory moves in lines: a removed channel that lies between kept ones in every row (an input channel of a convolution
weight) shares its lines with them, so its row is read and written whole. A row that is removed whole (an output
channel) is only written. A tensor none of whose channels is removed is left alone. Masks themselves count nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from ebdiff.ops.channel_mask import Axes


@dataclass(frozen=True)
class Elements:
    """Elements of a list of tensors by what a mask does to them.

    Args:
        removed_rows: in rows (positions of dimension 0) that are removed whole.
        mixed: in kept rows, of tensors with further masked dimensions.
        whole: in kept rows of the other tensors.
        kept: in no removed channel.
    """

    removed_rows: int
    mixed: int
    whole: int
    kept: int

    @classmethod
    def of(cls, tensors: Sequence[Tensor], axes: Axes) -> Elements:
        """Count."""
        masks: list[dict[int, int]] = [{} for _ in tensors]
        for count, i, dim in zip(axes.kept, axes.owner, axes.dims, strict=True):
            masks[i][dim] = count
        removed = mixed = whole = kept = 0
        for tensor, counts in zip(tensors, masks, strict=True):
            rows, row = (tensor.shape[0], prod(tensor.shape[1:])) if tensor.dim() else (1, 1)
            left = counts.get(0, rows)
            removed += (rows - left) * row
            mixed += left * row if counts.keys() - {0} else 0
            whole += 0 if counts.keys() - {0} else left * row
            kept += prod(counts.get(dim, size) for dim, size in enumerate(tensor.shape))
        return cls(removed, mixed, whole, kept)

    @property
    def all(self) -> int:
        """Elements of all tensors."""
        return self.removed_rows + self.mixed + self.whole

    def apply_mask(self, size: int) -> int:
        """Bytes, for elements of `size` bytes: removed rows are written, mixed ones read and written."""
        return size * (self.removed_rows + 2 * self.mixed)

    def masked_adamw(self, size: int, ema: bool = True) -> int:
        """Bytes: w, g, m, v (and the average) are read, all but g written; removed rows are only written."""
        read, written = (5, 4) if ema else (4, 3)
        return size * ((read + written) * (self.mixed + self.whole) + written * self.removed_rows)

    def compact(self, size: int) -> int:
        """Bytes: kept rows are read whole, kept elements written."""
        return size * (self.mixed + self.whole + self.kept)

    def scatter_back(self, size: int) -> int:
        """Bytes: kept elements are read, everything is written."""
        return size * (self.kept + self.all)

    def scatter_into(self, size: int) -> int:
        """Bytes, into dense tensors that are there: kept elements are read, kept rows written, mixed ones also read."""
        return size * (self.kept + 2 * self.mixed + self.whole)
