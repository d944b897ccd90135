"""The compiled part's noising and timestep loss on the CPU. Arguments have been checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import native
from .native_cpu import FLOATS, NotTaken, addresses
from .philox import place_of_sample
from .timestep_loss_reference import Terms

__all__ = ["add_losses_", "backward", "forward", "noised", "scale_"]


def noised(x0: Tensor, noise: Tensor | None, seed: Tensor | None, table: Tensor, row: Tensor) -> Tensor:
    """As the reference's."""
    refuse_wide(x0, noise)
    x_t, order = torch.empty_like(x0), _order(x0)
    to = _room(x_t, order)
    tensors = [_flat(x0, order), _flat(noise, order), *map(_dense, (seed, table, row)), to]
    _c().noised([*_sizes(x0), table.shape[1]], _dtypes(x0, noise), _optional(tensors), torch.get_num_threads())
    return _delivered(to, x_t, order)


def forward(pred: Tensor, terms: Terms, with_grad: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """As the reference's."""
    loss, per_sample = (pred.new_empty(shape, dtype=torch.float32) for shape in ((), pred.shape[0]))
    return loss, per_sample, _run(pred, terms, 1.0, [loss, per_sample], with_grad)


def backward(dloss: Tensor, pred: Tensor, terms: Terms) -> Tensor:
    """As the reference's."""
    grad = _run(pred, terms, float(dloss), [None, None], True)
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


def _run(pred: Tensor, terms: Terms, dloss: float, results: Sequence[Tensor | None], with_grad: bool) -> Tensor | None:
    images = (pred, terms.target, terms.x0, terms.noise)
    refuse_wide(*images)
    order = _order(pred if terms.seed is None or terms.x0 is None else terms.x0)
    grad = torch.empty_like(pred) if with_grad else None
    to = None if grad is None else _room(grad, order)
    numbers = [_dense(n) for n in (terms.seed, terms.table, terms.row)]
    weight, huber_c, mask = (n if n is None else n.to(torch.float32) for n in (terms.weight, terms.huber_c, terms.mask))
    numbers += [_dense(weight), _dense(terms.cell), _dense(huber_c), _flat(mask, order)]
    tensors = [*(_flat(image, order) for image in images), *numbers]
    columns = 0 if terms.table is None else terms.table.shape[1]
    _c().timestep_loss(
        [*_sizes(pred), columns, len(terms.weight)],
        _dtypes(*images),
        _optional(tensors),
        terms.prediction,
        huber_c is not None and len(huber_c) == 1,
        dloss,
        _optional([*results, to]),
        torch.get_num_threads(),
    )
    return None if grad is None or to is None else _delivered(to, grad, order)


def refuse_wide(*tensors: Tensor | None) -> None:
    """Refuse float64, which the reference serves."""
    if any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors):
        raise NotTaken("float64")


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
    if written.data_ptr() != to.data_ptr():
        (to if order is None else to.permute(order)).copy_(written)
    return to


def _dense(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.contiguous()


def _sizes(x: Tensor) -> list[int]:
    samples = x.shape[0]
    return [samples, x.numel() // samples]


def _dtypes(*images: Tensor | None) -> list[int]:
    return [0 if image is None else FLOATS[image.dtype] for image in images]


def _optional(tensors: Sequence[Tensor | None]) -> list[int]:
    """Addresses, 0 for None."""
    found = iter(addresses([tensor for tensor in tensors if tensor is not None]))
    return [0 if tensor is None else next(found) for tensor in tensors]


def _c() -> Any:
    return native.module()
