"""torch.optim.AdamW becomes ebdiff.optim.AdamW, and stays the same object: schedulers, scalers and wrappers hold it."""

from __future__ import annotations

import weakref
from functools import wraps
from typing import Any

import torch

from ...optim import AdamW

__all__ = ["exchange", "put_back"]

# What torch's fused AdamW tells a GradScaler: that it unscales gradients by itself. Ours leaves that to the scaler.
_UNSCALES = "_step_supports_amp_scaling"
_MARK = "_ebdiff_unscaled"


def exchange(optimizer: Any) -> str:
    """Give an optimizer our class where its steps stay the same; say what was done, or why nothing was."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    name = type(inner).__name__
    if type(inner) is AdamW:
        return "already ebdiff.optim.AdamW"
    why = _why_not(optimizer, inner)
    if why:
        return f"{name} left as it was: {why}"
    had = vars(inner).pop(_UNSCALES, None)
    inner.__class__ = AdamW
    vars(inner)[_MARK] = had
    inner._forget()
    _settle(inner)
    return "torch.optim.AdamW became ebdiff.optim.AdamW, the same object with the same state"


def put_back(optimizer: Any) -> None:
    """torch's class again, for an optimizer that `exchange` has changed."""
    inner: Any = getattr(optimizer, "optimizer", optimizer)
    if type(inner) is not AdamW or _MARK not in vars(inner) or inner.mask is not None or inner.ema is not None:
        return
    had = vars(inner).pop(_MARK)
    setattr(inner, "__class__", torch.optim.AdamW)  # noqa: B010  (to mypy it is still ours)
    for key in [key for key in vars(inner) if key in ("_plans", "_removed", "_mask", "_average")]:
        delattr(inner, key)
    if had is not None:
        vars(inner)[_UNSCALES] = had
    _settle(inner)


def _why_not(optimizer: Any, inner: Any) -> str | None:
    if type(inner) is not torch.optim.AdamW:
        return "only torch.optim.AdamW itself has a twin here"
    parameters = [p for group in inner.param_groups for p in group["params"]]
    reasons = {
        "amsgrad, capturable and differentiable are not offered": any(
            group[key] for group in inner.param_groups for key in ("amsgrad", "capturable", "differentiable")
        ),
        "a learning rate on a GPU would have to be waited for": any(
            isinstance(group["lr"], torch.Tensor) and group["lr"].is_cuda for group in inner.param_groups
        ),
        "sharded, complex or sparse parameters": any(
            hasattr(p, "to_local") or p.is_complex() or p.layout is not torch.strided for p in parameters
        ),
        "its wrapper's gradient scaler holds the old step": getattr(optimizer, "scaler", None) is not None,
        "its step was replaced on the instance": "step" in vars(inner)
        and not hasattr(inner.step, "_wrapped_by_lr_sched"),
    }
    return next((why for why, holds in reasons.items() if holds), None)


def _settle(optimizer: Any) -> None:
    """After a change of class: hooks on the new one's step, and the scheduler's mark on the instance's."""
    optimizer._patch_step_function()
    if "step" not in vars(optimizer):
        return
    del optimizer.step
    itself, step = weakref.ref(optimizer), type(optimizer).step

    @wraps(step)
    def counted(*args: Any, **kwargs: Any) -> Any:
        held: Any = itself()
        held._opt_called = True  # what a learning rate scheduler looks for
        return step(held, *args, **kwargs)

    vars(counted)["_wrapped_by_lr_sched"] = True
    optimizer.step = counted
