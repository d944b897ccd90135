"""A ChannelMask as an optimizer sees it: which axes of which of its parameters lose channels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import EbdiffError
from ..ops.channel_mask import Axes, apply_mask_

if TYPE_CHECKING:
    from ..pruning.mask import ChannelMask
    from ..tickets.ticket import Ticket

__all__ = ["Removed", "kept_of", "mask_of", "named"]


class Removed:
    """The removed channels of the parameters of some groups; a mask of None removes nothing.

    Raises:
        EbdiffError: parameters without names, names that the plan does not know, other shapes than the plan's.
    """

    def __init__(self, mask: ChannelMask | None, groups: Iterable[dict[str, Any]]) -> None:
        self._table: dict[int, Mapping[int, Tensor]] = {}
        for group in groups if mask is not None else ():
            for name, parameter in named(group):
                assert mask is not None
                _check(name, parameter, mask)
                self._table[id(parameter)] = kept_of(mask, str(name))

    def axes(self, parameter: Tensor) -> Mapping[int, Tensor]:
        """{dim: bool [size], True = KEPT} for each axis of a parameter that loses channels."""
        return self._table.get(id(parameter), {})

    def zero_(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Zero the removed channels of (parameter, tensor of its shape)."""
        places: dict[torch.device, list[tuple[Mapping[int, Tensor], Tensor]]] = {}
        for parameter, tensor in pairs:
            if self.axes(parameter):
                places.setdefault(tensor.device, []).append((self.axes(parameter), tensor))
        for found in places.values():
            apply_mask_([tensor for _, tensor in found], Axes.of(axes for axes, _ in found))


def kept_of(mask: ChannelMask, name: str) -> Mapping[int, Tensor]:
    """{dim: bool [size], True = KEPT} for each axis of a parameter that loses channels, by any of its names."""
    return mask.kept(mask.plan.aliases.get(name, name))


def mask_of(mask: ChannelMask | Ticket) -> ChannelMask:
    """A mask, or a ticket's."""
    chosen: Any = getattr(mask, "mask", mask)
    if not isinstance(getattr(chosen, "keep", None), Mapping):
        got, remedy = type(mask).__name__, "draw one; an EarlyBird's ticket is None until it has settled"
        raise EbdiffError("mask", expected="a ChannelMask or a Ticket", got=got, remedy=remedy)
    return chosen  # type: ignore[no-any-return]


def named(group: dict[str, Any]) -> Iterator[tuple[str | None, Tensor]]:
    """(name, parameter) of a parameter group; None where it was given without names."""
    yield from zip(group.get("param_names") or [None] * len(group["params"]), group["params"], strict=True)


def _check(name: str | None, parameter: Tensor, mask: ChannelMask) -> None:
    if name is None:
        raise EbdiffError(
            "a mask goes by the names of parameters",
            expected="named parameters",
            got="tensors without names",
            remedy="AdamW(model.named_parameters(), ...)",
        )
    shape = mask.plan.shapes.get(mask.plan.aliases.get(name, name))
    if shape != tuple(parameter.shape):
        raise EbdiffError(
            "the mask belongs to another architecture",
            expected=f"{name}: {'no parameter of the plan' if shape is None else list(shape)}",
            got=f"{name}: {list(parameter.shape)}",
            remedy="name parameters as model.named_parameters() does, and draw the mask from this model's plan",
        )
