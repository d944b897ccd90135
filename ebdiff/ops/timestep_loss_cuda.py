"""Noise added and the timestep loss on a GPU, by the Triton kernels. Arguments have been checked.

Never run on a GPU so far: the kernels are tested interpreted, and compiled without a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .native_cpu import NotTaken, is_lazy
from .philox import place_of_sample
from .timestep_loss_reference import PREDICTIONS, Terms

__all__ = ["add_losses_", "backward", "forward", "noised", "scale_"]

_MOST = (1 << 31) - (1 << 15)  # elements of a sample: places within it are 32 bits, with the last program's surplus


def noised(x0: Tensor, noise: Tensor | None, seed: Tensor | None, table: Tensor, row: Tensor) -> Tensor:
    """As `timestep_loss_reference.noised`.

    Raises:
        NotTaken: float64, lazily negated memory, samples of 2^31 elements.
    """
    _check([x0, noise], [seed, table, row])
    x_t, places = torch.empty_like(x0), _places(x0)
    out = x_t if _lies(x_t, places) else _room(x_t, places)
    with torch.cuda.device_of(x0):
        _triton().noised(_laid(x0, places), _laid(noise, places), *map(_dense, (seed, table, row)), out)
    return x_t if out is x_t else x_t.copy_(out)


def forward(pred: Tensor, terms: Terms, with_grad: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `timestep_loss_reference.forward`.

    Raises:
        NotTaken: as for `noised`.
    """
    per_sample = pred.new_empty(len(pred), dtype=torch.float32)
    loss = pred.new_empty((), dtype=torch.float32)
    grad = _launch("forward", pred, terms, with_grad, per_sample, loss)
    return loss, per_sample, grad


def backward(dloss: Tensor, pred: Tensor, terms: Terms) -> Tensor:
    """As `timestep_loss_reference.backward`.

    Raises:
        NotTaken: as for `noised`.
    """
    grad = _launch("backward", pred, terms, True, dloss)
    assert grad is not None
    return grad


def scale_(grad: Tensor, dloss: Tensor) -> Tensor:
    """As `timestep_loss_reference.scale_`.

    Raises:
        NotTaken: as for `noised`, and gaps between elements.
    """
    _check([grad], [dloss])
    if not _lies(grad, _places(grad)):
        raise NotTaken("gaps between elements")
    with torch.cuda.device_of(grad):
        _triton().scale_(grad, dloss)
    return grad


def add_losses_(totals: Tensor, buckets: Tensor, cell: Tensor, per_sample: Tensor) -> Tensor:
    """As `timestep_loss_reference.add_losses_`; totals may be float64.

    Raises:
        NotTaken: totals that are not contiguous.
    """
    if not totals.is_contiguous():
        raise NotTaken("gaps between elements")
    with torch.cuda.device_of(totals):
        _triton().add_losses_(totals, *map(_dense, (buckets, cell, per_sample)))
    return totals


def _triton() -> Any:
    return import_module("..kernels.timestep_loss", __package__)


def _launch(what: str, pred: Tensor, terms: Terms, with_grad: bool, *others: Tensor) -> Tensor | None:
    """The gradient, where it is asked for. Images that do not lie as the first of them are copied."""
    needed = _needed(terms)
    _check([pred, needed.target, needed.x0, needed.noise], needed[:-1])
    # Noise from a seed is numbered in the order of x0's memory.
    places = _places(pred if needed.seed is None or terms.x0 is None else terms.x0)
    tensors: dict[str, Any] = needed._asdict()
    for name in ("target", "x0", "noise", "mask"):
        tensors[name] = _laid(tensors[name], places)
    for name in ("seed", "table", "row", "weight", "cell", "huber_c"):
        tensors[name] = _dense(tensors[name])
    grad = torch.empty_like(pred) if with_grad else None
    out = grad if grad is None or _lies(grad, places) else _room(grad, places)
    with torch.cuda.device_of(pred):
        getattr(_triton(), what)(_laid(pred, places), Terms(**tensors), out, *others)
    return grad if grad is None or out is None or out is grad else grad.copy_(out)


def _needed(terms: Terms) -> Terms:
    """Without what the target is not made of."""
    kind = PREDICTIONS[terms.prediction]
    if terms.target is not None:
        return terms._replace(x0=None, noise=None, seed=None, table=None, row=None)
    if kind == "epsilon":
        return terms._replace(x0=None, table=None, row=None)
    if kind == "sample":
        return terms._replace(noise=None, seed=None, table=None, row=None)
    return terms if kind == "v_prediction" else terms._replace(table=None, row=None)


def _check(images: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> None:
    found = [tensor for tensor in images if tensor is not None]
    if any(tensor.dtype == torch.float64 for tensor in found):
        raise NotTaken("float64 on a GPU")
    if is_lazy([*found, *(tensor for tensor in others if tensor is not None)]):
        raise NotTaken("lazily negated memory")
    if found[0].shape[1:].numel() >= _MOST:
        raise NotTaken("samples of 2^31 elements")


# Where elements lie: one sample after another, without gaps -----------------------------------------------------------


def _places(x: Tensor) -> Sequence[int]:
    """Such strides, in the order of x's memory."""
    return x.stride() if x.is_contiguous() else (x.shape[1:].numel(), *place_of_sample(x))


def _lies(x: Tensor, places: Sequence[int]) -> bool:
    return all(size == 1 or a == b for size, a, b in zip(x.shape, x.stride(), places, strict=True))


def _dense(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.contiguous()


def _room(x: Tensor, places: Sequence[int]) -> Tensor:
    return torch.empty_strided(x.shape, places, dtype=x.dtype, device=x.device)


def _laid(x: Tensor | None, places: Sequence[int]) -> Tensor | None:
    """x, copied where it lies otherwise."""
    return x if x is None or _lies(x, places) else _room(x, places).copy_(x)
