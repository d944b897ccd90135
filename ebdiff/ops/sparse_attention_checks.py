"""What the operators of sparse attention refuse. Kernels take raw addresses, so nothing may pass unchecked."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import EbdiffError
from .sparse_attention_reference import Pattern

__all__ = ["WIDEST", "check_attention", "check_gradient"]

WIDEST = 256  # of head_dim
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_attention(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> None:
    """Refuse arguments that do not belong together."""
    if q.dim() != 4 or q.dtype not in _FLOATS or not 1 <= q.shape[-1] <= WIDEST or q.shape[1] < 1:
        _refuse("q", f"floating [B, H, Sq, D], D at most {WIDEST}", _said(q))
    b, heads, _, width = q.shape
    if k.dim() != 4 or k.shape[0] != b or k.shape[-1] != width or k.shape[1] < 1 or heads % k.shape[1]:
        _refuse("k", f"[{b}, a divisor of {heads} heads, Sk, {width}]", _said(k))
    if v.dim() != 4 or v.shape[:3] != k.shape[:3] or not 1 <= v.shape[-1] <= WIDEST:
        _refuse("v", f"{list(k.shape[:3])} and a head_dim of at most {WIDEST}", _said(v))
    for name, tensor in {"k": k, "v": v}.items():
        if tensor.dtype != q.dtype or tensor.device != q.device:
            _refuse(name, f"{q.dtype} on {q.device}, as q", f"{tensor.dtype} on {tensor.device}")
    _check_pattern(q, k, pattern)


def _check_pattern(q: Tensor, k: Tensor, pattern: Pattern) -> None:
    (b, heads, q_len, _), k_len, block = q.shape, k.shape[2], pattern.block
    kept, rows, columns = pattern.kept, -(-q_len // block), -(-k_len // block)
    if kept.dim() != 4 or kept.shape[0] not in (1, b) or kept.shape[1:] != (heads, rows, columns):
        expected = f"bool [1 or {b}, {heads}, {rows}, {columns}] for {q_len} queries and {k_len} keys"
        _refuse("block mask", expected, _said(kept))
    sizes = {"row_start": kept.shape[0] * heads * rows + 1, "column_start": kept.shape[0] * heads * columns + 1}
    for name, tensor in pattern._asdict().items():
        if name == "block":
            continue
        if tensor.device != q.device:
            _refuse(f"block mask, {name}", f"on {q.device}, as q", str(tensor.device))
        if tensor.dtype != (torch.bool if name == "kept" else torch.int32) or not tensor.is_contiguous():
            _refuse(f"block mask, {name}", "what a BlockMask has made", _said(tensor))
        if name in sizes and tensor.shape != (sizes[name],):
            _refuse(f"block mask, {name}", f"[{sizes[name]}]", _said(tensor))


def check_gradient(do: Tensor, o: Tensor, log_sum: Tensor, q: Tensor, v: Tensor) -> None:
    """Refuse gradients and results that are not of these tensors."""
    shape = (*q.shape[:3], v.shape[-1])
    for name, tensor in {"do": do, "o": o}.items():
        if tensor.shape != shape or tensor.dtype != q.dtype or tensor.device != q.device:
            _refuse(name, f"{q.dtype} {list(shape)} on {q.device}", f"{_said(tensor)} on {tensor.device}")
    dtype = torch.promote_types(q.dtype, torch.float32)
    if log_sum.shape != shape[:3] or log_sum.dtype != dtype or log_sum.device != q.device:
        _refuse("log_sum", f"{dtype} {list(shape[:3])} on {q.device}", _said(log_sum))


def _said(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _refuse(what: str, expected: str, got: str) -> None:
    raise EbdiffError(f"sparse_attention: {what}", expected=expected, got=got, remedy="see ebdiff.ops.sparse_attention")
