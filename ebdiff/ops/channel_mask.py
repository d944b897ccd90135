"""Operators on channel masks over any number of tensors at once: torch.ops.ebdiff.*, and their Python front.

Each runs as one pass of the compiled part where that takes the tensors, and as the reference where it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import EbdiffError
from . import channel_mask_reference as reference
from . import native_cpu
from .adamw import masked_adamw_
from .channel_mask_checks import check_axes, check_devices, check_packed, check_small, check_sums
from .channel_mask_reference import Kind
from .library import define
from .mask_axes import Axes
from .serve import backend, is_plain, reference_of, run, written

__all__ = [
    "Axes",
    "apply_mask_",
    "channel_sums",
    "compact",
    "mask_distance",
    "masked_adamw_",
    "scatter_back",
    "zeros_like",
]


@torch.no_grad()
def apply_mask_(tensors: Sequence[Tensor], axes: Axes) -> None:
    """Zero the removed channels of any number of tensors, in place; NaN and infinity become zero too.

    Args:
        tensors: of any dtype and memory layout, on one device; no two elements may share memory.
        axes: their masks.

    Raises:
        EbdiffError: a mask that fits no tensor, tensors on several devices, sparse tensors. Nothing was changed then.
    """
    if axes.keep and is_plain(tensors, masks=axes.keep):
        _apply_mask(tensors, axes)
    elif axes.keep:
        _apply_mask_op(tensors, *axes.triples)


@torch.no_grad()
def compact(tensors: Sequence[Tensor], axes: Axes) -> list[Tensor]:
    """The kept slices of any number of tensors, each laid out in memory as its large one (channels_last stays so).

    They are views of one new arena per dtype, each at a multiple of 64 bytes: they are freed together.

    Args:
        tensors: of any dtype, on one device.
        axes: their masks.

    Raises:
        EbdiffError: as `apply_mask_`.
    """
    if not tensors:
        return []
    if is_plain(tensors, masks=axes.keep):
        return _compact(tensors, axes)[1]
    arenas = _compact_op(tensors, *axes.triples, axes.kept)
    shapes = reference.kept_shapes(tensors, axes.owner, axes.dims, axes.kept)
    return reference.views(arenas, tensors, shapes, reference.arena_plan(tensors, shapes)[1])


@torch.no_grad()
def scatter_back(
    small: Sequence[Tensor], axes: Axes, like: Sequence[Tensor], into: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """The inverse of `compact`: tensors of full size again.

    Args:
        small: as `compact` returned them.
        axes: the masks they were cut by.
        like: tensors of the full shapes, whose memory layout is taken over.
        into: tensors to write to, in place: removed positions keep their values. By default new ones full of zeros.

    Raises:
        EbdiffError: small tensors of other shapes or dtypes than the kept slices of `like`.
    """
    dense = zeros_like(like, [tensor.shape for tensor in like]) if into is None else list(into)
    if dense and is_plain(dense, small, masks=axes.keep):
        _scatter_back(dense, small, axes)
    elif dense:
        _scatter_back_op(dense, small, *axes.triples)
    return dense


def zeros_like(tensors: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Zeros of these shapes, in the dtypes and memory layouts of the tensors (of one device): views of new arenas."""
    return _in_arenas(tensors, shapes, tensors[0].new_zeros)[1] if tensors else []


@torch.no_grad()
def channel_sums(
    x: Sequence[Tensor], y: Sequence[Tensor], owner: Sequence[int], dims: Sequence[int], kind: Kind
) -> Tensor:
    """Sums of x^2, |x|, x * y or |x * y| over all of a tensor but one dimension, for many tensors in one pass.

    Args:
        x: floating tensors of one device.
        y: as `x` for the two kinds with a product, else empty.
        owner, dims: which tensor and which of its dimensions stays, for each part of the result.
        kind: "square", "absolute", "product" or "absolute product".

    Returns:
        float64 on the CPU, the parts one after another. The same for any number of threads.

    Raises:
        EbdiffError: arguments that do not fit together.
    """
    if not owner:
        return torch.zeros(0, dtype=torch.float64)
    result: Tensor = _channel_sums_op(x, y, owner, dims, kind)
    return result


def mask_distance(bits: Tensor, newest: int = -1) -> Tensor:
    """How far each of several masks is from one of them: the number of bits that differ.

    Args:
        bits: uint8 [n, bytes], packed masks, on the CPU.
        newest: the row to compare with; negative numbers count from the end.

    Returns:
        int64 [n].
    """
    result: Tensor = _mask_distance_op(bits, newest + len(bits) if newest < 0 else newest)
    return result


# What the operators do on real tensors --------------------------------------------------------------------------------


def _apply_mask_impl(
    tensors: Sequence[Tensor], keep: Sequence[Tensor], owner: Sequence[int], dims: Sequence[int]
) -> None:
    _apply_mask(tensors, Axes(tuple(keep), tuple(owner), tuple(dims)))


def _apply_mask(tensors: Sequence[Tensor], axes: Axes) -> None:
    check_axes(tensors, axes, written=True)
    run("apply_mask_", tensors[0], tensors, axes)
    written(tensors)


def _compact_impl(
    tensors: Sequence[Tensor], keep: Sequence[Tensor], owner: Sequence[int], dims: Sequence[int], kept: Sequence[int]
) -> list[Tensor]:
    axes = Axes(tuple(keep), tuple(owner), tuple(dims))
    check_axes(tensors, axes)
    if axes.kept != list(kept):
        raise EbdiffError("kept", expected="the number of True in each mask", got=str(list(kept)), remedy="count them")
    return _compact(tensors, axes)[0]


def _compact(tensors: Sequence[Tensor], axes: Axes) -> tuple[list[Tensor], list[Tensor]]:
    """The arenas, and the tensors in them."""
    check_axes(tensors, axes)
    shapes = reference.kept_shapes(tensors, axes.owner, axes.dims, axes.kept)
    arenas, small = _in_arenas(tensors, shapes, tensors[0].new_empty)
    run("compact", tensors[0], tensors, small, axes)
    return arenas, small


def _in_arenas(
    tensors: Sequence[Tensor], shapes: Sequence[Sequence[int]], new: Callable[..., Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """New arenas, and in them tensors of these shapes, in the dtypes and memory layouts of the given ones."""
    lengths, places = reference.arena_plan(tensors, shapes)
    arenas = [new(length, dtype=dtype) for dtype, length in lengths.items()]
    if not torch.compiler.is_compiling() and backend(tensors[0]) is not None:
        native_cpu.use_huge_pages(arenas)
    return arenas, reference.views(arenas, tensors, shapes, places)


def _compact_fake(
    tensors: Sequence[Tensor], keep: Sequence[Tensor], owner: Sequence[int], dims: Sequence[int], kept: Sequence[int]
) -> list[Tensor]:
    check_devices(tensors, keep=keep)
    lengths, _ = reference.arena_plan(tensors, reference.kept_shapes(tensors, owner, dims, kept))
    return [tensors[0].new_empty(length, dtype=dtype) for dtype, length in lengths.items()]


def _scatter_back_impl(
    dense: Sequence[Tensor], small: Sequence[Tensor], keep: Sequence[Tensor], owner: Sequence[int], dims: Sequence[int]
) -> None:
    _scatter_back(dense, small, Axes(tuple(keep), tuple(owner), tuple(dims)))


def _scatter_back(dense: Sequence[Tensor], small: Sequence[Tensor], axes: Axes) -> None:
    check_axes(dense, axes, written=True)
    check_small(dense, small, axes)
    laid_out = [
        part if list(part.stride()) == (strides := reference.memory_strides(large, part.shape))
        else part.new_empty_strided(part.shape, strides).copy_(part)
        for large, part in zip(dense, small, strict=True)
    ]  # fmt: skip
    run("scatter_back_", dense[0], dense, laid_out, axes)
    written(dense)


def _channel_sums_impl(
    x: Sequence[Tensor], y: Sequence[Tensor], owner: Sequence[int], dims: Sequence[int], kind: Kind
) -> Tensor:
    check_sums(x, y, owner, dims, kind)
    pairs = list(zip(x, y, strict=True)) if y else []
    y = [b if b.stride() == a.stride() else torch.empty_like(a, dtype=b.dtype).copy_(b) for a, b in pairs]
    alike = all(a.stride() == b.stride() and a.dtype == b.dtype for a, b in zip(x, y, strict=False))
    serve = run if alike else reference_of
    result: Tensor = serve("channel_sums", x[0], x, y, owner, dims, kind)
    return result


def _channel_sums_fake(
    x: Sequence[Tensor], y: Sequence[Tensor], owner: Sequence[int], dims: Sequence[int], kind: Kind
) -> Tensor:
    check_devices(x, y)
    length = sum(x[i].shape[d] for i, d in zip(owner, dims, strict=True))
    return torch.empty(length, dtype=torch.float64, device="meta" if x[0].device.type == "meta" else "cpu")


def _mask_distance_impl(bits: Tensor, newest: int) -> Tensor:
    check_packed(bits, newest)
    result: Tensor = run("mask_distance", bits, bits, newest)
    return result


_TRIPLES = "Tensor[] keep, int[] owner, int[] dims"
_apply_mask_op = define(
    f"apply_mask_(Tensor(a!)[] tensors, {_TRIPLES}) -> ()",
    _apply_mask_impl,
    lambda tensors, keep, owner, dims: check_devices(tensors, keep=keep),
)
_compact_op = define(f"compact(Tensor[] tensors, {_TRIPLES}, SymInt[] kept) -> Tensor[]", _compact_impl, _compact_fake)
_scatter_back_op = define(
    f"scatter_back_(Tensor(a!)[] dense, Tensor[] small, {_TRIPLES}) -> ()",
    _scatter_back_impl,
    lambda dense, small, keep, owner, dims: check_devices(dense, small, keep=keep),
)
_channel_sums_op = define(
    "channel_sums(Tensor[] x, Tensor[] y, int[] owner, int[] dims, str kind) -> Tensor",
    _channel_sums_impl,
    _channel_sums_fake,
)
_mask_distance_op = define(
    "mask_distance(Tensor bits, int newest) -> Tensor",
    _mask_distance_impl,
    lambda bits, newest: bits.new_empty(bits.shape[0], dtype=torch.int64),
)
