"""What the operators on channel masks refuse. The compiled part takes raw addresses, so nothing may pass unchecked."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from ..errors import EbdiffError
from .channel_mask_reference import Kind, Lists, kept_shapes
from .mask_axes import Axes

__all__ = [
    "SharedMemory",
    "check_adamw",
    "check_axes",
    "check_devices",
    "check_packed",
    "check_small",
    "check_sums",
    "refuse_freed",
    "refuse_shared",
]

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_LOWEST = 1 << 32
_HOW = "see the docstrings of ebdiff.ops.channel_mask"


def check_axes(tensors: Sequence[Tensor], axes: Axes, *, written: bool = False) -> None:
    """Refuse masks that fit no tensor, and tensors that no kernel takes."""
    _refuse_if(not tensors, "tensors", "at least one", "none")
    _check_plain(tensors, tensors[0].device)
    if written:
        _refuse_if(_any_repeats(tensors), "tensors", "no two elements in the same place", "an expanded tensor")
    shapes = [tensor.shape for tensor in tensors]
    if axes.known("fits", shapes):
        return
    lengths = set(map(len, axes.triples))
    _refuse_if(len(lengths) > 1, "masks", "keep, owner and dims of one length", str(lengths))
    _check_places(tensors, axes.owner, axes.dims)
    for kept, i, dim in zip(*axes.triples, strict=True):
        size = (shapes[i][dim],)
        if kept.dtype != torch.bool or kept.shape != size or kept.device.type != "cpu" or not kept.is_contiguous():
            got = f"{kept.dtype} {list(kept.shape)} on {kept.device}"
            _refuse(f"the mask of tensor {i}, dimension {dim}", f"contiguous bool {list(size)} on the CPU", got)
    axes.remember("fits", shapes, True)


def _check_plain(tensors: Sequence[Tensor], device: torch.device) -> None:
    alike = {t.device for t in tensors} <= {device} and {t.layout for t in tensors} <= {torch.strided}
    if alike and True not in (t.is_quantized for t in tensors):
        return
    i = next(i for i, t in enumerate(tensors) if t.device != device or t.layout is not torch.strided or t.is_quantized)
    got = f"number {i} on {tensors[i].device}, {tensors[i].layout}, {tensors[i].dtype}"
    _refuse("tensors", f"strided tensors on one device ({device})", got)


def check_devices(*lists: Sequence[Tensor], keep: Sequence[Tensor] = ()) -> None:
    """What the fake implementations refuse: torch calls them for any list that holds a tensor on "meta".

    Real tensors beside it would be left as they are without a word, and results would be memory nobody has written.
    """
    tensors = [tensor for tensors in lists for tensor in tensors]
    if tensors:
        _check_plain(tensors, tensors[0].device)
        unreal = tensors[0].device.type != "meta" and any(kept.device.type == "meta" for kept in keep)
        _refuse_if(unreal, "masks", "the CPU", "meta")


def _any_repeats(tensors: Sequence[Tensor]) -> bool:
    """Does one of them hold an element twice, as expanded ones do?"""
    if 0 not in chain.from_iterable(map(Tensor.stride, tensors)):
        return False
    return any(torch._debug_has_internal_overlap(tensor) == 1 for tensor in tensors)


def _check_places(tensors: Sequence[Tensor], owner: Sequence[int], dims: Sequence[int]) -> None:
    for i, dim in zip(owner, dims, strict=True):
        if not 0 <= i < len(tensors) or not 0 <= dim < tensors[i].dim():
            _refuse("masks", f"a dimension of one of {len(tensors)} tensors", f"tensor {i}, dimension {dim}")
    places = list(zip(owner, dims, strict=True))
    _refuse_if(len(set(places)) < len(places), "masks", "one for each dimension", "two for the same")


def check_small(dense: Sequence[Tensor], small: Sequence[Tensor], axes: Axes) -> None:
    """Refuse small tensors that are not what `compact` makes of the dense ones."""
    _refuse_if(len(dense) != len(small), "small tensors", f"{len(dense)} of them", str(len(small)))
    _check_plain(small, dense[0].device)
    shapes = kept_shapes(dense, axes.owner, axes.dims, axes.kept)
    for i, (large, part, shape) in enumerate(zip(dense, small, shapes, strict=True)):
        if list(part.shape) != shape or part.dtype != large.dtype:
            _refuse(f"small tensor {i}", f"{large.dtype} {shape}", f"{part.dtype} {list(part.shape)}")
    refuse_shared(dense, read=small)


def check_adamw(lists: Lists, step: int, betas: tuple[float, float]) -> None:
    """Refuse lists that do not belong together."""
    _refuse_if(step < 1, "step", "at least 1", str(step))
    _refuse_if(not all(0 <= beta < 1 for beta in betas), "betas", "two numbers in [0, 1)", str(betas))
    params = lists.params
    shapes = [p.shape for p in params]
    dtypes = [p.dtype for p in params]
    for name, tensors in lists._asdict().items():
        if name == "params" or (name == "ema" and not tensors):
            continue
        _refuse_if(len(tensors) != len(params), name, f"{len(params)} tensors", str(len(tensors)))
        _check_plain(tensors, params[0].device)
        repeats = name != "grads" and _any_repeats(tensors)
        _refuse_if(repeats, name, "no two elements in the same place", "an expanded tensor")
        if [t.shape for t in tensors] != shapes or [t.dtype for t in tensors] != dtypes:
            pairs = enumerate(zip(params, tensors, strict=True))
            i, p, t = next((i, p, t) for i, (p, t) in pairs if (p.shape, p.dtype) != (t.shape, t.dtype))
            _refuse(f"{name}[{i}]", f"{p.dtype} {list(p.shape)}, as its parameter", f"{t.dtype} {list(t.shape)}")
    other = next((dtype for dtype in dtypes if dtype not in _FLOATS), None)
    _refuse_if(other is not None, "parameters", ", ".join(map(str, _FLOATS)), str(other))


def check_sums(x: Sequence[Tensor], y: Sequence[Tensor], owner: Sequence[int], dims: Sequence[int], kind: Kind) -> None:
    """Refuse what cannot be summed."""
    kinds = Kind.__args__  # type: ignore[attr-defined]
    _refuse_if(kind not in kinds, "kind", " or ".join(kinds), repr(kind))
    _refuse_if(len(owner) != len(dims), "owner and dims", "one length", f"{len(owner)} and {len(dims)}")
    _refuse_if(not x, "tensors", "at least one", "none")
    _check_plain(x, x[0].device)
    _check_places(x, owner, dims)
    _refuse_if(not all(t.dtype.is_floating_point for t in [*x, *y]), "tensors", "floating dtypes", "others")
    if "product" not in kind:
        _refuse_if(len(y) > 0, "y", f'nothing, for kind="{kind}"', f"{len(y)} tensors")
        return
    _refuse_if(len(y) != len(x), "y", f"{len(x)} tensors", str(len(y)))
    _check_plain(y, x[0].device)
    other = next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a.shape != b.shape), None)
    if other is not None:
        _refuse(f"y[{other}]", f"{list(x[other].shape)}", f"{list(y[other].shape)}")


def check_packed(bits: Tensor, newest: int) -> None:
    """Refuse what is no table of packed masks."""
    if bits.dtype != torch.uint8 or bits.dim() != 2 or not bits.is_contiguous():
        _refuse("packed masks", "contiguous uint8 [n, bytes]", f"{bits.dtype} {list(bits.shape)}")
    _refuse_if(not 0 <= newest < len(bits), "newest", f"a row of {len(bits)}", str(newest))


class SharedMemory(EbdiffError):
    """Tensors whose memory is written to and lies within the reach of another's."""

    def __init__(self) -> None:
        super().__init__("tensors", expected="memory of their own", got="tensors that share some", remedy=_HOW)


def refuse_shared(written: Sequence[Tensor], read: Sequence[Tensor] = ()) -> None:
    """Refuse tensors whose memory is written to and lies within the reach of another's.

    Tensors that interleave without sharing an element count as sharing: nothing in training is laid out so.

    Raises:
        SharedMemory: there are such.
    """
    spans = [(*_span(tensor), True) for tensor in written if tensor.numel()]
    spans += [(*_span(tensor), False) for tensor in read if tensor.numel()]
    spans.sort()
    written_to = read_to = 0
    for start, end, is_written in spans:
        if start < written_to or (is_written and start < read_to):
            raise SharedMemory()
        written_to, read_to = (max(written_to, end), read_to) if is_written else (written_to, max(read_to, end))


def refuse_freed(tensors: Sequence[Tensor]) -> list[int]:
    """Their addresses; refuse tensors that reach past the end of their storage: ``untyped_storage().resize_(0)``.

    Addresses tell: below `_LOWEST` they are offsets into memory that is gone, or empty tensors'.
    """
    at = list(map(Tensor.data_ptr, tensors))
    if not at or min(at) >= _LOWEST:
        return at
    for i, tensor in enumerate(tensors):
        start = tensor.data_ptr() - tensor.storage_offset() * tensor.itemsize
        reach = _span(tensor)[1] - start
        if tensor.numel() and reach > tensor.untyped_storage().nbytes():
            _refuse(f"tensor {i}", f"{reach} bytes of storage", f"{tensor.untyped_storage().nbytes()}: freed?")
    return at


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first byte, and the one after the last."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.numel() * tensor.itemsize
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (reach + 1) * tensor.itemsize


def _refuse_if(wrong: bool, problem: str, expected: str, got: str) -> None:
    if wrong:
        _refuse(problem, expected, got)


def _refuse(problem: str, expected: str, got: str) -> None:
    raise EbdiffError(problem, expected=expected, got=got, remedy=_HOW)
