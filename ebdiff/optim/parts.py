"""What one call of the operator updates, found once and kept until something about it changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import EbdiffError
from ..ops.channel_mask import Axes
from .average import Average
from .removed import Removed

__all__ = ["MOMENTS", "Part", "Plan"]

MOMENTS = ("exp_avg", "exp_avg_sq")
State: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """Parameters of one group, on one device, that have taken as many steps: one call of the operator.

    Args:
        places: which of the group's parameters with a gradient.
        count: float32 [n], on the CPU: the steps taken, of which each ``state["step"]`` is one element, so that one
            addition counts for all.
        axes: their masks.
        shadows: the places of their averages; empty where none moves in the same pass.
    """

    places: list[int]
    count: Tensor
    axes: Axes
    shadows: list[int]

    @property
    def step(self) -> int:
        """The number of the coming step, from 1."""
        return int(self.count[0]) + 1


class Plan:
    """The parts of a group. Making it brings state and averages to the memory layout of their parameters.

    Args:
        trained: parameters with a gradient.
        states: of each: its "step" (on any device, of any type), and its moments.
        shadows: the tensors of `average`.
    """

    def __init__(
        self,
        trained: list[Tensor],
        states: list[State],
        shadows: list[Tensor],
        average: Average | None,
        removed: Removed,
    ) -> None:
        alike: dict[tuple[torch.device, float, bool], list[int]] = {}
        follow = []
        for i, (parameter, state) in enumerate(zip(trained, states, strict=True)):
            _check(parameter, state)
            place = None if average is None else _joining(parameter, average, shadows)
            follow.append(place)
            if place is not None:
                shadows[place].data = _laid_out(shadows[place], parameter)
            for name in MOMENTS:
                state[name] = _laid_out(state[name], parameter)
            alike.setdefault((parameter.device, float(state["step"]), place is None), []).append(i)
        self.parts = []
        for (_, taken, _), places in alike.items():
            count = torch.full((len(places),), taken, dtype=torch.float32, device="cpu")
            for i, place in enumerate(places):
                states[place]["step"] = count[i]
            axes = Axes.of(removed.axes(trained[i]) for i in places)
            joined = [place for i in places if (place := follow[i]) is not None]
            self.parts.append(Part(places, count, axes, joined))
        self._held = [trained, _tensors_of(states), list(shadows)]  # so that no id is used again
        self._key = _key(trained, states, shadows)

    def fits(self, trained: list[Tensor], states: list[State], shadows: list[Tensor]) -> bool:
        """Is it still what would be made of these?"""
        even = all(len(set(part.count.tolist())) == 1 for part in self.parts)
        return even and self._key == _key(trained, states, shadows)


def _check(parameter: Tensor, state: State) -> None:
    """Refuse what the operator would refuse, before anything has been updated."""
    if hasattr(parameter, "to_local"):
        raise EbdiffError(
            "a sharded parameter (DTensor, as FSDP2 makes them)",
            expected="plain tensors",
            got=f"{type(parameter).__name__} {list(parameter.shape)}",
            remedy="use torch.optim.AdamW for sharded models",
        )
    for name in MOMENTS:
        if state[name].shape != parameter.shape or state[name].dtype != parameter.dtype:
            raise EbdiffError(
                f"state of AdamW: {name}",
                expected=f"{parameter.dtype} {list(parameter.shape)}, as its parameter",
                got=f"{state[name].dtype} {list(state[name].shape)}",
                remedy="load the state that belongs to these parameters, or start without one",
            )


def _key(trained: list[Tensor], states: list[State], shadows: list[Tensor]) -> tuple[object, ...]:
    """Changes when tensors are replaced, frozen, or moved to another device, dtype or memory layout."""
    return (
        list(map(id, trained)),
        list(map(id, _tensors_of(states))),
        list(map(id, shadows)),
        [p.requires_grad for p in trained] if shadows else None,
        [p.stride() for p in trained],
        [shadow.stride() for shadow in shadows],
        [(p.dtype, p.device) for p in (*trained, *shadows)],
    )


def _tensors_of(states: list[State]) -> list[Tensor]:
    return [state[name] for state in states for name in ("step", *MOMENTS)]


def _joining(parameter: Tensor, average: Average, shadows: list[Tensor]) -> int | None:
    """The place of a parameter's average, if the operator can move it in the same pass."""
    place = average.place.get(id(parameter))
    if place is None or not parameter.requires_grad:
        return None
    alike = (shadows[place].dtype, shadows[place].device) == (parameter.dtype, parameter.device)
    return place if alike else None


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor with the strides of another one, copied only where it has others; the operator walks them in step."""
    if tensor.stride() == like.stride() or tensor.device != like.device:
        return tensor
    copied = torch.empty_like(like, dtype=tensor.dtype, requires_grad=False)
    return copied.copy_(tensor) if copied.stride() == like.stride() else tensor
