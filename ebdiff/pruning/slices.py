"""A mask applied to any number of tensors at once: zeroing, cutting down and growing back.

Tensors are named after the parameter (or buffer) whose shape they have, so a name may come several times: weights,
gradients, moments, averages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from ..errors import EbdiffError
from ..ops import channel_mask as ops
from ..ops.mask_axes import Axes
from .plan import ChannelPlan

if TYPE_CHECKING:
    from .mask import ChannelMask

__all__ = ["Named", "apply_mask_", "compact", "scatter_back"]

Named: TypeAlias = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


def apply_mask_(tensors: Named, plan: ChannelPlan, mask: ChannelMask) -> None:
    """Zero the removed channels of all tensors, in place and in one pass; whatever they held, NaN included.

    Args:
        tensors: {name: tensor} or pairs of them: any dtypes, memory layouts and devices. Names that the plan does not
            know are refused; tensors without a prunable axis stay as they are.
        plan: the plan of the mask.
        mask: True = KEPT.

    Raises:
        EbdiffError: a mask of another plan, an unknown name, a shape that is not its parameter's, tensors whose
            elements share memory. Nothing was changed then.
    """
    names, values = _checked(tensors, plan, mask)
    chosen = [i for i, name in enumerate(names) if mask.kept(name)]
    for places in _by_device([values[i] for i in chosen]):
        here = [chosen[i] for i in places]
        found = [names[i] for i in here]
        axes = mask.axes(found) if len(found) > 1 else Axes.of(map(mask.kept, found))  # hooks: not worth remembering
        ops.apply_mask_([values[i] for i in here], axes)


def compact(tensors: Named, plan: ChannelPlan, mask: ChannelMask) -> list[Tensor]:
    """The kept slices of all tensors, in their order, dtype, device and memory layout (channels_last stays so).

    They lie in one new arena for each device and dtype, each as a storage of its own, so that whatever saves tensors by
    their storage saves each by itself. The arena is freed with the last of them: call this once for what lives and dies
    together (weights; gradients; moments).

    Args, errors: as `apply_mask_`.
    """
    names, values = _checked(tensors, plan, mask)

    def here(places: list[int]) -> list[Tensor]:
        return _owners(ops.compact([values[i] for i in places], mask.axes([names[i] for i in places])))

    return _each_device(values, here)


def scatter_back(
    tensors: Named, plan: ChannelPlan, mask: ChannelMask, into: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """The inverse of `compact`: tensors of the plan's full shapes, for growing a network back.

    Args:
        tensors: kept slices by name, as `compact` made them.
        plan: the plan of the mask.
        mask: the mask they were cut by.
        into: tensors of full size to write to, in the order of `tensors`; removed channels keep their values there. By
            default new ones, in which removed channels are zero.

    Raises:
        EbdiffError: a mask of another plan, an unknown name, or shapes that do not fit. Nothing was changed then.
    """
    pairs = _pairs(tensors)
    _check_plan(plan, mask)
    for name, _ in pairs:
        _check_name(name, plan)
    if into is not None and len(into) != len(pairs):
        raise EbdiffError("into", expected=f"{len(pairs)} tensors", got=str(len(into)), remedy="one for each")
    for (name, _), tensor in zip(pairs, into or (), strict=into is not None):
        _check_shape(name, tensor, plan)

    def here(places: list[int]) -> list[Tensor]:
        small = [pairs[i][1] for i in places]
        dense = [into[i] for i in places] if into is not None else None
        shapes = [plan.shapes[pairs[i][0]] for i in places]
        large = _owners(ops.zeros_like(small, shapes)) if dense is None else dense
        return ops.scatter_back(small, mask.axes([pairs[i][0] for i in places]), large, into=large)

    return _each_device([small for _, small in pairs], here)


def _owners(views: list[Tensor]) -> list[Tensor]:
    """The same memory, but a storage for each view: accelerate and safetensors take tensors of one storage for tied.

    Not under torch.compile, and not on "meta", where there is no memory to divide.
    """
    if torch.compiler.is_compiling() or any(view.device.type == "meta" for view in views):
        return views
    result = []
    for view in views:
        first = view.storage_offset() * view.itemsize
        part = view.untyped_storage()[first : first + view.nbytes]
        result.append(view.new_empty(0).set_(part, 0, view.shape, view.stride()))
    return result


def _checked(tensors: Named, plan: ChannelPlan, mask: ChannelMask) -> tuple[list[str], list[Tensor]]:
    _check_plan(plan, mask)
    pairs = _pairs(tensors)
    for name, tensor in pairs:
        if plan.shapes.get(name) != tensor.shape:
            _check_name(name, plan)
            _check_shape(name, tensor, plan)
    return [name for name, _ in pairs], [tensor for _, tensor in pairs]


def _pairs(tensors: Named) -> list[tuple[str, Tensor]]:
    return list(tensors.items() if isinstance(tensors, Mapping) else tensors)


def _check_plan(plan: ChannelPlan, mask: ChannelMask) -> None:
    if mask.plan is not plan and mask.plan.fingerprint() != plan.fingerprint():
        raise EbdiffError(
            "mask of another plan", expected=plan.fingerprint(), got=mask.plan.fingerprint(), remedy="draw it from this"
        )


def _check_name(name: str, plan: ChannelPlan) -> None:
    if name not in plan.shapes:
        known = plan.aliases.get(name)
        remedy = f"it is tied to {known}: name that" if known else "name tensors as model.named_parameters() does"
        raise EbdiffError("tensor of an unknown name", expected="a parameter of the plan", got=name, remedy=remedy)


def _check_shape(name: str, tensor: Tensor, plan: ChannelPlan) -> None:
    if tuple(tensor.shape) != tuple(plan.shapes[name]):
        raise EbdiffError(
            f"shape of {name}",
            expected=str(list(plan.shapes[name])),
            got=str(list(tensor.shape)),
            remedy="use tensors of the traced model's shapes",
        )


def _by_device(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The places of the tensors of each device."""
    places: dict[object, list[int]] = {}
    for i, tensor in enumerate(tensors):
        places.setdefault(tensor.device, []).append(i)
    return list(places.values())


def _each_device(tensors: Sequence[Tensor], function: Callable[[list[int]], list[Tensor]]) -> list[Tensor]:
    """Call `function` with the places of each device; its results in the order of the tensors."""
    results: dict[int, Tensor] = {}
    for places in _by_device(tensors):
        results.update(zip(places, function(places), strict=True))
    return [results[i] for i in range(len(tensors))]
