"""The compiled part on the CPU. Arguments have been checked; what it does not take raises `NotTaken`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import native
from .channel_mask_checks import SharedMemory, refuse_freed
from .channel_mask_reference import Kind

__all__ = [
    "NotTaken",
    "apply_mask_",
    "channel_sums",
    "compact",
    "layout_of",
    "mask_distance",
    "masked_adamw_",
    "scatter_back_",
    "use_huge_pages",
]

FLOATS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
KINDS: dict[str, int] = {"square": 0, "absolute": 1, "product": 2, "absolute product": 3}
NUMBERS = ("one_minus_beta1", "beta2", "one_minus_beta2", "decay", "inverse_bias2", "eps", "step_size", "one_minus_ema")
_LOG2 = {1: 0, 2: 1, 4: 2, 8: 3, 16: 4}
_MOST_DIMS = 8
_LOWEST = 1 << 32  # below, an address is an offset into memory that is gone, or an empty tensor's


class NotTaken(Exception):
    """The reference has to do this one."""


def layout_of(
    tensors: Sequence[Tensor],
    keep: Sequence[Tensor],
    owner: Sequence[int],
    dims: Sequence[int],
    *,
    indexed: bool = False,
    written: bool = True,
) -> Any:
    """`_C.Layout` of these tensors and masks.

    Raises:
        NotTaken: more than 8 dimensions, a masked axis of 2^31 positions or more, lazily negated memory, or (where the
            tensors are written to) elements that share memory.
    """
    if any(t.dim() > _MOST_DIMS or t.is_neg() or t.is_conj() for t in tensors):
        raise NotTaken
    try:
        layout = _c().Layout(
            [t.shape for t in tensors],
            [t.stride() for t in tensors],
            owner,
            dims,
            [k.data_ptr() for k in keep],
            indexed,
        )
    except ValueError as error:  # std::length_error
        raise NotTaken from error
    if written and layout.any_overlaps():
        raise NotTaken
    return layout


def apply_mask_(tensors: Sequence[Tensor], keep: Sequence[Tensor], owner: Sequence[int], dims: Sequence[int]) -> None:
    """Zero the removed channels. Of tensors that share memory one thread could write back what another has zeroed."""
    layout = layout_of(tensors, keep, owner, dims)
    at, log2 = addresses(tensors), _log2(tensors)
    if _c().shares_memory(layout, log2, [at], []):
        raise NotTaken
    _c().apply_mask(layout, at, log2, torch.get_num_threads())


def use_huge_pages(arenas: Sequence[Tensor]) -> None:
    """Make the first touch of new arenas cheaper; those of other devices are left alone."""
    for arena in arenas:
        if arena.device.type == "cpu":
            _c().use_huge_pages(arena.data_ptr(), arena.nbytes)


def compact(
    tensors: Sequence[Tensor],
    small: Sequence[Tensor],
    keep: Sequence[Tensor],
    owner: Sequence[int],
    dims: Sequence[int],
) -> None:
    """Fill `small`, views of arenas, and the gaps behind them up to the next multiple of 64 bytes."""
    layout = layout_of(tensors, keep, owner, dims, indexed=True, written=False)
    _c().compact(layout, addresses(tensors), addresses(small), _log2(tensors), torch.get_num_threads())


def scatter_back_(
    dense: Sequence[Tensor], small: Sequence[Tensor], keep: Sequence[Tensor], owner: Sequence[int], dims: Sequence[int]
) -> None:
    """`small` is dense in memory, in the order of its large tensor."""
    layout = layout_of(dense, keep, owner, dims, indexed=True)
    _c().scatter_back(layout, addresses(dense), addresses(small), _log2(dense), torch.get_num_threads())


def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    ema: Sequence[Tensor],
    keep: Sequence[Tensor],
    owner: Sequence[int],
    dims: Sequence[int],
    numbers: Mapping[str, float],
    maximize: bool,
) -> None:
    """All tensors of a parameter have its dtype and its strides."""
    layout = layout_of(params, keep, owner, dims)
    places: dict[torch.dtype, list[int]] = {}
    for i, parameter in enumerate(params):
        places.setdefault(parameter.dtype, []).append(i)
    if len(places) > 1 or not places.keys() <= FLOATS.keys():
        raise NotTaken
    (dtype,) = places
    lists = [addresses(tensors) for tensors in (params, grads, exp_avg, exp_avg_sq, ema)]
    refuse_shared(layout, dtype, [lists[0], *lists[2:]], lists[1])
    _c().masked_adamw(
        layout,
        FLOATS[dtype],
        *lists,
        [numbers[name] for name in NUMBERS],
        maximize,
        torch.get_num_threads(),
    )


def refuse_shared(layout: Any, dtype: torch.dtype, written: Sequence[list[int]], read: list[int]) -> None:
    """Refuse tensors whose memory is written to and lies within another's; lists of addresses.

    Raises:
        EbdiffError: there are such.
    """
    if _c().shares_memory(layout, [_LOG2[dtype.itemsize]] * len(layout), written, read):
        raise SharedMemory()


def channel_sums(
    x: Sequence[Tensor], y: Sequence[Tensor], owner: Sequence[int], dims: Sequence[int], kind: Kind
) -> Tensor:
    """y is laid out as x and has its dtypes."""
    if any(tensor.dtype not in FLOATS for tensor in x):
        raise NotTaken
    layout = layout_of(x, (), owner, dims, written=False)
    out = torch.empty(sum(x[i].shape[d] for i, d in zip(owner, dims, strict=True)), dtype=torch.float64)
    dtypes = [FLOATS[tensor.dtype] for tensor in x]
    threads = torch.get_num_threads()
    _c().channel_sums(layout, dtypes, addresses(x), addresses(y), KINDS[kind], out.data_ptr(), threads)
    return out


def mask_distance(bits: Tensor, newest: int) -> Tensor:
    """`bits` is contiguous."""
    out = torch.empty(len(bits), dtype=torch.int64)
    rows, width = bits.shape
    _c().mask_distance(bits.data_ptr(), rows, width, newest, out.data_ptr(), torch.get_num_threads())
    return out


def _c() -> Any:
    return native.module()


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    """Of the first element of each.

    Raises:
        EbdiffError: memory that was freed behind a tensor's back (``untyped_storage().resize_(0)``).
    """
    found = [tensor.data_ptr() for tensor in tensors]
    if found and min(found) < _LOWEST:
        refuse_freed(tensors)
    return found


def _log2(tensors: Sequence[Tensor]) -> list[int]:
    try:
        return [_LOG2[tensor.dtype.itemsize] for tensor in tensors]
    except KeyError:
        raise NotTaken from None
