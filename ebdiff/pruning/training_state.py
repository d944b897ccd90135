"""Training state that is cut with a model: the tensors of its optimizers and of its EMA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EbdiffError
from .mask import ChannelMask
from .modules import refuse_wrapped
from .plan import ChannelPlan

__all__ = ["Place", "average_of", "held_by", "optimizer_state", "own_optimizer"]


@dataclass(frozen=True)
class Place:
    """Where a tensor of the shape of the parameter `name` is kept."""

    name: str
    holder: Any
    key: Any

    @property
    def tensor(self) -> Tensor:
        """Its values."""
        value: Tensor = self.holder[self.key]
        return value.detach()


def own_optimizer(optimizer: Any) -> Any:
    """The `ebdiff.optim.AdamW` behind what was passed (accelerate wraps it), None where it is another optimizer."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if hasattr(inner, "check_shrink") else None


def optimizer_state(model: nn.Module, optimizers: list[Any]) -> list[Place]:
    """Where the optimizers keep tensors of the shapes of the model's parameters.

    Raises:
        EbdiffError: an optimizer of another model, or state that does not go by elements.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    places: list[Place] = []
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
                    places.append(Place(str(name), state, key))
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


def average_of(model: nn.Module, ema: Any, mask: ChannelMask) -> tuple[list[Place], nn.Module | None]:
    """The tensors of an EMA, or the model that it is."""
    if ema is None:
        return [], None
    if isinstance(ema, nn.Module):
        return [], _average_model(model, ema, mask.plan)
    parameters = dict(model.named_parameters())
    pairs: list[tuple[Any, Any, str]]
    if isinstance(ema, Mapping):
        pairs = [(ema, name, name) for name in ema if name in mask.plan.shapes]
        complete = set(parameters) <= set(ema)
    else:
        shadow = ema if isinstance(ema, list) else getattr(ema, "shadow_params", None)
        pairs = [(shadow, i, name) for i, name in enumerate(parameters)]
        complete = isinstance(shadow, list) and len(shadow) == len(parameters)
        stored = getattr(ema, "temp_stored_params", None)  # between store() and restore()
        if stored is not None:
            complete = complete and isinstance(stored, list) and len(stored) == len(parameters)
            pairs += [(stored, i, name) for i, name in enumerate(parameters)]
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
    return [Place(name, holder, key) for holder, key, name in pairs], None


def _average_model(model: nn.Module, ema: nn.Module, plan: ChannelPlan) -> nn.Module:
    """The network of averages: the EMA itself, or what it holds."""
    holder = _holder(ema)
    average = held_by(ema)
    if average is model:
        raise EbdiffError(
            "the EMA is the model itself", expected="its averages", got="the model", remedy="pass the EMA"
        )
    refuse_wrapped(average)
    if _fits(plan, average):
        return average
    kind = type(model).__name__
    inside = next((name for name, part in average.named_modules() if name and _fits(plan, part)), None)
    path = ".".join(part for part in ("ema", holder, inside) if part)
    raise EbdiffError(
        "the EMA does not belong to this model",
        expected=f"averages of the parameters of this {kind}, at its shapes",
        got=f"those of a {type(average).__name__}" + (f", which holds them at {path}" if inside else ""),
        remedy=f"pass ema={path}" if inside else "pass the EMA that follows this model",
    )


def held_by(ema: nn.Module) -> nn.Module:
    """The network of averages that an EMA holds as `.ema_model` or `.module`; itself where it holds none."""
    holder = _holder(ema)
    return getattr(ema, holder) if holder else ema


def _holder(ema: nn.Module) -> str:
    return next((name for name in ("ema_model", "module") if isinstance(getattr(ema, name, None), nn.Module)), "")


def _fits(plan: ChannelPlan, module: nn.Module) -> bool:
    try:
        plan.check(module)
    except EbdiffError:
        return False
    return True
