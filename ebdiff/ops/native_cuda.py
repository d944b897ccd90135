"""The compiled part on a GPU: the functions of `native_cpu`, on the current stream. Arguments have been checked.

Nothing here waits for the device, but for `channel_sums`, whose result is on the CPU, and for the first call with
tensors and masks that were not seen before, which copies their table (see `cuda_table`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import native
from .channel_mask_reference import Kind, Lists
from .cuda_table import stream_of, table_of
from .mask_axes import Axes
from .native_cpu import FLOATS, KINDS, NUMBERS, NotTaken, addresses, addresses_apart, float_of

__all__ = ["apply_mask_", "channel_sums", "compact", "mask_distance", "masked_adamw_", "scatter_back_"]


def apply_mask_(tensors: Sequence[Tensor], axes: Axes) -> None:
    """Zero the removed channels: one launch for all dtypes."""
    table = table_of(tensors, axes)
    _c().apply_mask_cuda(*table.where(), addresses(tensors), _log2(tensors))


def compact(tensors: Sequence[Tensor], small: Sequence[Tensor], axes: Axes) -> None:
    """Fill `small`, views of arenas, and the gaps behind them up to the next multiple of 64 bytes."""
    table = table_of(tensors, axes, indexed=True, written=False)
    _c().compact_cuda(*table.where(), addresses(tensors), addresses(small), _log2(tensors))


def scatter_back_(dense: Sequence[Tensor], small: Sequence[Tensor], axes: Axes) -> None:
    """`small` is dense in memory, in the order of its large tensor."""
    table = table_of(dense, axes, indexed=True)
    _c().scatter_back_cuda(*table.where(), addresses(dense), addresses(small), _log2(dense))


def masked_adamw_(lists: Lists, axes: Axes, numbers: Mapping[str, float] | Tensor, maximize: bool) -> None:
    """All tensors of a parameter have its dtype and its strides.

    Args:
        numbers: by name, or float64 [8] on the device in the order of `NUMBERS`: then the kernel reads them, so that
            each replay of a CUDA graph can have others. The rest is as in `native_cpu.masked_adamw_`.
    """
    table, dtype = table_of(lists.params, axes), float_of(lists.params)
    at = addresses_apart(lists, table.layout)
    by_value, address = [0.0] * len(NUMBERS), 0
    if isinstance(numbers, Tensor):
        address = numbers.data_ptr()
    else:
        by_value = [numbers[name] for name in NUMBERS]
    _c().masked_adamw_cuda(*table.where(), dtype, *at, by_value, maximize, address)


def channel_sums(
    x: Sequence[Tensor], y: Sequence[Tensor], owner: Sequence[int], dims: Sequence[int], kind: Kind
) -> Tensor:
    """y is laid out as x and has its dtypes. The result is on the CPU. Deterministic."""
    if any(tensor.dtype not in FLOATS for tensor in x):
        raise NotTaken
    table = table_of(x, Axes(owner=tuple(owner), dims=tuple(dims)), written=False)
    device = x[0].device
    out = torch.empty(table.compiled.channels, dtype=torch.float64, device=device)
    workspace = torch.empty(table.compiled.workspace, dtype=torch.float64, device=device)
    dtypes = [FLOATS[tensor.dtype] for tensor in x]
    lists = (addresses(x), addresses(y))
    _c().channel_sums_cuda(*table.where(), dtypes, *lists, KINDS[kind], workspace.data_ptr(), out.data_ptr())
    return out.cpu()


def mask_distance(bits: Tensor, newest: int) -> Tensor:
    """`bits` is contiguous."""
    out = torch.empty(len(bits), dtype=torch.int64, device=bits.device)
    rows, width = bits.shape
    place = (bits.device.index or 0, stream_of(bits.device))
    _c().mask_distance_cuda(*place, bits.data_ptr(), rows, width, newest, out.data_ptr())
    return out


def _log2(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.dtype.itemsize.bit_length() - 1 for tensor in tensors]


def _c() -> Any:
    return native.module()
