"""The compiled part's noising and timestep loss on the CPU. Arguments have been checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import native
from .native_cpu import FLOATS, NotTaken, addresses, addresses_or_0
from .philox import place_of_sample
from .timestep_loss_reference import Terms

__all__ = ["add_losses_", "backward", "forward", "noised", "scale_"]


def noised(x0: Tensor, noise: Tensor | None, seed: Tensor | None, table: Tensor, row: Tensor) -> Tensor:
    """As the reference's."""
    dtypes, order, x_t = _dtypes(x0, noise), _order(x0), torch.empty_like(x0)
    to = _room(x_t, order)
    images = _flat(x0, order), _flat(noise, order)
    at = addresses_or_0((*images, *map(_dense, (seed, table, row)), to))
    _c().noised([*_sizes(x0), table.shape[1]], dtypes, at, torch.get_num_threads())
    return _delivered(to, x_t, order)


def forward(pred: Tensor, terms: Terms, with_grad: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """As the reference's."""
    loss = pred.new_empty((), dtype=torch.float32)
    per_sample = pred.new_empty(pred.shape[0], dtype=torch.float32)
    return loss, per_sample, _run(pred, terms, 1.0, (loss, per_sample), with_grad)


def backward(dloss: Tensor, pred: Tensor, terms: Terms) -> Tensor:
    """As the reference's."""
    grad = _run(pred, terms, dloss.item(), (None, None), True)
    assert grad is not None
    return grad


def scale_(grad: Tensor, dloss: Tensor) -> Tensor:
    """As the reference's."""
    return grad if dloss.item() == 1 else grad.mul_(dloss)


def add_losses_(totals: Tensor, buckets: Tensor, cell: Tensor, per_sample: Tensor) -> Tensor:
    """As the reference's."""
    if not totals.is_contiguous() or per_sample.dtype != torch.float32:
        raise NotTaken("losses that are not float32, or totals with gaps")
    tensors = [totals, *(tensor.contiguous() for tensor in (buckets, cell, per_sample))]
    sizes = [totals.shape[1], len(buckets), len(per_sample)]
    _c().add_losses(totals.dtype == torch.float64, sizes, addresses(tensors))
    return totals


def _run(
    pred: Tensor, terms: Terms, dloss: float, results: tuple[Tensor | None, Tensor | None], with_grad: bool
) -> Tensor | None:
    target, x0, noise, seed, table, row, weight, cell, huber_c, mask, prediction = terms
    dtypes = _dtypes(pred, target, x0, noise)
    # Noise from a seed is numbered in the order of x0's memory.
    order = _order(pred if seed is None or x0 is None else x0)
    grad = torch.empty_like(pred) if with_grad else None
    to = None if grad is None else _room(grad, order)
    images = [_flat(image, order) for image in (pred, target, x0, noise)]
    counts = _dense(_float(weight)), _dense(cell), _dense(_float(huber_c)), _flat(_float(mask), order)
    at = addresses_or_0((*images, _dense(seed), _dense(table), _dense(row), *counts, *results, to))
    sizes = [*_sizes(pred), 0 if table is None else table.shape[1], weight.shape[0]]
    one_c = huber_c is not None and huber_c.shape[0] == 1
    _c().timestep_loss(sizes, dtypes, at[:11], prediction, one_c, dloss, at[11:], torch.get_num_threads())
    return None if grad is None or to is None else _delivered(to, grad, order)


def _order(like: Tensor) -> list[int] | None:
    """The dimensions, outermost first, as samples lie in memory or would without gaps; None where nothing changes."""
    if like.is_contiguous():
        return None
    place = place_of_sample(like)
    return [0, *sorted(range(1, like.dim()), key=lambda i: -place[i - 1])]


def _flat(x: Tensor | None, order: list[int] | None) -> Tensor | None:
    """Without gaps, in this order."""
    return x if x is None else x.contiguous() if order is None else x.permute(order).contiguous()


def _room(like: Tensor, order: list[int] | None) -> Tensor:
    """To be written to in this order: this tensor, where its memory is."""
    ordered = like if order is None else like.permute(order)
    return ordered if ordered.is_contiguous() else torch.empty_like(ordered, memory_format=torch.contiguous_format)


def _delivered(written: Tensor, to: Tensor, order: list[int] | None) -> Tensor:
    if written is not to and written.data_ptr() != to.data_ptr():
        (to if order is None else to.permute(order)).copy_(written)
    return to


def _dense(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.contiguous()


def _float(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.dtype == torch.float32 else x.to(torch.float32)


def _sizes(x: Tensor) -> tuple[int, int]:
    samples = x.shape[0]
    return samples, x.numel() // samples


def _dtypes(*images: Tensor | None) -> list[int]:
    """Their numbers, 0 for None.

    Raises:
        NotTaken: float64, which the reference serves.
    """
    found = [0 if image is None else FLOATS[image.dtype] for image in images]
    if FLOATS[torch.float64] in found:
        raise NotTaken("float64")
    return found


def _c() -> Any:
    return native.module()
