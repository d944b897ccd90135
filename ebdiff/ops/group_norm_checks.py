"""What the group normalisation operators refuse. Kernels take raw addresses, so nothing may pass unchecked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from operator import index

import torch
from torch import Tensor

from ..errors import EbdiffError
from .group_norm_reference import Norm

__all__ = ["check_gradient", "check_norm", "offsets_of"]

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_HOW = "see ebdiff.ops.group_norm_silu"


def offsets_of(groups: int | Sequence[int], x: Tensor) -> list[int]:
    """Where the groups begin, and C."""
    channels = x.shape[1] if x.dim() > 1 else 0
    try:
        if isinstance(groups, Iterable):
            return [index(start) for start in groups]
        count = index(groups)
    except TypeError:
        count = 0
    if count < 1 or channels % count:
        _refuse("groups", f"a divisor of {channels} channels, or where each begins", str(groups))
    return [i * channels // count for i in range(count + 1)]


def check_norm(x: Tensor, norm: Norm) -> None:
    """Refuse arguments that do not belong together."""
    if x.dtype not in _FLOATS or not 2 <= x.dim() <= 5 or x.layout is not torch.strided:
        _refuse("x", "[N, C, *] with 2 to 5 dimensions, floating, strided", f"{x.dtype} {list(x.shape)}, {x.layout}")
    n, c = x.shape[:2]
    offsets = norm.offsets
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != c or any(a > b for a, b in pairwise(offsets)):
        _refuse("groups", f"where each begins, rising from 0 to {c}", str(list(offsets)))
    if not norm.eps >= 0:
        _refuse("eps", "a number of at least 0", str(norm.eps))
    for name, shape in {"weight": (c,), "bias": (c,), "scale": (n, c), "shift": (n, c), "time_bias": (n, c)}.items():
        tensor = getattr(norm, name)
        if tensor is not None and not (tensor.shape == shape and tensor.is_floating_point()):
            _refuse(name, f"floating {list(shape)}", f"{tensor.dtype} {list(tensor.shape)}")
    if norm.keep is not None and not (norm.keep.shape == (c,) and norm.keep.dtype == torch.bool):
        _refuse("keep", f"bool {[c]}", f"{norm.keep.dtype} {list(norm.keep.shape)}")
    for name, tensor in zip(Norm._fields, norm[:6], strict=False):
        if tensor is not None and tensor.device != x.device:
            _refuse(name, f"on {x.device}, as x", str(tensor.device))


def check_gradient(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, norm: Norm) -> None:
    """Refuse gradients and statistics that are not of this x."""
    if dy.shape != x.shape or dy.dtype != x.dtype or dy.device != x.device:
        _refuse("dy", f"{x.dtype} {list(x.shape)} on {x.device}", f"{dy.dtype} {list(dy.shape)} on {dy.device}")
    shape, dtype = (x.shape[0], len(norm.offsets) - 1), torch.promote_types(x.dtype, torch.float32)
    for name, tensor in {"mean": mean, "rstd": rstd}.items():
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != x.device:
            _refuse(name, f"{dtype} {list(shape)} on {x.device}", f"{tensor.dtype} {list(tensor.shape)}")


def _refuse(what: str, expected: str, got: str) -> None:
    raise EbdiffError(f"group_norm_silu: {what}", expected=expected, got=got, remedy=_HOW)
