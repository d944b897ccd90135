"""The smaller network: a new one, or the same in place with its optimizer and its EMA.

The law: ``shrink(model, mask)(x) == masked(model, mask)(x)``, and the same for gradients, to the error of the dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ..nn.replace.classes import plain_class
from ..nn.replace.rewrite import reclass
from ..nn.sparse_model import ALWAYS, densify, sparsify
from ..ops.block_mask import BlockMask
from .blocks import all_blocks, of_kept_heads
from .copies import checked, copied, like, named_tensors, values_of
from .mask import ChannelMask
from .modules import adapt
from .slices import compact
from .training_state import average_of, optimizer_state, own_optimizer

if TYPE_CHECKING:
    from ..tickets.ticket import Ticket

__all__ = ["shrink", "shrink_", "shrinks_of"]

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
    mask = checked(model, ticket)
    blocks = of_kept_heads(all_blocks(model, ticket), mask)
    named = list(named_tensors(model))
    gradients = _compacted([(name, tensor.grad) for name, tensor in named], mask)
    memo: dict[int, Any] = {}
    for (_, tensor), values, gradient in zip(named, compact(values_of(named), mask.plan, mask), gradients, strict=True):
        memo[id(tensor)] = like(tensor, values, gradient)
    small = copied(model, memo)
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
    mask = checked(model, ticket)
    blocks = of_kept_heads(all_blocks(model, ticket), mask)
    optimizers = [] if optimizer is None else [optimizer] if not isinstance(optimizer, Sequence) else list(optimizer)
    state = optimizer_state(model, optimizers)
    held = [inner for inner in map(own_optimizer, optimizers) if inner is not None]
    if ema is None:  # a module that one of them moves along; other kinds it shrinks itself
        ema = next((inner.ema for inner in held if isinstance(inner.ema, nn.Module)), None)
    averages, average_model = average_of(model, ema, mask)
    for inner in held:
        inner.check_shrink(mask)
    named = list(named_tensors(model))
    # Everything is made before anything is replaced.
    made = [compact([(place.name, place.tensor) for place in places], mask.plan, mask) for places in (state, averages)]
    gradients = _compacted([(name, tensor.grad) for name, tensor in named], mask)
    values = compact(values_of(named), mask.plan, mask)
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
    if getattr(ema, "model_cls", None) is not None and hasattr(type(model), "load_config"):
        from .save import ShrunkBuilder

        ema.model_cls = ShrunkBuilder(model)  # which its save_pretrained builds a network from
    return model


def shrinks_of(model: nn.Module) -> list[ChannelMask]:
    """The masks a model was shrunken by, first to last; empty for a dense one."""
    return list(vars(model).get(_RECORD, ()))


def _finish(model: nn.Module, mask: ChannelMask, blocks: Mapping[str, BlockMask]) -> None:
    densify(model)
    adapt(model, mask)
    vars(model)[_RECORD] = [*shrinks_of(model), mask]
    if hasattr(type(model), "load_config"):  # a diffusers model
        from .save import shrunk_class

        reclass(model, shrunk_class(plain_class(type(model))))
    sparsify(model, blocks, ALWAYS)


def _compacted(named: Sequence[tuple[str, Tensor | None]], mask: ChannelMask) -> list[Tensor | None]:
    """`compact` of what is there, None where there is nothing."""
    present = [(name, tensor.detach()) for name, tensor in named if tensor is not None]
    small = iter(compact(present, mask.plan, mask))
    return [None if tensor is None else next(small) for _, tensor in named]


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
