"""What `noised` and `weighted_timestep_loss` compute, in plain torch: the specification, and what serves otherwise."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .philox import PhiloxNoise

__all__ = ["PREDICTIONS", "Terms", "add_losses_", "backward", "forward", "loss_of", "noised", "scale_", "target_of"]

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")


class Terms(NamedTuple):
    """All arguments of `weighted_timestep_loss` but the prediction. Arguments have been checked.

    Args:
        target: [B, *], or None: then it is made from x0 and noise.
        x0: [B, *].
        noise: [B, *], or None: then it is made from the seed.
        seed: int64 [2], of `PhiloxNoise`.
        table: float32 [2, K], alpha and sigma.
        row: int64 [B], the place of each sample's alpha and sigma in the table. Both only for "v_prediction".
        weight: [B]; with `cell` a table of any length.
        cell: int64 [B], the place of each sample's weight in that table, or None.
        huber_c: [B] or [1], positive, or None for squared errors.
        mask: [B, *], what each element counts; where it is 0, whatever is there is left out. None for 1.
        prediction: what is predicted, a place in `PREDICTIONS`.
    """

    target: Tensor | None
    x0: Tensor | None
    noise: Tensor | None
    seed: Tensor | None
    table: Tensor | None
    row: Tensor | None
    weight: Tensor
    cell: Tensor | None
    huber_c: Tensor | None
    mask: Tensor | None
    prediction: int


def noised(x0: Tensor, noise: Tensor | None, seed: Tensor | None, table: Tensor, row: Tensor) -> Tensor:
    """alpha x0 + sigma noise, laid out as x0 and rounded once, to its dtype. One of noise and seed is there."""
    wide = _wide(x0)
    alpha, sigma = _coefficients(table, row, wide)
    x_t = alpha * wide + sigma * _noise(x0, noise, seed)
    return torch.empty_like(x0).copy_(x_t) if not x_t.requires_grad else x_t.to(x0.dtype)


def forward(pred: Tensor, terms: Terms, with_grad: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss, []; the loss of each sample, [B]; both float32 at least; and the gradient of the loss by pred.

    The gradient is laid out as pred and rounded once, to its dtype; None where it is not asked for.
    """
    loss, per_sample = loss_of(pred, terms)
    return loss, per_sample, backward(torch.ones_like(loss), pred, terms) if with_grad else None


def backward(dloss: Tensor, pred: Tensor, terms: Terms) -> Tensor:
    """The gradient of pred, for dloss, [], that of the loss, in the loss's dtype.

    By d = pred - target, an element's is dloss * weight / (B * N) * mask * 2 d, N the elements of a sample; with
    Huber's c, divided by sqrt(1 + (d / c)^2).
    """
    d = _difference(pred, terms)
    slope = 2 * d if terms.huber_c is None else 2 * (d / _root(d, terms.huber_c))
    factor = dloss * _weight(terms, d) / max(d.numel(), 1)
    return torch.empty_like(pred).copy_(_counted(slope, terms) * _per_sample(factor, d))


def scale_(grad: Tensor, dloss: Tensor) -> Tensor:
    """grad * dloss, in place: what a gradient of `forward` is once that of the loss, [], is known."""
    return grad.mul_(dloss)


def add_losses_(totals: Tensor, buckets: Tensor, cell: Tensor, per_sample: Tensor) -> Tensor:
    """Add the losses, their squares and their number to their buckets' places in `totals`, [3, K].

    Args:
        totals: float64 or float32.
        buckets: int64 [T], the bucket of each cell.
        cell: int64 [B].
        per_sample: [B].
    """
    mine = buckets[cell] == torch.arange(totals.shape[1], device=totals.device)[:, None]
    losses = per_sample.to(totals.dtype)
    powers = torch.stack([losses, losses.square(), torch.ones_like(losses)])
    # Without index_add, whose order of additions is left to chance on a GPU.
    return totals.add_(torch.where(mine, powers[:, None], 0).sum(2))


def loss_of(pred: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """The loss and that of each sample, differentiable to any order.

    A sample's is the mean over its elements of mask * d^2, or of mask * 2c (sqrt(d^2 + c^2) - c), which is computed as
    2 d^2 / (1 + sqrt(1 + (d / c)^2)): so a large c is the square to the last digit. The loss is the mean of
    weight * per_sample.
    """
    d = _difference(pred, terms)
    error = d.square() if terms.huber_c is None else 2 * (d / (1 + _root(d, terms.huber_c))) * d
    per_sample = _counted(error, terms).flatten(1).mean(1)
    return (_weight(terms, d) * per_sample).mean(), per_sample


def target_of(pred: Tensor, terms: Terms) -> Tensor:
    """What pred should be, in float32 at least, rounded to x0's dtype nowhere.

    The noise; alpha noise - sigma x0; x0; or noise - x0.
    """
    wide = torch.promote_types(pred.dtype, torch.float32)
    if terms.target is not None:
        return terms.target.to(wide)
    assert terms.x0 is not None
    kind, x0 = PREDICTIONS[terms.prediction], terms.x0.to(wide)
    if kind == "sample":
        return x0
    noise = _noise(terms.x0, terms.noise, terms.seed).to(wide)
    if kind == "epsilon":
        return noise
    if kind == "flow":
        return noise - x0
    assert terms.table is not None
    assert terms.row is not None
    alpha, sigma = _coefficients(terms.table, terms.row, x0)
    return alpha * noise - sigma * x0


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _noise(x0: Tensor, noise: Tensor | None, seed: Tensor | None) -> Tensor:
    if noise is not None:
        return _wide(noise)
    assert seed is not None
    return PhiloxNoise(seed).tensor_like(x0)


def _coefficients(table: Tensor, row: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    alpha, sigma = table.to(x.dtype).index_select(1, row).unbind()
    return _per_sample(alpha, x), _per_sample(sigma, x)


def _root(d: Tensor, huber_c: Tensor) -> Tensor:
    """sqrt(1 + (d / c)^2), also where that square is more than the dtype holds."""
    return torch.hypot(d / _per_sample(huber_c, d), d.new_ones(()))


def _per_sample(value: Tensor, x: Tensor) -> Tensor:
    """[B] or [1] -> [B or 1, 1...], in x's dtype."""
    return value.to(x.dtype)[(..., *[None] * (x.dim() - 1))]


def _weight(terms: Terms, x: Tensor) -> Tensor:
    weight = terms.weight if terms.cell is None else terms.weight.index_select(0, terms.cell)
    return weight.to(x.dtype)


def _difference(pred: Tensor, terms: Terms) -> Tensor:
    d = _wide(pred) - target_of(pred, terms)
    return d if terms.mask is None else torch.where(terms.mask != 0, d, 0)


def _counted(value: Tensor, terms: Terms) -> Tensor:
    return value if terms.mask is None else value * terms.mask.to(value.dtype)
