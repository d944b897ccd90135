"""Noising, and the weighted loss of a diffusion model with its gradient, each in one pass over the images.

torch.ops.ebdiff.noised and torch.ops.ebdiff.weighted_timestep_loss. Source: Ho et al. 2020, equations 4 and 14;
Salimans & Ho 2022, section 4 ("v_prediction"); Lipman et al. 2023 ("flow").
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from . import timestep_loss_ops as ops
from . import timestep_loss_reference as reference
from .dispatch import is_listened_to
from .family import is_direct, is_transformed
from .library import define
from .philox import PhiloxNoise
from .timestep_loss_checks import check_terms, constant, like_pred, place_of, positive, present, refuse_place
from .timestep_loss_reference import Terms
from .timestep_loss_statistics import LossStatistics

__all__ = ["LossStatistics", "PhiloxNoise", "Profile", "TimestepLoss", "fallbacks", "noised", "weighted_timestep_loss"]

Noise: TypeAlias = Tensor | PhiloxNoise
_Parts: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""target, x0, noise, seed, table, row."""
fallbacks = ops.FAMILY.fallbacks  # {why the reference has served instead of a kernel: how often}


class Profile(Protocol):
    """What is asked of a noise profile, such as `ebdiff.timesteps.NoiseProfile`; t is [B], on any device."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(table, row), float32 [2, K] and int64 [B]: alpha(t_b) = table[0, row_b], sigma(t_b) = table[1, row_b]."""

    def cells(self, t: Tensor) -> Tensor:
        """int64 [B]: the place of each t in tables of weights."""


class TimestepLoss(NamedTuple):
    """What `weighted_timestep_loss` returns: float32, or float64 for a prediction in float64.

    Args:
        loss: [], the mean of weight * per_sample. Gradients flow from it alone.
        per_sample: [B], without weights.
    """

    loss: Tensor
    per_sample: Tensor


def noised(
    x0: Tensor,
    t: Tensor,
    profile: Profile,
    noise: Noise | None = None,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Noise]:
    """x_t = alpha(t) x0 + sigma(t) noise, in one pass, computed in float32 at least and rounded to x0's dtype.

    Args:
        x0: [B, *], floating.
        t: [B], as the profile has them.
        noise: like x0; or a `PhiloxNoise`, drawn within the pass and never stored; None draws it as torch.randn_like.
        generator: for that draw.

    Returns:
        x_t in x0's dtype and memory format, and the noise.

    Raises:
        EbdiffError: shapes, dtypes or devices that do not fit together; on the CPU a t that the profile does not have.
    """
    if noise is None:
        noise = torch.randn_like(x0) if generator is None else torch.empty_like(x0).normal_(generator=generator)
    arguments = (x0, *_tensor_or_seed(noise), *profile.coefficients(t))
    direct = is_direct(*arguments) and not _asks_for_gradient(*arguments)
    return (ops.noised if direct else ops.noised_op)(*arguments), noise


def weighted_timestep_loss(
    pred: Tensor,
    target: Tensor | tuple[Tensor, Noise],
    t: Tensor,
    weight: Tensor,
    prediction_type: str,
    *,
    profile: Profile | None = None,
    huber_c: float | Tensor | None = None,
    mask: Tensor | None = None,
    statistics: LossStatistics | None = None,
) -> TimestepLoss:
    """mean over b of weight_b * mean over elements of (pred - target)^2, in one pass that also makes the gradient.

    Deterministic, and nothing waits for the device. The gradient of a float16 prediction is made in the backward pass:
    before the loss is scaled it would underflow.

    Args:
        pred: [B, *], floating.
        target: like pred, of any floating dtype; or (x0, noise), constants from which it is made: noise as a tensor,
            or as the `PhiloxNoise` of `noised`, which is drawn again.
        t: [B], as the profile has them. Without a profile they are places in tables of weights.
        weight: floating [B]; or, of any other length, a table with a weight for each cell of the profile. Gradients
            flow to it (Karras et al. 2024 learn it).
        prediction_type: "epsilon": noise; "v_prediction": alpha noise - sigma x0; "sample": x0; "flow": noise - x0.
        profile: for alpha and sigma, and for places in tables.
        huber_c: one number or [B], positive, a constant: 2c (sqrt(d^2 + c^2) - c) takes the place of d^2.
        mask: bool or floating, what each element counts, a constant, broadcast to pred. Where it is 0, whatever is
            there is left out; the mean is still over all elements.
        statistics: these losses are added to it.

    Raises:
        EbdiffError: shapes, dtypes or devices that do not fit together; on the CPU a t that the profile does not have.
    """
    prediction = place_of(prediction_type)
    is_table = weight.shape != t.shape
    cell = None
    if is_table or statistics is not None:
        cell = t if profile is None else profile.cells(t)
    if is_table and weight.requires_grad and weight.dim() == 1 and cell is not None:
        weight, is_table = _looked_up(weight, cell), False
    counts = (
        weight,
        cell if is_table else None,
        _huber_c(huber_c, pred),
        None if mask is None else like_pred(constant("mask", mask), pred),
    )
    terms = Terms(*_target_or_parts(target, t, profile, prediction), *counts, prediction)
    found = TimestepLoss(*_loss(pred, terms))
    if statistics is not None and cell is not None:
        statistics.add(cell, found.per_sample)
    return found


def _loss(pred: Tensor, terms: Terms) -> Sequence[Tensor]:
    found: Sequence[Tensor]
    if not is_direct(pred, *terms[:-1]):
        found = _loss_op(pred, *terms)
    elif _asks_for_gradient(pred, terms.target, terms.weight):
        found = _WeightedTimestepLoss.apply(True, pred, terms.target, terms.weight, terms)  # type: ignore[no-untyped-call]
    else:
        found = ops.forward(pred, terms, False)[:2]
    return found


def _looked_up(table: Tensor, cell: Tensor) -> Tensor:
    """How gradients of tables are added up is torch's business: deterministic for embeddings."""
    try:
        return torch.embedding(table[:, None], cell).squeeze(1)
    except IndexError as error:
        raise refuse_place() from error


def _asks_for_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and True in [tensor.requires_grad for tensor in tensors if tensor is not None]


def _tensor_or_seed(noise: Noise) -> tuple[Tensor | None, Tensor | None]:
    return (None, noise.seed) if isinstance(noise, PhiloxNoise) else (noise, None)


def _target_or_parts(target: Any, t: Tensor, profile: Profile | None, prediction: int) -> _Parts:
    if isinstance(target, Tensor):
        return target, None, None, None, None, None
    kind = reference.PREDICTIONS[prediction]
    x0, (noise, seed) = target[0], _tensor_or_seed(target[1])
    if kind == "sample":
        return x0.detach(), None, None, None, None, None
    if kind == "epsilon" and noise is not None:
        return noise.detach(), None, None, None, None, None
    table, row = present(profile).coefficients(t) if kind == "v_prediction" else (None, None)
    return None, x0.detach(), None if noise is None else noise.detach(), seed, table, row


def _huber_c(c: float | Tensor | None, pred: Tensor) -> Tensor | None:
    if c is None or isinstance(c, Tensor):
        return c if c is None else constant("huber_c", c)
    number = _number.__wrapped__ if is_listened_to() else _number  # what may not be real is not to be kept
    return number(positive(c), torch.promote_types(pred.dtype, torch.float32), pred.device)


@lru_cache(maxsize=256)
def _number(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((1,), value, dtype=dtype, device=device)


class _WeightedTimestepLoss(torch.autograd.Function):
    """Keeps the gradient, and all arguments for what it does not answer: references, not memory.

    Its arguments: whether to pass by torch's dispatcher, pred, what else may ask for a gradient, and all of the terms.
    """

    @staticmethod
    def forward(
        ctx: Any, direct: bool, pred: Tensor, target: Tensor | None, weight: Tensor, terms: Terms
    ) -> tuple[Tensor, Tensor]:
        with_grad = ctx.needs_input_grad[1] and pred.dtype != torch.float16
        found = ops.forward(pred, terms, with_grad) if direct else ops.forward_op(pred, *terms, with_grad)
        loss, per_sample, grad = found
        ctx.mark_non_differentiable(per_sample)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(per_sample, grad, *[_to_keep(tensor) for tensor in (pred, *terms[:-1])])
        ctx.prediction, ctx.with_grad, ctx.direct = terms.prediction, with_grad, direct
        return loss, per_sample

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        dloss = gradients[0]
        if dloss is None:
            return (None,) * 5
        per_sample, grad, pred, *tensors = ctx.saved_tensors
        terms, needs = Terms._make([*tensors, ctx.prediction]), ctx.needs_input_grad[1:4]
        rare = needs[1] or (needs[2] and terms.cell is not None)  # a target's gradient, or a table's
        # For these, a second derivative, or many gradients at once: differentiate the specification.
        if rare or torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(dloss):
            return (None, *_differentiable(dloss, pred, terms, needs), None)
        dpred = _gradient(dloss, grad if ctx.with_grad else None, pred, terms, ctx.direct) if needs[0] else None
        return None, dpred, None, dloss * per_sample / pred.shape[0] if needs[2] else None, None


def _to_keep(tensor: Tensor | None) -> Tensor | None:
    """Made in inference mode, as latents or what is remembered may be, a tensor is not for autograd; its copy is."""
    return tensor.clone() if tensor is not None and tensor.is_inference() else tensor


def _gradient(dloss: Tensor, grad: Tensor | None, pred: Tensor, terms: Terms, direct: bool) -> Tensor:
    direct = direct and is_direct(dloss)
    if grad is None:
        return ops.backward(dloss, pred, *terms) if direct else ops.backward_op(dloss, pred, *terms)
    if not direct or torch._C._autograd._get_current_graph_task_keep_graph():
        return grad * dloss
    scaled: Tensor = ops.FAMILY.serve("scale_", grad, grad, dloss)  # nobody asks for it again
    return scaled


def _differentiable(dloss: Tensor, pred: Tensor, terms: Terms, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    """The gradients of pred, target and weight that are needed."""
    ops.FAMILY.fallbacks["second derivative"] += 1
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, because the tensors may depend on each other: the derivative by one is not to go on through another.
        pred, weight = pred.view_as(pred), terms.weight.view_as(terms.weight)
        target = None if terms.target is None else terms.target.view_as(terms.target)
        loss, _ = reference.loss_of(pred, terms._replace(target=target, weight=weight))
    inputs = pred, target, weight
    wanted = [x for x, need in zip(inputs, needs, strict=True) if x is not None and need]
    found = iter(torch.autograd.grad(loss, wanted, dloss, create_graph=again))
    return [next(found) if need else None for need in needs]


def _loss_autograd(pred: Tensor, *arguments: Any) -> Sequence[Tensor]:
    found: Sequence[Tensor]
    terms = Terms(*arguments)
    if is_transformed():  # for derivatives of torch.func and in forward mode the specification serves
        check_terms(pred, terms)
        ops.FAMILY.fallbacks["torch.func"] += 1
        loss, per_sample = reference.loss_of(pred, terms)
        found = loss, per_sample.detach()
    else:
        found = _WeightedTimestepLoss.apply(False, pred, terms.target, terms.weight, terms)  # type: ignore[no-untyped-call]
    return found


_loss_op = define(
    f"weighted_timestep_loss(Tensor pred, {ops.ARGUMENTS}) -> (Tensor, Tensor)",
    lambda *arguments: ops.forward_op(*arguments, False)[:2],
    lambda *arguments: ops.forward_fake(*arguments, False)[:2],
    autograd=_loss_autograd,
    anywhere=True,
)
