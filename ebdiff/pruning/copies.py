"""What shrinking begins with: the mask, checked, and copies of a model that hold other values."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from ..errors import EbdiffError
from .mask import ChannelMask
from .modules import refuse_wrapped

if TYPE_CHECKING:
    from ..tickets.ticket import Ticket

__all__ = ["checked", "copied", "like", "named_tensors", "values_of"]

Module = TypeVar("Module", bound=nn.Module)


def checked(model: nn.Module, ticket: Ticket | ChannelMask) -> ChannelMask:
    """The mask to shrink a model by.

    Raises:
        EbdiffError: there is none, the model is wrapped, or it is not the traced one.
    """
    mask = ticket if isinstance(ticket, ChannelMask) else getattr(ticket, "mask", None)
    if not isinstance(mask, ChannelMask):
        raise EbdiffError(
            "nothing to shrink by",
            expected="a ChannelMask or a Ticket",
            got=f"{type(ticket).__name__}",
            remedy="draw one; an EarlyBird's ticket is None until it has settled",
        )
    refuse_wrapped(model)
    mask.plan.check(model)
    return mask


def named_tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Every parameter and buffer, tied ones once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def copied(model: Module, memo: dict[int, Any]) -> Module:
    """A deep copy; weights that a hook (torch.nn.utils.weight_norm) derives anew are copied without their graph."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def values_of(named: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """The same without their graph."""
    return [(name, tensor.detach()) for name, tensor in named]


def like(tensor: Tensor, values: Tensor, gradient: Tensor | None) -> Tensor:
    """A new parameter or buffer, as `tensor` is."""
    if isinstance(tensor, nn.Parameter):
        values = nn.Parameter(values, requires_grad=tensor.requires_grad)
        values.grad = gradient
    return values
