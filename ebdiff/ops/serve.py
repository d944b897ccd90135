"""Who serves an operator: the compiled part where it takes the arguments, else the reference."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from . import channel_mask_reference as reference
from . import native, native_cpu
from .channel_mask_checks import refuse_shared
from .native_cpu import NotTaken

__all__ = ["backend", "reference_of", "run", "written"]


def backend(tensor: Tensor) -> Any:
    """The module with the compiled implementations for a tensor's device; None without one."""
    if tensor.device.type == "cpu":
        return native_cpu if native.module() is not None else None
    if native.has_cuda() and native.covers(*torch.cuda.get_device_capability(tensor.device)):
        return import_module(".native_cuda", __package__)
    return None


def run(name: str, tensor: Tensor, *arguments: Any) -> Any:
    """Compiled where the compiled part takes the arguments, else by the reference."""
    compiled = backend(tensor)
    if compiled is not None:
        try:
            return getattr(compiled, name)(*arguments)
        except NotTaken:
            pass
    return reference_of(name, tensor, *arguments)


def reference_of(name: str, tensor: Tensor, *arguments: Any) -> Any:
    """As `run`, but always the reference."""
    if name == "masked_adamw_":  # the compiled part has looked for itself
        params, grads, *others = arguments[:5]
        refuse_shared([*params, *chain.from_iterable(others)], read=grads)
    return getattr(reference, name)(*arguments)


def written(*lists: Sequence[Tensor]) -> None:
    """Tell autograd that these tensors have other values now, which a write through a raw address does not."""
    for tensors in lists:
        tracked = [tensor for tensor in tensors if not tensor.is_inference()]
        if tracked:
            torch.autograd.graph.increment_version(tracked)
