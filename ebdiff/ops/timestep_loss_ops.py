"""The operators of the timestep loss on real tensors, and on fake ones. Without gradients: see timestep_loss.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import timestep_loss_reference as reference
from .family import Family, is_transformed
from .library import define
from .timestep_loss_checks import check_dloss, check_losses, check_noised, check_terms, refuse_place
from .timestep_loss_reference import Terms

__all__ = [
    "ARGUMENTS",
    "FAMILY",
    "add_losses",
    "add_losses_op",
    "backward",
    "backward_op",
    "forward",
    "forward_fake",
    "forward_op",
    "noised",
    "noised_op",
]

FAMILY = Family("timestep_loss", reference)


def noised(x0: Tensor, noise: Tensor | None, seed: Tensor | None, table: Tensor, row: Tensor) -> Tensor:
    """As the reference's."""
    arguments = (x0, noise, seed, table, row)
    check_noised(*arguments)
    x_t: Tensor = _served("noised", x0, *arguments)
    return x_t


def forward(pred: Tensor, terms: Terms, with_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference's; an empty gradient where none is asked for, since operators return tensors."""
    check_terms(pred, terms)
    loss, per_sample, grad = _served("forward", pred, pred, terms, with_grad)
    return loss, per_sample, pred.new_empty(0) if grad is None else grad


def backward(dloss: Tensor, pred: Tensor, *arguments: Any) -> Tensor:
    """As the reference's."""
    terms = Terms(*arguments)
    check_terms(pred, terms)
    check_dloss(dloss, pred)
    grad: Tensor = _served("backward", pred, dloss, pred, terms)
    return grad


def add_losses(totals: Tensor, buckets: Tensor, cell: Tensor, per_sample: Tensor) -> None:
    """As the reference's."""
    check_losses(totals, buckets, cell, per_sample)
    _served("add_losses_", per_sample, totals, buckets, cell, per_sample)


def _served(name: str, x: Tensor, *arguments: Any) -> Any:
    try:
        return FAMILY.serve(name, x, *arguments)
    except IndexError as error:  # on the CPU; a GPU asserts
        raise refuse_place() from error


def forward_fake(pred: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, that of each sample, and the gradient."""
    check_terms(pred, Terms(*arguments[:-1]))
    loss = pred.new_empty((), dtype=torch.promote_types(pred.dtype, torch.float32))
    return loss, loss.new_empty(len(pred)), torch.empty_like(pred) if arguments[-1] else pred.new_empty(0)


def _noised_fake(x0: Tensor, *arguments: Any) -> Tensor:
    check_noised(x0, *arguments)
    return torch.empty_like(x0)


def _noised_autograd(*arguments: Any) -> Tensor:
    """For gradients the specification serves: x0 asks for one only where an encoder is trained along."""
    x_t: Tensor
    asked = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in arguments)
    if asked or is_transformed():
        check_noised(*arguments)
        FAMILY.fallbacks["gradient of x0"] += 1
        x_t = reference.noised(*arguments)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            x_t = noised_op(*arguments)
    return x_t


def _backward_fake(dloss: Tensor, pred: Tensor, *arguments: Any) -> Tensor:
    check_terms(pred, Terms(*arguments))
    check_dloss(dloss, pred)
    return torch.empty_like(pred)


ARGUMENTS = (
    "Tensor? target, Tensor? x0, Tensor? noise, Tensor? seed, Tensor? table, Tensor? row, Tensor weight, "
    "Tensor? cell, Tensor? huber_c, Tensor? mask, int prediction"
)
noised_op = define(
    "noised(Tensor x0, Tensor? noise, Tensor? seed, Tensor table, Tensor row) -> Tensor",
    noised,
    _noised_fake,
    autograd=_noised_autograd,
    anywhere=True,
)
forward_op = define(
    f"timestep_loss_forward(Tensor pred, {ARGUMENTS}, bool with_grad) -> (Tensor, Tensor, Tensor)",
    lambda pred, *arguments: forward(pred, Terms(*arguments[:-1]), arguments[-1]),
    forward_fake,
    anywhere=True,
)
backward_op = define(
    f"timestep_loss_backward(Tensor dloss, Tensor pred, {ARGUMENTS}) -> Tensor", backward, _backward_fake, anywhere=True
)
add_losses_op = define(
    "timestep_loss_statistics_(Tensor(a!) totals, Tensor buckets, Tensor cell, Tensor per_sample) -> ()",
    add_losses,
    lambda *arguments: check_losses(*arguments),
    anywhere=True,
)
