"""Who follows whom: the tensors of a moving average (EMA), the parameters they follow, and how fast."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import EbdiffError
from ..ops.channel_mask import Axes, compact

__all__ = ["Average", "Decay", "Named", "shrink_tensors", "steps_ema"]

Decay: TypeAlias = float | Callable[[int], float]
Named: TypeAlias = tuple[str | None, Tensor]


class Average:
    """A moving average of parameters: ``shadows()[i]`` follows ``followed[i]``.

    Args:
        ema: diffusers' EMAModel (which has a schedule of its own), a module, a list of tensors or a dict by name.
        decay: how much of the average stays in a step, or a function of the step's number (from 1); None for EMAModel.
        followed: (name or None, parameter), in the order of the EMA where that is a list or an EMAModel.

    Raises:
        EbdiffError: tensors that do not fit the parameters, a decay outside [0, 1], or one too many or too few.
    """

    def __init__(self, ema: Any, decay: Decay | None, followed: Iterable[Named]) -> None:
        self.ema, self.decay = ema, decay
        self.scheduled = hasattr(ema, "shadow_params") and hasattr(ema, "get_decay")
        self.names: list[str | None] = []
        self.followed: list[Tensor] = []
        self._check_decay()
        self._module = _parameters_of(ema) if isinstance(ema, nn.Module) else None
        self.follow(followed)

    def follow(self, named: Iterable[Named]) -> None:
        """Follow these parameters too."""
        pairs = list(named)
        if self.by_name and any(name is None for name, _ in pairs):
            raise _misfit("named parameters", "tensors without names", "AdamW(model.named_parameters(), ...)")
        names, followed = self.names, self.followed
        self.names = [*names, *(name for name, _ in pairs)]
        self.followed = [*followed, *(parameter for _, parameter in pairs)]
        try:
            self.check()
        except EbdiffError:
            self.names, self.followed = names, followed
            raise
        self._places()

    @property
    def by_name(self) -> bool:
        """Is a parameter's average found by its name (a dict, a module), not by its place?"""
        return isinstance(self.ema, Mapping | nn.Module)

    def lacks(self, pair: Named) -> bool:
        """Does this (name, parameter) have an average that does not follow it yet?"""
        return pair[0] in self._table and id(pair[1]) not in self.place

    def shadows(self) -> list[Tensor]:
        """The tensors of the average now, each at the place of the parameter it follows."""
        if self.by_name:
            return [self._table[name] for name in self.names]
        return self.ema.shadow_params if self.scheduled else self.ema  # type: ignore[no-any-return]

    def check(self) -> None:
        """Refuse an average whose tensors are not its parameters'."""
        missing = [name for name in self.names if self.by_name and name not in self._table]
        if missing:
            raise _misfit(f"a tensor for {missing[0]}", "none", "pass the EMA that follows this model")
        shadows = self.shadows()
        if len(shadows) != len(self.followed):
            expected = f"{len(self.followed)} tensors, one for each parameter"
            raise _misfit(expected, str(len(shadows)), "say what it follows: ema_params=model.parameters()")
        for i, (parameter, shadow) in enumerate(zip(self.followed, shadows, strict=True)):
            if parameter.shape != shadow.shape:
                expected = f"{self.names[i] or f'number {i}'}: {list(parameter.shape)}"
                raise _misfit(expected, str(list(shadow.shape)), "shrink it with the model, by shrink_(..., ema=ema)")

    def decay_at(self, step: int) -> float:
        """The decay of the coming step; `step` counts from 1 and is not asked by an EMAModel, which counts itself."""
        if self.scheduled:
            return float(self.ema.get_decay(self.ema.optimization_step + 1))
        return float(self.decay(step)) if callable(self.decay) else float(self.decay or 0.0)

    def advance(self, decay: float) -> None:
        """Note in an EMAModel that it has taken a step."""
        if self.scheduled:
            self.ema.optimization_step += 1
            self.ema.cur_decay_value = decay

    def move(self, places: Iterable[int], decay: float) -> None:
        """Let the averages at these places follow; those of parameters that are not trained become their copies."""
        shadows = self.shadows()
        pairs = [(shadows[i], self.followed[i].to(shadows[i].device), self.followed[i].requires_grad) for i in places]
        moving, still = [pair for pair in pairs if pair[2]], [pair for pair in pairs if not pair[2]]
        if moving:
            averages, parameters, _ = map(list, zip(*moving, strict=True))
            torch._foreach_sub_(averages, torch._foreach_sub(averages, parameters), alpha=1 - decay)
        if still:
            averages, parameters, _ = map(list, zip(*still, strict=True))
            torch._foreach_copy_(averages, parameters)

    @property
    def _table(self) -> Mapping[str | None, Tensor]:
        return self.ema if self._module is None else self._module

    def _places(self) -> None:
        self.place = {id(parameter): i for i, parameter in enumerate(self.followed)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._places()  # the parameters of a copy have other ids

    def _check_decay(self) -> None:
        if not self.scheduled and not isinstance(self.ema, Mapping | nn.Module | list):
            kinds = "an EMAModel, a module, a list of tensors or a dict by name"
            raise _misfit(kinds, type(self.ema).__name__, "pass one of these")
        if self.scheduled and self.decay is not None:
            raise _misfit("no ema_decay: an EMAModel has its own", str(self.decay), "leave it out")
        if self.scheduled or callable(self.decay):
            return
        if self.decay is None or not 0 <= self.decay <= 1:
            raise _misfit("ema_decay in [0, 1], or a function of the step", str(self.decay), "0.9999 is usual")


def shrink_tensors(
    average: Average, names: Mapping[int, str | None], kept: Callable[[str], Mapping[int, Tensor]]
) -> None:
    """Cut those tensors of an average that are still dense; those in a module, or without a name, stay as they are.

    Args:
        average: of parameters that have been shrunken.
        names: {id(parameter): name}, where the average itself was given none.
        kept: {dim: bool [size], True = KEPT} of a parameter by its name.
    """
    if isinstance(average.ema, nn.Module):
        return
    shadows, dense = average.shadows(), []
    for i, (name, parameter) in enumerate(zip(average.names, average.followed, strict=True)):
        name = name or names.get(id(parameter))
        if name is not None and parameter.shape != shadows[i].shape:
            dense.append((i, name))
    small = compact([shadows[i] for i, _ in dense], Axes.of(kept(name) for _, name in dense))
    holder: Any = average.ema if average.by_name else shadows
    for (i, name), tensor in zip(dense, small, strict=True):
        holder[name if average.by_name else i] = tensor


def steps_ema(optimizer: Any, ema: Any) -> bool:
    """Does this optimizer (accelerate's wrapper of it, too) move this EMA along in its own step?"""
    inner = getattr(optimizer, "optimizer", optimizer)
    return ema is not None and getattr(inner, "ema", None) is ema


def _parameters_of(module: nn.Module) -> dict[str | None, Tensor]:
    inner = (getattr(module, name, None) for name in ("ema_model", "module"))  # what holds a copy of the model
    return dict(next((found for found in inner if isinstance(found, nn.Module)), module).named_parameters())


def _misfit(expected: str, got: str, remedy: str) -> EbdiffError:
    return EbdiffError("the EMA does not fit", expected=expected, got=got, remedy=remedy)
