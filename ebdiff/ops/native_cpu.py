"""The compiled part on the CPU. Arguments have been checked; what it does not take raises `NotTaken`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import native
from .channel_mask_checks import SharedMemory, refuse_freed
from .channel_mask_reference import Kind, Lists
from .mask_axes import Axes

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


class NotTaken(Exception):
    """The reference has to do this one."""


def layout_of(tensors: Sequence[Tensor], axes: Axes, *, indexed: bool = False, written: bool = True) -> Any:
    """`_C.Layout` of these tensors and masks, which the masks remember for the next call.

    Args:
        indexed: it is to list the kept positions too. Such a one is large and is not remembered.
        written: the tensors are written to.

    Raises:
        NotTaken: more than 8 dimensions, a masked axis of 2^31 positions or more, lazily negated memory, or (where the
            tensors are written to) elements that share memory.
    """
    if is_lazy(tensors):
        raise NotTaken
    places = [tensor.shape for tensor in tensors], list(map(Tensor.stride, tensors))
    layout = None if indexed else axes.known("layout", places)
    if layout is None:
        at = [keep.data_ptr() for keep in axes.keep]
        if any(tensor.dim() > _MOST_DIMS for tensor in tensors):
            raise NotTaken
        try:
            layout = _c().Layout(*places, axes.owner, axes.dims, at, indexed)
        except ValueError as error:  # std::length_error
            raise NotTaken from error
        if not indexed:
            axes.remember("layout", places, layout)
    if written and layout.any_overlaps():
        raise NotTaken
    return layout


def is_lazy(tensors: Sequence[Tensor]) -> bool:
    """Does the memory of one of them hold the negative or the conjugate of its values?"""
    return True in map(Tensor.is_neg, tensors) or True in map(Tensor.is_conj, tensors)


def apply_mask_(tensors: Sequence[Tensor], axes: Axes) -> None:
    """Zero the removed channels. Of tensors that share memory one thread could write back what another has zeroed."""
    layout = layout_of(tensors, axes)
    at, log2 = addresses(tensors), _log2(tensors)
    if _c().shares_memory(layout, log2, [at], []):
        raise NotTaken
    _c().apply_mask(layout, at, log2, torch.get_num_threads())


def use_huge_pages(arenas: Sequence[Tensor]) -> None:
    """Make the first touch of new arenas cheaper; those of other devices are left alone."""
    for arena in arenas:
        if arena.device.type == "cpu":
            _c().use_huge_pages(arena.data_ptr(), arena.nbytes)


def compact(tensors: Sequence[Tensor], small: Sequence[Tensor], axes: Axes) -> None:
    """Fill `small`, views of arenas, and the gaps behind them up to the next multiple of 64 bytes."""
    layout = layout_of(tensors, axes, indexed=True, written=False)
    _c().compact(layout, addresses(tensors), addresses(small), _log2(tensors), torch.get_num_threads())


def scatter_back_(dense: Sequence[Tensor], small: Sequence[Tensor], axes: Axes) -> None:
    """`small` is dense in memory, in the order of its large tensor."""
    layout = layout_of(dense, axes, indexed=True)
    _c().scatter_back(layout, addresses(dense), addresses(small), _log2(dense), torch.get_num_threads())


def masked_adamw_(lists: Lists, axes: Axes, numbers: Mapping[str, float], maximize: bool) -> None:
    """All tensors of a parameter have its dtype and its strides."""
    layout, dtype = layout_of(lists.params, axes), float_of(lists.params)
    at = addresses_apart(lists, layout)
    by_value = [numbers[name] for name in NUMBERS]
    _c().masked_adamw(layout, dtype, *at, by_value, maximize, torch.get_num_threads())


def float_of(tensors: Sequence[Tensor]) -> int:
    """The number of the floating dtype that all of them have.

    Raises:
        NotTaken: they have several, or another one.
    """
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1 or not dtypes <= FLOATS.keys():
        raise NotTaken
    return FLOATS[dtypes.pop()]


def addresses_apart(lists: Lists, layout: Any) -> list[list[int]]:
    """The addresses of all tensors of AdamW; those of one place have the same dtype and lie alike.

    Raises:
        EbdiffError: memory that is written to lies within another tensor's, or was freed.
    """
    params, grads, *others = at = [addresses(tensors) for tensors in lists]
    if _c().shares_memory(layout, _log2(lists.params), [params, *others], grads):
        raise SharedMemory()
    return at


def channel_sums(
    x: Sequence[Tensor], y: Sequence[Tensor], owner: Sequence[int], dims: Sequence[int], kind: Kind
) -> Tensor:
    """y is laid out as x and has its dtypes."""
    if any(tensor.dtype not in FLOATS for tensor in x):
        raise NotTaken
    layout = layout_of(x, Axes(owner=tuple(owner), dims=tuple(dims)), written=False)
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
    return refuse_freed(tensors)


def addresses_or_0(tensors: Sequence[Tensor | None]) -> list[int]:
    """As `addresses`, 0 for None."""
    at = iter(addresses([tensor for tensor in tensors if tensor is not None]))
    return [0 if tensor is None else next(at) for tensor in tensors]


def _log2(tensors: Sequence[Tensor]) -> list[int]:
    try:
        return [_LOG2[tensor.dtype.itemsize] for tensor in tensors]
    except KeyError:
        raise NotTaken from None
