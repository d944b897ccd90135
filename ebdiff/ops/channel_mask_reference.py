"""What the operators on channel masks compute, in plain torch: the specification, and what serves without _C.

Arguments have been checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .mask_axes import Axes

__all__ = [
    "ARENA_BYTES",
    "Kind",
    "Lists",
    "apply_mask_",
    "arena_plan",
    "by_owner",
    "channel_sums",
    "compact",
    "kept_shapes",
    "mask_distance",
    "masked_adamw_",
    "memory_strides",
    "scatter_back_",
    "views",
]

Kind = Literal["square", "absolute", "product", "absolute product"]
ARENA_BYTES = 64  # every tensor of an arena starts at a multiple: a cache line, and the widest vector register


def by_owner(axes: Axes) -> dict[int, dict[int, Tensor]]:
    """{number of a tensor: {dim: keep}}."""
    table: dict[int, dict[int, Tensor]] = {}
    for kept, tensor, dim in zip(*axes.triples, strict=True):
        table.setdefault(tensor, {})[dim] = kept
    return table


def apply_mask_(tensors: Sequence[Tensor], axes: Axes) -> None:
    """Zero the removed channels, in place."""
    for kept, i, dim in zip(*axes.triples, strict=True):
        tensors[i].index_fill_(dim, _positions(~kept, tensors[i]), 0)


def compact(tensors: Sequence[Tensor], small: Sequence[Tensor], axes: Axes) -> None:
    """Fill `small`, views of arenas (`arena_plan`), and the gaps behind them up to the next multiple of 64 bytes."""
    table = by_owner(axes)
    for i, (tensor, view) in enumerate(zip(tensors, small, strict=True)):
        for dim, alive in table.get(i, {}).items():
            tensor = tensor.index_select(dim, _positions(alive, tensor))
        view.as_strided((_padded(view.numel(), view.dtype),), (1,), view.storage_offset()).zero_()
        view.copy_(tensor)


def scatter_back_(dense: Sequence[Tensor], small: Sequence[Tensor], axes: Axes) -> None:
    """Write the small tensors to the kept positions of the dense ones; removed positions stay as they are."""
    table = by_owner(axes)
    for i, (tensor, part) in enumerate(zip(dense, small, strict=True)):
        where = [torch.arange(size, device=tensor.device) for size in tensor.shape]
        for dim, alive in table.get(i, {}).items():
            where[dim] = _positions(alive, tensor)
        tensor[torch.meshgrid(*where, indexing="ij") if where else ...] = part


class Lists(NamedTuple):
    """What AdamW updates: lists of equal length, and the average's, which may be empty."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avg: Sequence[Tensor]
    exp_avg_sq: Sequence[Tensor]
    ema: Sequence[Tensor]

    @property
    def written(self) -> tuple[Sequence[Tensor], ...]:
        """Those that are written to."""
        return self.params, self.exp_avg, self.exp_avg_sq, self.ema


def masked_adamw_(lists: Lists, axes: Axes, numbers: Mapping[str, float], maximize: bool) -> None:
    """One step of AdamW, of its masks and of the moving average.

    In float32 (float64 for float64), each operation rounded once, in this order; results are rounded to the nearest.
    (With MKL the square root of float64 can be one unit in the last place off; then so is this, but not `_C`.)
    Source: Loshchilov & Hutter 2019, algorithm 2.
    """
    n = numbers
    for i, (p, g, m, v) in enumerate(zip(*lists[:4], strict=True)):
        wide = torch.promote_types(p.dtype, torch.float32)
        gradient = -g.to(wide) if maximize else g.to(wide)
        mean = m.to(wide) + (gradient - m.to(wide)) * n["one_minus_beta1"]
        square = v.to(wide) * n["beta2"] + gradient * gradient * n["one_minus_beta2"]
        root = square.double().sqrt().to(wide)  # MKL's, which torch calls, is not the nearest in its own precision
        change = mean / (root * n["inverse_bias2"] + n["eps"]) * n["step_size"]
        p.copy_(p.to(wide) * n["decay"] - change)
        m.copy_(mean)
        v.copy_(square)
        if lists.ema:
            e = lists.ema[i].to(wide)
            lists.ema[i].copy_(e - (e - p.to(wide)) * n["one_minus_ema"])
    for tensors in lists.written:
        if tensors:
            apply_mask_(tensors, axes)


def channel_sums(
    x: Sequence[Tensor], y: Sequence[Tensor], owner: Sequence[int], dims: Sequence[int], kind: Kind
) -> Tensor:
    """float64, flat: for each k the sums of f(x, y) of tensor ``owner[k]`` over all dimensions but ``dims[k]``."""
    table: dict[int, Tensor] = {}
    parts = [x[0].new_empty(0, dtype=torch.float64)]
    for i, dim in zip(owner, dims, strict=True):
        if i not in table:
            table = {i: _term(x[i], y[i] if y else None, kind)}  # one at a time, in memory
        others = [d for d in range(x[i].dim()) if d != dim]
        parts.append(table[i].sum(others, dtype=torch.float64) if others else table[i].double())
    return torch.cat(parts).cpu()


def _term(x: Tensor, y: Tensor | None, kind: Kind) -> Tensor:
    wide = torch.promote_types(x.dtype if y is None else torch.promote_types(x.dtype, y.dtype), torch.float32)
    value = x.to(wide) if y is None else x.to(wide) * y.to(wide)
    return value.square() if kind == "square" else value if kind == "product" else value.abs()


def mask_distance(bits: Tensor, newest: int) -> Tensor:
    """int64 [n]: in how many bits each row of the packed masks differs from row `newest`."""
    differ = bits ^ bits[newest]
    zeros = torch.zeros(len(bits), dtype=torch.int64, device=bits.device)
    return sum((((differ >> shift) & 1).sum(1) for shift in range(8)), zeros)


# Arenas ---------------------------------------------------------------------------------------------------------------


def kept_shapes(
    tensors: Sequence[Tensor], owner: Sequence[int], dims: Sequence[int], kept: Sequence[int]
) -> list[list[int]]:
    """The shapes of what is kept of the tensors; ``kept[k]`` positions of masked axis k."""
    shapes = [list(tensor.shape) for tensor in tensors]
    for i, dim, count in zip(owner, dims, kept, strict=True):
        shapes[i][dim] = count
    return shapes


def memory_strides(tensor: Tensor, shape: Sequence[int]) -> list[int]:
    """The strides of a dense tensor of this shape whose dimensions lie in memory in the order of `tensor`'s."""
    steps = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda d: -steps[d])
    strides, step = [1] * tensor.dim(), 1
    for d in reversed(order):
        strides[d] = step
        step *= max(shape[d], 1)
    return strides


def arena_plan(
    tensors: Sequence[Tensor], shapes: Sequence[Sequence[int]]
) -> tuple[dict[torch.dtype, int], list[tuple[int, int]]]:
    """Where each tensor goes: ({dtype: elements of its arena}, [(number of the arena, first element)]).

    Arenas come in the order in which their dtypes first appear; every tensor starts at a multiple of 64 bytes, and the
    gaps are zero.
    """
    lengths: dict[torch.dtype, int] = {}
    places = []
    for tensor, shape in zip(tensors, shapes, strict=True):
        start = lengths.setdefault(tensor.dtype, 0)
        count = 1
        for size in shape:
            count *= size
        places.append((list(lengths).index(tensor.dtype), start))
        lengths[tensor.dtype] = start + _padded(count, tensor.dtype)
    return lengths, places


def views(
    arenas: Sequence[Tensor],
    tensors: Sequence[Tensor],
    shapes: Sequence[Sequence[int]],
    places: Sequence[tuple[int, int]],
) -> list[Tensor]:
    """The tensors inside their arenas, laid out in memory as those they were taken from."""
    return [
        arenas[arena].as_strided(shape, memory_strides(tensor, shape), start)
        for tensor, shape, (arena, start) in zip(tensors, shapes, places, strict=True)
    ]


def _padded(count: int, dtype: torch.dtype) -> int:
    """So many elements that the next tensor of the arena starts at a multiple of 64 bytes."""
    step = ARENA_BYTES // dtype.itemsize
    return -(-count // step) * step


def _positions(flags: Tensor, like: Tensor) -> Tensor:
    return flags.nonzero()[:, 0].to(like.device)
