"""Masks of blocks beside those of channels: where whole heads go, their blocks go too; and how they are written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EbdiffError
from ..nn.sparse_model import blocks_of, paying
from ..ops.block_mask import BlockMask
from .mask import ChannelMask

__all__ = ["all_blocks", "of_kept_heads", "read_blocks", "written"]

_PREFIX = "blocks:"


def all_blocks(model: nn.Module, ticket: Any) -> dict[str, BlockMask]:
    """The block masks that a model has, and those of a ticket that make their layers faster."""
    return {**blocks_of(model), **paying(model, getattr(ticket, "blocks", {}))}


def of_kept_heads(blocks: Mapping[str, BlockMask], mask: ChannelMask) -> dict[str, BlockMask]:
    """{layer: its block mask, of the heads that a mask of channels keeps}.

    Args:
        blocks: {name of the module that computes attention: mask of all its heads}.
        mask: of the plan in which these modules are.

    Raises:
        EbdiffError: heads are removed somewhere in the layer, and which they are cannot be told.
    """
    found = {}
    for name, each in blocks.items():
        kept = _kept_heads(name, each.kept.shape[1], mask)
        found[name] = each if kept is None or bool(kept.all()) else each.heads(kept)
    return found


def written(blocks: Mapping[str, BlockMask]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by name, facts as JSON values), both empty where there are no masks."""
    sizes = {name: [mask.block, mask.q_len, mask.k_len] for name, mask in blocks.items()}
    return {_PREFIX + name: mask.kept for name, mask in blocks.items()}, {"blocks": sizes} if sizes else {}


def read_blocks(tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> dict[str, BlockMask]:
    """The inverse of `written`; takes the masks' tensors out of `tensors`."""
    return {name: BlockMask(tensors.pop(_PREFIX + name), *sizes) for name, sizes in facts.get("blocks", {}).items()}


def _kept_heads(name: str, heads: int, mask: ChannelMask) -> Tensor | None:
    """bool [heads]; None where no head of the layer can be removed."""
    cut, found = False, []
    for parameter in _parameters(name, mask):
        for members in mask.plan.by_parameter.get(parameter, {}).values():
            # Of heads that share keys, an axis of heads is two: those of the keys, and within these the sharing ones.
            inner = {space.name: member.inner for space, member in members if space.unit == "head"}
            kept = torch.ones(1, dtype=torch.bool, device="cpu")
            for space in sorted(inner, key=lambda space: -inner[space]):
                kept = (kept[:, None] & mask.keep[space]).flatten()
            cut = cut or not bool(kept.all())
            if inner and len(kept) == heads:
                found.append(kept)
    if found and all(torch.equal(kept, found[0]) for kept in found):
        return found[0]
    if cut:
        raise EbdiffError(
            f"which heads of {name} stay cannot be told",
            expected=f"one axis of {heads} heads among its parameters",
            got="several" if found else "none",
            remedy="leave its heads whole, or its block mask out of the ticket",
        )
    return None


def _parameters(name: str, mask: ChannelMask) -> list[str]:
    """The parameters of a module; of one without any, those of the module around it."""
    while True:
        prefix = f"{name}." if name else ""
        found = [parameter for parameter in mask.plan.shapes if parameter.startswith(prefix)]
        if found or not name:
            return found
        name = name.rpartition(".")[0]
