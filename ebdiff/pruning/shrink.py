"""The smaller network, its optimizer and its EMA; and the dense stand-in that must compute the same.

The law: ``shrink(model, mask)(x) == masked(model, mask)(x)``, and the same for gradients, to the error of the dtype.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import EbdiffError
from ..nn.group_norm import MaskedGroupNorm
from .mask import ChannelMask
from .modules import adapt, refuse_wrapped, replace

if TYPE_CHECKING:
    from ..tickets.ticket import Ticket

__all__ = ["masked", "shrink", "shrink_", "shrinks_of"]

Module = TypeVar("Module", bound=nn.Module)
_RECORD = "_ebdiff_shrinks"


def shrink(model: Module, ticket: Ticket | ChannelMask) -> Module:
    """A new, smaller network without the removed channels.

    Parameters, buffers and `.grad` are sliced; `requires_grad`, dtype, device, memory format and train mode carry over.
    `model` is left alone. A diffusers model becomes an ``ebdiff.Shrunk<Class>``, which is still an instance of its own
    class and has save_pretrained and from_pretrained.

    Args:
        model: the model that was traced (not wrapped by DDP, FSDP or torch.compile).
        ticket: a mask or a ticket drawn from its plan.

    Raises:
        EbdiffError: the ticket belongs to another architecture, or the model is wrapped.
    """
    mask = _mask_of(ticket)
    refuse_wrapped(model)
    mask.plan.check(model)
    memo: dict[int, Any] = {}
    for name, tensor in _tensors(model):
        memo[id(tensor)] = _sliced_like(tensor, mask.plan.kept(mask.keep, name))
    small = copy.deepcopy(model, memo)
    _finish(small, mask)
    return small


def shrink_(
    model: nn.Module,
    ticket: Ticket | ChannelMask,
    *,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    ema: Any = None,
) -> None:
    """Shrink a model in place, its training state included: the training loop just goes on.

    Every parameter stays the same object with fewer elements, so optimizers, schedulers and lists that hold it stay
    right. `.grad`, every optimizer state of a parameter's shape (Adam's moments) and the EMA are sliced by the same
    indices; step counts and parameter groups stay.

    Args:
        model: the model that was traced.
        ticket: a mask or a ticket drawn from its plan.
        optimizer: the optimizer (or several) that holds its parameters; torch's or wrapped by accelerate.
        ema: a copy of the model, something that holds one as `.module` or `.ema_model`, diffusers' EMAModel (anything
            with `shadow_params`), a list of tensors in the order of ``model.parameters()``, or a dict by name.

    Raises:
        EbdiffError: the ticket, the optimizer or the EMA does not belong to this model. Nothing was changed then.
    """
    mask = _mask_of(ticket)
    refuse_wrapped(model)
    mask.plan.check(model)
    kept = {name: mask.plan.kept(mask.keep, name) for name, _ in _tensors(model)}
    optimizers = [] if optimizer is None else [optimizer] if not isinstance(optimizer, Sequence) else list(optimizer)
    changes = [*_optimizer_changes(model, optimizers, kept), *_ema_changes(model, ema, mask, kept)]
    for name, tensor in list(_tensors(model)):
        _resize_(tensor, kept[name])
    for change in changes:
        change()
    _finish(model, mask)


def masked(model: Module, mask: Ticket | ChannelMask) -> Module:
    """The dense stand-in: a copy of full size in which the removed channels are zero and take no part in statistics.

    It computes what `shrink` computes; gradients of removed channels are zero. For comparisons and tests: it saves
    nothing.

    Raises:
        EbdiffError: as `shrink`.
    """
    mask = _mask_of(mask)
    refuse_wrapped(model)
    mask.plan.check(model)
    dense = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in _tensors(dense):
            kept = mask.plan.kept(mask.keep, name)
            _zero_removed(tensor, kept)
            if tensor.requires_grad and kept:
                tensor.register_hook(partial(_without_removed, kept=kept))
    for norm in mask.plan.norms:
        if mask.regroups(norm):
            replace(dense, norm.module, MaskedGroupNorm(dense.get_submodule(norm.module), mask.groups_of(norm)))
    return dense


def _zero_removed(tensor: Tensor, kept: Mapping[int, Tensor]) -> None:
    for dim, alive in kept.items():
        tensor.index_fill_(dim, (~alive).nonzero()[:, 0].to(tensor.device), 0)


def _without_removed(gradient: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    gradient = gradient.clone()
    _zero_removed(gradient, kept)
    return gradient


def shrinks_of(model: nn.Module) -> list[ChannelMask]:
    """The masks a model was shrunken by, first to last; empty for a dense one."""
    return list(vars(model).get(_RECORD, ()))


def _mask_of(ticket: Ticket | ChannelMask) -> ChannelMask:
    mask = ticket if isinstance(ticket, ChannelMask) else getattr(ticket, "mask", None)
    if not isinstance(mask, ChannelMask):
        raise EbdiffError(
            "nothing to shrink by",
            expected="a ChannelMask or a Ticket",
            got=f"{type(ticket).__name__}",
            remedy="draw one; an EarlyBird's ticket is None until it has settled",
        )
    return mask


def _tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _finish(model: nn.Module, mask: ChannelMask) -> None:
    adapt(model, mask)
    vars(model)[_RECORD] = [*shrinks_of(model), mask]
    if hasattr(type(model), "load_config"):  # a diffusers model
        from .save import shrunk_class

        kind: Any = type(model)
        model.__class__ = shrunk_class(kind)


# Slicing --------------------------------------------------------------------------------------------------------------


def _sliced(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """The kept positions of a tensor, in its memory format; always a new tensor."""
    channels_last = tensor.dim() == 4 and not tensor.is_contiguous()
    channels_last &= tensor.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    result = tensor.detach()
    indices = {dim: alive.nonzero()[:, 0].to(tensor.device) for dim, alive in kept.items() if not bool(alive.all())}
    if {0, 1} <= indices.keys():  # both in one pass: five times as fast as one after the other
        result = result[indices.pop(0)[:, None], indices.pop(1)]
    for dim, index in indices.items():
        result = result.index_select(dim, index)
    if result.data_ptr() == tensor.data_ptr():
        return result.clone(memory_format=layout)
    return result.contiguous(memory_format=layout)


def _sliced_like(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    result = _sliced(tensor, kept)
    if isinstance(tensor, nn.Parameter):
        result = nn.Parameter(result, requires_grad=tensor.requires_grad)
        if tensor.grad is not None:
            result.grad = _sliced(tensor.grad, kept)
    return result


def _resize_(tensor: Tensor, kept: Mapping[int, Tensor]) -> None:
    """Slice a tensor in place, its identity and `.grad` included."""
    new = _sliced(tensor, kept)
    gradient = None if tensor.grad is None else _sliced(tensor.grad, kept)
    tensor.grad = None
    # A change of dtype makes autograd forget a gradient accumulator of the old shape, which a graph that is still
    # alive (the user's last `loss`) would otherwise hand to the next backward pass.
    tensor.data = torch.empty(
        0, dtype=torch.float16 if new.dtype != torch.float16 else torch.float32, device=new.device
    )
    tensor.data = new
    tensor.grad = gradient


# Training state -------------------------------------------------------------------------------------------------------

Change = Callable[[], None]
Kept = Mapping[str, Mapping[int, Tensor]]


@dataclass(frozen=True)
class _Set:
    """Put the kept part of a tensor back where it came from."""

    holder: Any
    key: Any
    kept: Mapping[int, Tensor]

    def __call__(self) -> None:
        self.holder[self.key] = _sliced(self.holder[self.key], self.kept)


def _optimizer_changes(model: nn.Module, optimizers: list[Any], kept: Kept) -> list[Change]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    changes: list[Change] = []
    for optimizer in optimizers:
        if not hasattr(optimizer, "param_groups"):
            got = type(optimizer).__name__
            raise EbdiffError(
                "optimizer", expected="one of torch's, or a list", got=got, remedy="pass the optimizer itself"
            )
        held = {names.get(id(p)) for group in optimizer.param_groups for p in group["params"]}
        if not held & trained:
            raise EbdiffError(
                "the optimizer does not hold the model's parameters",
                expected=f"some of the model's {len(trained)} trainable parameters",
                got=f"{sum(len(group['params']) for group in optimizer.param_groups)} other ones",
                remedy="pass the optimizer that trains this model",
            )
        for parameter, state in optimizer.state.items():
            name = names.get(id(parameter))
            for key, value in state.items() if name is not None else ():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    changes.append(_Set(state, key, kept[str(name)]))
                elif _holds_elements(value):
                    raise EbdiffError(
                        f"cannot shrink the state of {type(optimizer).__name__}",
                        expected=f"state of the shape of {name}, {tuple(parameter.shape)}",
                        got=f"{key}: {tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}",
                        remedy="use an optimizer with per-element state such as AdamW, or build it after shrink()",
                    )
    return changes


def _holds_elements(state: Any) -> bool:
    """Does optimizer state hold more than single numbers?"""
    if isinstance(state, Tensor):
        return state.numel() > 1
    parts = state.values() if isinstance(state, Mapping) else state if isinstance(state, list | tuple) else ()
    return any(map(_holds_elements, parts))


def _ema_changes(model: nn.Module, ema: Any, mask: ChannelMask, kept: Kept) -> list[Change]:
    if ema is None:
        return []
    if isinstance(ema, nn.Module):
        inner = next(
            (getattr(ema, n) for n in ("ema_model", "module") if isinstance(getattr(ema, n, None), nn.Module)), ema
        )
        refuse_wrapped(inner)
        mask.plan.check(inner)
        return [lambda: shrink_(inner, mask)]
    parameters = dict(model.named_parameters())
    pairs: list[tuple[Any, Any, str]]
    if isinstance(ema, Mapping):
        pairs = [(ema, name, name) for name in ema if name in kept]
        complete = set(parameters) <= set(ema)
    else:
        shadow = ema if isinstance(ema, list) else getattr(ema, "shadow_params", None)
        pairs = [(shadow, i, name) for i, name in enumerate(parameters)]
        complete = isinstance(shadow, list) and len(shadow) == len(parameters)
    shapes = {**parameters, **dict(model.named_buffers())}
    if not complete or any(holder[key].shape != shapes[name].shape for holder, key, name in pairs):
        raise EbdiffError(
            "the EMA does not belong to this model",
            expected=f"{len(parameters)} tensors of the parameters' shapes, a copy of the model, or an EMAModel",
            got=type(ema).__name__,
            remedy="pass the EMA that follows this model",
        )
    return [_Set(holder, key, kept[name]) for holder, key, name in pairs]
