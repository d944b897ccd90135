"""Attention over some blocks of queries and keys, forward and backward: torch.ops.ebdiff.sparse_attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import sparse_attention_reference as reference
from .block_mask import BlockMask
from .family import Family, is_transformed
from .library import define
from .sparse_attention_checks import check_attention, check_gradient
from .sparse_attention_reference import Pattern

__all__ = ["fallbacks", "sparse_attention"]

FAMILY = Family("sparse_attention", reference, compiled=False)
fallbacks = FAMILY.fallbacks  # {why the reference has served instead of a kernel: how often}


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, scale: float | None = None) -> Tensor:
    """softmax(scale q k') v over the blocks that the mask keeps; what it does not keep is neither read nor computed.

    Scores are not stored: autograd keeps q, k, v, the result and one number of each query. Deterministic. A query
    without a kept block gets zeros, and zero gradients.

    In 16 bits the kernels of a head_dim above 128 take more than 100 KB of shared memory. On GPUs that have less (many
    a consumer's has 99), and for float64, the reference serves, which computes all blocks: `fallbacks` counts it.

    Args:
        q: [B, H, Sq, D], floating, D at most 256, of any strides.
        k: [B, Hkv, Sk, D]; Hkv divides H, and each of its heads serves H / Hkv heads of q in a row.
        v: [B, Hkv, Sk, Dv].
        block_mask: of H heads, Sq queries and Sk keys, for every sample or for all. It is moved to q's device.
        scale: 1 / sqrt(D) where None.

    Returns:
        [B, H, Sq, Dv] in q's dtype, in memory as [B, Sq, H, Dv]. Under autocast as scaled_dot_product_attention.

    Raises:
        EbdiffError: shapes, dtypes or devices that do not fit together.

    Source: Dao et al. 2022 (FlashAttention), section 3.3 (block-sparse).
    """
    mask = block_mask if block_mask.kept.device == q.device else block_mask.to(q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    result: Tensor = _op(q, k, v, mask.kept, *mask.rows, *mask.columns, mask.block, scale)
    return result


class _SparseAttention(torch.autograd.Function):
    """Keeps its arguments, the result and the normaliser of each query; computes the scores again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
        o, log_sum = _forward_op(q, k, v, *arguments)
        ctx.save_for_backward(q, k, v, o, log_sum, *arguments[:5])
        ctx.rest = arguments[5:]
        result: Tensor = o
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (do,) = gradients
        q, k, v, o, log_sum, *pattern = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        # For a second derivative, or many gradients at once: differentiate the specification.
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(do):
            return *_differentiable(do, q, k, v, (*pattern, *ctx.rest), needs), *[None] * 7
        found = iter(_backward_op(do, q, k, v, o, log_sum, *pattern, *ctx.rest, needs))
        return *(next(found) if need else None for need in needs), *[None] * 7


def _differentiable(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, arguments: Sequence[Any], needs: Sequence[bool]
) -> reference.Gradients:
    fallbacks["second derivative"] += 1
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, because the tensors may depend on each other: the derivative by one is not to go on through another.
        q, k, v = (tensor.view_as(tensor) for tensor in (q, k, v))
        o = reference.sparse_attention(q, k, v, *_pattern(arguments))
    wanted = [tensor for tensor, need in zip((q, k, v), needs, strict=True) if need]
    found = iter(torch.autograd.grad(o, wanted, do, create_graph=again))
    return tuple(next(found) if need else None for need in needs)


# What the operators do on real tensors --------------------------------------------------------------------------------


def _forward_impl(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    pattern, scale = _pattern(arguments)
    check_attention(q, k, v, pattern)
    result: tuple[Tensor, Tensor] = FAMILY.serve("forward", q, q, k, v, pattern, scale)
    return result


def _backward_impl(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, log_sum: Tensor, *arguments: Any
) -> list[Tensor]:
    """Only the gradients that are needed."""
    pattern, scale = _pattern(arguments)
    check_attention(q, k, v, pattern)
    check_gradient(do, o, log_sum, q, v)
    found = FAMILY.serve("backward", q, do, q, k, v, o, log_sum, pattern, scale, arguments[7])
    return [gradient for gradient in found if gradient is not None]


def _pattern(arguments: Sequence[Any]) -> tuple[Pattern, float]:
    return Pattern(*arguments[:6]), arguments[6]


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    check_attention(q, k, v, _pattern(arguments)[0])
    return reference.result_like(q, v), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


def _backward_fake(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, log_sum: Tensor, *arguments: Any
) -> list[Tensor]:
    check_gradient(do, o, log_sum, q, v)
    return [torch.empty_like(tensor) for tensor, need in zip((q, k, v), arguments[7], strict=True) if need]


def _autograd(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    """For torch.func's and forward-mode derivatives the specification serves: they go through no kernel.

    Plain torch.vmap calls the operator in a loop.
    """
    if is_transformed():
        pattern, scale = _pattern(arguments)
        check_attention(q, k, v, pattern)
        fallbacks["torch.func"] += 1
        return reference.sparse_attention(q, k, v, pattern, scale)
    result: Tensor = _SparseAttention.apply(q, k, v, *arguments)  # type: ignore[no-untyped-call]
    return result


def _autocast(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    """As torch's attention, which computes and returns what autocast asks for."""
    dtype = torch.get_autocast_dtype(q.device.type)
    with torch.autocast(q.device.type, enabled=False):
        result: Tensor = _op(*(t if t.dtype == torch.float64 else t.to(dtype) for t in (q, k, v)), *arguments)
    return result


_ARGUMENTS = (
    "Tensor kept, Tensor row_start, Tensor row_at, Tensor column_start, Tensor column_at, int block, float scale"
)
_forward_op = define(
    f"sparse_attention_forward(Tensor q, Tensor k, Tensor v, {_ARGUMENTS}) -> (Tensor, Tensor)",
    _forward_impl,
    _forward_fake,
    anywhere=True,
)
_backward_op = define(
    "sparse_attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor log_sum, "
    f"{_ARGUMENTS}, bool[] needs) -> Tensor[]",
    _backward_impl,
    _backward_fake,
    anywhere=True,
)
_op = define(
    f"sparse_attention(Tensor q, Tensor k, Tensor v, {_ARGUMENTS}) -> Tensor",
    lambda *arguments: _forward_op(*arguments)[0],
    lambda *arguments: _forward_fake(*arguments)[0],
    autograd=_autograd,
    autocast={"CPU": _autocast, "CUDA": _autocast},
    anywhere=True,
)
