"""The smaller network, its optimizer and its EMA; and the dense stand-in that must compute the same.

The law: ``shrink(model, mask)(x) == masked(model, mask)(x)``, and the same for gradients, to the error of the dtype.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import EbdiffError
from ..nn.group_norm import MaskedGroupNorm
from ..nn.kept import OnKept
from ..nn.replace.classes import plain_class
from ..nn.replace.rewrite import reclass
from ..nn.sparse_model import ALWAYS, densify, sparsify
from ..ops.block_mask import BlockMask
from .blocks import all_blocks, of_kept_heads
from .mask import ChannelMask
from .modules import adapt, adapt_statistics, refuse_wrapped, replace, replace_multihead
from .plan import Norm
from .slices import apply_mask_, compact

if TYPE_CHECKING:
    from ..tickets.ticket import Ticket

__all__ = ["masked", "shrink", "shrink_", "shrinks_of"]

Module = TypeVar("Module", bound=nn.Module)
_RECORD = "_ebdiff_shrinks"


def shrink(model: Module, ticket: Ticket | ChannelMask) -> Module:
    """A new, smaller network without the removed channels, which computes the blocks of attention that a ticket keeps.

    Parameters, buffers and `.grad` are sliced; `requires_grad`, dtype, device, memory format and train mode carry over.
    `model` is left alone. A diffusers model becomes an ``ebdiff.Shrunk<Class>``, which is still an instance of its own
    class and has save_pretrained and from_pretrained. Of a ticket's block masks, and of those that the model has
    already, the kept heads' stay; those that would not make their layer faster are left out (``ebdiff.nn.sparsify``;
    ``ebdiff.nn.blocks_of`` tells which are in).

    Args:
        model: the model that was traced (not wrapped by DDP, FSDP or torch.compile).
        ticket: a mask or a ticket drawn from its plan.

    Raises:
        EbdiffError: the ticket belongs to another architecture, or the model is wrapped.
    """
    mask = _mask_of(ticket)
    refuse_wrapped(model)
    mask.plan.check(model)
    blocks = of_kept_heads(all_blocks(model, ticket), mask)
    named = list(_tensors(model))
    gradients = _compacted([(name, tensor.grad) for name, tensor in named], mask)
    memo: dict[int, Any] = {}
    for (_, tensor), values, gradient in zip(named, compact(_values(named), mask.plan, mask), gradients, strict=True):
        memo[id(tensor)] = _like(tensor, values, gradient)
    small = _copy(model, memo)
    _finish(small, mask, blocks)
    return small


def shrink_(
    model: Module,
    ticket: Ticket | ChannelMask,
    *,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    ema: Any = None,
) -> Module:
    """Shrink a model in place, its training state included, and return it: the training loop just goes on.

    Every parameter stays the same object with fewer elements, so optimizers, schedulers and lists that hold it stay
    right. `.grad`, every optimizer state of a parameter's shape (Adam's moments) and the EMA are sliced by the same
    indices; step counts and parameter groups stay.

    Args:
        model: the model that was traced.
        ticket: a mask or a ticket drawn from its plan.
        optimizer: the optimizer (or several) that holds its parameters; torch's or wrapped by accelerate.
        ema: a copy of the model, something that holds one as `.module` or `.ema_model`, diffusers' EMAModel (anything
            with `shadow_params`), a list of tensors in the order of ``model.parameters()``, or a dict by name. Not
            needed where an `ebdiff.optim.AdamW` moves it along.

    Raises:
        EbdiffError: the ticket, the optimizer or the EMA does not belong to this model. Nothing was changed then.
    """
    mask = _mask_of(ticket)
    refuse_wrapped(model)
    mask.plan.check(model)
    blocks = of_kept_heads(all_blocks(model, ticket), mask)
    optimizers = [] if optimizer is None else [optimizer] if not isinstance(optimizer, Sequence) else list(optimizer)
    state = _optimizer_state(model, optimizers)
    held = [inner for inner in map(_own, optimizers) if inner is not None]
    if ema is None:  # a module that one of them moves along; other kinds it shrinks itself
        ema = next((inner.ema for inner in held if isinstance(inner.ema, nn.Module)), None)
    averages, average_model = _ema_state(model, ema, mask)
    for inner in held:
        inner.check_shrink(mask)
    named = list(_tensors(model))
    # Everything is made before anything is replaced.
    made = [compact([(place.name, place.tensor) for place in places], mask.plan, mask) for places in (state, averages)]
    gradients = _compacted([(name, tensor.grad) for name, tensor in named], mask)
    values = compact(_values(named), mask.plan, mask)
    for place, small in zip([*state, *averages], [*made[0], *made[1]], strict=True):
        place.holder[place.key] = small
    for (_, tensor), small, gradient in zip(named, values, gradients, strict=True):
        _replace_values(tensor, small, gradient)
    if average_model is not None:
        shrink_(average_model, mask)
        sparsify(average_model, blocks, ALWAYS)
    for inner in held:
        inner.shrunk(mask)
    _finish(model, mask, blocks)
    return model


def masked(model: Module, ticket: Ticket | ChannelMask) -> Module:
    """The dense stand-in: a copy of full size in which the removed channels are zero and take no part in statistics.

    It computes what `shrink` computes; gradients of removed channels are zero. Blocks of attention that are not kept
    are computed and masked out. For comparisons and tests: it saves nothing.

    Raises:
        EbdiffError: as `shrink`.
    """
    mask = _mask_of(ticket)
    refuse_wrapped(model)
    mask.plan.check(model)
    dense = _copy(model, {})
    sparsify(dense, all_blocks(model, ticket), ALWAYS, written_out=True)
    apply_mask_(_values(_tensors(dense)), mask.plan, mask)
    for name, tensor in _tensors(dense):
        if tensor.requires_grad and mask.kept(name):
            tensor.register_hook(partial(_without_removed, name=name, mask=mask))
    replace_multihead(dense, mask)
    for norm in mask.plan.norms:
        if mask.regroups(norm):
            module = dense.get_submodule(norm.module)
            group = norm.kind == "group"
            stand_in = MaskedGroupNorm(module, mask.groups_of(norm)) if group else _on_kept(module, norm, mask)
            replace(dense, norm.module, stand_in)
    return dense


def _on_kept(module: nn.Module, norm: Norm, mask: ChannelMask) -> OnKept:
    """The masked form of a module with statistics: shrunken, it runs on the kept channels."""
    memo: dict[int, Any] = {}
    tensors = {}
    for name, tensor in _tensors(module):
        full = mask.plan.aliases.get(f"{norm.module}.{name}", f"{norm.module}.{name}")
        values = compact([(full, tensor.detach())], mask.plan, mask)[0]
        memo[id(tensor)] = _like(tensor, values, None)
        tensors[name] = _places(mask.kept(full))
    small = _copy(module, memo)
    adapt_statistics(small, norm, mask)
    inputs, outputs = mask.kept_along(norm.inputs), mask.kept_along(norm.outputs)
    sizes = {dim: len(kept) for dim, kept in outputs.items()}
    return OnKept(module, small, tensors, _places(inputs), _places(outputs), sizes)


def _places(kept: Mapping[int, Tensor]) -> dict[int, Tensor]:
    return {dim: alive.nonzero()[:, 0] for dim, alive in kept.items()}


def _without_removed(gradient: Tensor, name: str, mask: ChannelMask) -> Tensor:
    gradient = gradient.clone()
    apply_mask_({name: gradient}, mask.plan, mask)
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


def _finish(model: nn.Module, mask: ChannelMask, blocks: Mapping[str, BlockMask]) -> None:
    densify(model)
    adapt(model, mask)
    vars(model)[_RECORD] = [*shrinks_of(model), mask]
    if hasattr(type(model), "load_config"):  # a diffusers model
        from .save import shrunk_class

        reclass(model, shrunk_class(plain_class(type(model))))
    sparsify(model, blocks, ALWAYS)


# Slicing --------------------------------------------------------------------------------------------------------------


def _copy(model: Module, memo: dict[int, Any]) -> Module:
    """A deep copy; weights that a hook (torch.nn.utils.weight_norm) derives anew are copied without their graph."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def _values(named: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    return [(name, tensor.detach()) for name, tensor in named]


def _compacted(named: Sequence[tuple[str, Tensor | None]], mask: ChannelMask) -> list[Tensor | None]:
    """`compact` of what is there, None where there is nothing."""
    present = [(name, tensor.detach()) for name, tensor in named if tensor is not None]
    small = iter(compact(present, mask.plan, mask))
    return [None if tensor is None else next(small) for _, tensor in named]


def _like(tensor: Tensor, values: Tensor, gradient: Tensor | None) -> Tensor:
    """A new parameter or buffer, as `tensor` is."""
    if isinstance(tensor, nn.Parameter):
        values = nn.Parameter(values, requires_grad=tensor.requires_grad)
        values.grad = gradient
    return values


def _replace_values(tensor: Tensor, values: Tensor, gradient: Tensor | None) -> None:
    """Give a tensor other values, of another shape; it stays the same object."""
    tensor.grad = None
    # A change of dtype makes autograd forget a gradient accumulator of the old shape, which a graph that is still
    # alive (the user's last `loss`) would otherwise hand to the next backward pass.
    tensor.data = torch.empty(
        0, dtype=torch.float16 if values.dtype != torch.float16 else torch.float32, device=values.device
    )
    tensor.data = values
    tensor.grad = gradient


# Training state -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where a tensor of the shape of the parameter `name` is kept."""

    name: str
    holder: Any
    key: Any

    @property
    def tensor(self) -> Tensor:
        value: Tensor = self.holder[self.key]
        return value.detach()


def _own(optimizer: Any) -> Any:
    """The `ebdiff.optim.AdamW` behind what was passed (accelerate wraps it), None where it is another optimizer."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if hasattr(inner, "check_shrink") else None


def _optimizer_state(model: nn.Module, optimizers: list[Any]) -> list[_Place]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    places: list[_Place] = []
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
                    places.append(_Place(str(name), state, key))
                elif _holds_elements(value):
                    raise EbdiffError(
                        f"cannot shrink the state of {type(optimizer).__name__}",
                        expected=f"state of the shape of {name}, {tuple(parameter.shape)}",
                        got=f"{key}: {tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}",
                        remedy="use an optimizer with per-element state such as AdamW, or build it after shrink()",
                    )
    return places


def _holds_elements(state: Any) -> bool:
    """Does optimizer state hold more than single numbers?"""
    if isinstance(state, Tensor):
        return state.numel() > 1
    parts = state.values() if isinstance(state, Mapping) else state if isinstance(state, list | tuple) else ()
    return any(map(_holds_elements, parts))


def _ema_state(model: nn.Module, ema: Any, mask: ChannelMask) -> tuple[list[_Place], nn.Module | None]:
    """The tensors of an EMA, or the model that it is."""
    if ema is None:
        return [], None
    if isinstance(ema, nn.Module):
        inner = next(
            (getattr(ema, n) for n in ("ema_model", "module") if isinstance(getattr(ema, n, None), nn.Module)), ema
        )
        refuse_wrapped(inner)
        mask.plan.check(inner)
        return [], inner
    parameters = dict(model.named_parameters())
    pairs: list[tuple[Any, Any, str]]
    if isinstance(ema, Mapping):
        pairs = [(ema, name, name) for name in ema if name in mask.plan.shapes]
        complete = set(parameters) <= set(ema)
    else:
        shadow = ema if isinstance(ema, list) else getattr(ema, "shadow_params", None)
        pairs = [(shadow, i, name) for i, name in enumerate(parameters)]
        complete = isinstance(shadow, list) and len(shadow) == len(parameters)
    shapes = {**parameters, **dict(model.named_buffers())}
    wrong = any(
        holder[key].shape != shapes[name].shape or holder[key].layout is not torch.strided
        for holder, key, name in pairs
        if complete
    )
    if not complete or wrong:
        raise EbdiffError(
            "the EMA does not belong to this model",
            expected=f"{len(parameters)} tensors of the parameters' shapes, a copy of the model, or an EMAModel",
            got=type(ema).__name__,
            remedy="pass the EMA that follows this model",
        )
    return [_Place(name, holder, key) for holder, key, name in pairs], None
