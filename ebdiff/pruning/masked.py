"""The dense stand-in for a shrunken network, which must compute the same.

The law: ``shrink(model, mask)(x) == masked(model, mask)(x)``, and the same for gradients, to the error of the dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from ..nn.group_norm import MaskedGroupNorm
from ..nn.kept import OnKept
from ..nn.sparse_model import ALWAYS, sparsify
from .blocks import all_blocks
from .copies import checked, copied, like, named_tensors, values_of
from .mask import ChannelMask
from .modules import adapt_statistics, replace, replace_multihead
from .plan import Norm
from .slices import apply_mask_, compact

if TYPE_CHECKING:
    from ..tickets.ticket import Ticket

__all__ = ["masked"]

Module = TypeVar("Module", bound=nn.Module)


def masked(model: Module, ticket: Ticket | ChannelMask) -> Module:
    """The dense stand-in: a copy of full size in which the removed channels are zero and take no part in statistics.

    It computes what `shrink` computes; gradients of removed channels are zero. Blocks of attention that are not kept
    are computed and masked out. For comparisons and tests: it saves nothing.

    Raises:
        EbdiffError: as `shrink`.
    """
    mask = checked(model, ticket)
    dense = copied(model, {})
    sparsify(dense, all_blocks(model, ticket), ALWAYS, written_out=True)
    apply_mask_(values_of(named_tensors(dense)), mask.plan, mask)
    for name, tensor in named_tensors(dense):
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
    for name, tensor in named_tensors(module):
        full = mask.plan.aliases.get(f"{norm.module}.{name}", f"{norm.module}.{name}")
        values = compact([(full, tensor.detach())], mask.plan, mask)[0]
        memo[id(tensor)] = like(tensor, values, None)
        tensors[name] = _places(mask.kept(full))
    small = copied(module, memo)
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
