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
from .dispatch import is_listened_to
from .native_cpu import NotTaken

__all__ = ["backend", "is_plain", "reference_of", "run", "written"]

_PLAIN = {torch.Tensor, torch.nn.Parameter}


def is_plain(*lists: Sequence[Tensor], masks: Sequence[Tensor]) -> bool:
    """May an implementation be called without torch's dispatcher, which takes 2 ms for 1,000 arguments?

    Not where anyone listens there: torch.compile, modes, transforms, the profiler, subclasses, tensors on "meta".
    """
    return (
        not is_listened_to()
        and not torch._C._autograd._profiler_enabled()
        and _PLAIN.issuperset(map(type, chain(*lists, masks)))
        and False not in [tensors[0].is_cpu or tensors[0].is_cuda for tensors in lists if tensors]
    )


def backend(tensor: Tensor) -> Any:
    """The module with the compiled implementations for a tensor's device; None without one."""
    if tensor.device.type == "cpu":
        return native_cpu if native.module() is not None else None
    if tensor.device.type != "cuda" or not native.has_cuda():
        return None
    covered = native.covers(*torch.cuda.get_device_capability(tensor.device))
    return import_module(".native_cuda", __package__) if covered else None


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
        lists = arguments[0]
        refuse_shared(list(chain.from_iterable(lists.written)), read=lists.grads)
    return getattr(reference, name)(*arguments)


def written(*lists: Sequence[Tensor]) -> None:
    """Tell autograd that these tensors have other values now, which a write through a raw address does not."""
    for tensors in lists:
        if True in map(Tensor.is_inference, tensors):
            tensors = [tensor for tensor in tensors if not tensor.is_inference()]
        if tensors:
            torch.autograd.graph.increment_version(tensors)
