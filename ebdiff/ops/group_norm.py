"""Group normalisation, with what networks do before and after it, in one pass: torch.ops.ebdiff.group_norm_silu.

Groups may be of any size and channels masked out; a time embedding is added before, scale, shift and SiLU come after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import group_norm_reference as reference
from .family import Family, is_direct, is_transformed
from .group_norm_checks import check_gradient, check_norm, offsets_of
from .group_norm_reference import Norm
from .library import define

__all__ = ["fallbacks", "group_norm_silu"]

FAMILY = Family("group_norm", reference)
fallbacks = FAMILY.fallbacks  # {why the reference has served instead of a kernel: how often}


def group_norm_silu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int | Sequence[int],
    *,
    keep: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    time_bias: Tensor | None = None,
    eps: float = 1e-5,
    silu: bool = True,
) -> Tensor:
    """silu(((x + time_bias - mean) / sqrt(variance + eps) * weight + bias) * (1 + scale) + shift), in one pass.

    Mean and variance are taken over the kept channels of each group and all positions, in two steps (centred) and in
    float32 at least. What autograd keeps is x and two numbers for each group. Deterministic.

    Args:
        x: [N, C, *], 2 to 5 dimensions, floating, in any memory format.
        weight, bias: [C], or None for 1 and 0. These and all others are floating; kernels take x's dtype and float32.
        groups: their number, which divides C; or where each begins, from 0, and C: [G + 1], for groups of any size.
        keep: bool [C] on x's device, True = KEPT. Removed channels are left out of the statistics and become zero,
            whatever they hold: the norm of the smaller network.
        scale, shift: [N, C], as of adaptive group normalisation.
        time_bias: [N, C], added to x.
        eps: added to the variance.
        silu: without it, only the normalisation.

    Returns:
        [N, C, *] in x's dtype and memory format. Under autocast as torch's group_norm: float32 on CUDA.

    Raises:
        EbdiffError: shapes, dtypes or devices that do not fit together.

    Source: Wu & He 2018 (group normalisation); Dhariwal & Nichol 2021 (scale and shift).
    """
    tensors = (x, weight, bias, scale, shift, time_bias, keep)
    arguments = (*tensors, offsets_of(groups, x), eps, silu)
    result: Tensor
    if not is_direct(*tensors) or torch.is_autocast_enabled(x.device.type):
        result = _op(*arguments)
    elif torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        result = _GroupNormSiLU.apply(_forward_impl, *arguments)  # type: ignore[no-untyped-call]
    else:
        result = _forward_impl(*arguments)[0]
    return result


class _GroupNormSiLU(torch.autograd.Function):
    """Keeps x and the statistics; computes everything else again."""

    @staticmethod
    def forward(ctx: Any, forward: Callable[..., tuple[Tensor, ...]], x: Tensor, *arguments: Any) -> Tensor:
        y, mean, rstd = forward(x, *arguments)
        ctx.save_for_backward(x, mean, rstd, *arguments[:6])
        ctx.rest = arguments[6:]
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (dy,) = gradients
        x, mean, rstd, *tensors = ctx.saved_tensors
        norm = _norm((*tensors, *ctx.rest))
        needs = ctx.needs_input_grad[1:7]
        # For a second derivative, or many gradients at once: differentiate the specification.
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(dy):
            return None, *_differentiable(dy, x, norm, needs), None, None, None, None
        backward = _backward_impl if is_direct(dy, x, *tensors) else _backward_op
        found = iter(backward(dy, x, mean, rstd, *norm, needs))
        return None, *(next(found) if need else None for need in needs), None, None, None, None


def _differentiable(dy: Tensor, x: Tensor, norm: Norm, needs: Sequence[bool]) -> reference.Gradients:
    fallbacks["second derivative"] += 1
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, because the tensors may depend on each other: the derivative by one is not to go on through another.
        x = x.view_as(x)
        given = [None if tensor is None else tensor.view_as(tensor) for tensor in norm.tensors]
        y = reference.group_norm_silu(x, _norm((*given, norm.keep, norm.offsets, norm.eps, norm.silu)))
    inputs = [tensor for tensor, need in zip((x, *given), needs, strict=True) if need and tensor is not None]
    found = iter(torch.autograd.grad(y, inputs, dy, create_graph=again))
    return tuple(next(found) if need else None for need in needs)


# What the operators do on real tensors --------------------------------------------------------------------------------


def _forward_impl(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    norm = _norm(arguments)
    check_norm(x, norm)
    result: tuple[Tensor, Tensor, Tensor] = FAMILY.serve("forward", x, x, norm)
    return result


def _backward_impl(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, *arguments: Any) -> list[Tensor]:
    """Only the gradients that are needed."""
    norm, needs = _norm(arguments), arguments[9]
    check_norm(x, norm)
    check_gradient(dy, x, mean, rstd, norm)
    found = FAMILY.serve("backward", x, dy, x, mean, rstd, norm, needs)
    return [gradient for gradient in found if gradient is not None]


def _norm(arguments: Sequence[Any]) -> Norm:
    weight, bias, scale, shift, time_bias, keep, offsets, eps, silu = arguments[:9]
    return Norm(weight, bias, scale, shift, time_bias, keep, tuple(offsets), eps, silu)


def _forward_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    norm = _norm(arguments)
    check_norm(x, norm)
    shape, dtype = (x.shape[0], len(norm.offsets) - 1), torch.promote_types(x.dtype, torch.float32)
    return torch.empty_like(x), x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def _backward_fake(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, *arguments: Any) -> list[Tensor]:
    check_gradient(dy, x, mean, rstd, _norm(arguments))
    tensors, needs = (x, *arguments[:5]), arguments[9]
    return [
        torch.empty_like(tensor) for tensor, need in zip(tensors, needs, strict=True) if need and tensor is not None
    ]


def _autograd(x: Tensor, *arguments: Any) -> Tensor:
    """For torch.func's and forward-mode derivatives the specification serves: they go through no kernel.

    Plain torch.vmap calls the operator in a loop.
    """
    if is_transformed():
        norm = _norm(arguments)
        check_norm(x, norm)
        fallbacks["torch.func"] += 1
        return reference.group_norm_silu(x, norm)
    result: Tensor = _GroupNormSiLU.apply(_forward_op, x, *arguments)  # type: ignore[no-untyped-call]
    return result


def _autocast(x: Tensor, *arguments: Any) -> Tensor:
    """As torch's group_norm, which computes and returns float32 under autocast on CUDA."""
    with torch.autocast(x.device.type, enabled=False):
        result: Tensor = _op(*map(_widened, (x, *arguments)))
    return result


def _widened(argument: Any) -> Any:
    is_narrow = isinstance(argument, Tensor) and argument.dtype in (torch.float16, torch.bfloat16)
    return argument.float() if is_narrow else argument


_ARGUMENTS = (
    "Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? time_bias, Tensor? keep, "
    "int[] offsets, float eps, bool silu"
)
_forward_op = define(
    f"group_norm_silu_forward(Tensor x, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _forward_impl,
    _forward_fake,
    anywhere=True,
)
_backward_op = define(
    f"group_norm_silu_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, {_ARGUMENTS}, bool[] needs) -> Tensor[]",
    _backward_impl,
    _backward_fake,
    anywhere=True,
)
_op = define(
    f"group_norm_silu(Tensor x, {_ARGUMENTS}) -> Tensor",
    lambda *arguments: _forward_op(*arguments)[0],
    lambda x, *arguments: _forward_fake(x, *arguments)[0],
    autograd=_autograd,
    autocast={"CUDA": _autocast},
    anywhere=True,
)
