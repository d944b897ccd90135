"""Operators that share a reference and, where there are any, kernels: who serves, and who has served."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import native
from .native_cpu import NotTaken
from .serve import is_plain

__all__ = ["Family", "is_direct", "is_transformed"]


class Family:
    """Functions of one reference, and of modules beside it that serve them on the CPU and on GPUs.

    Args:
        name: the modules are `<name>_cpu` and `<name>_cuda`; their functions are called as the reference's.
        reference: what serves where no kernel does.
        compiled: whether what serves on the CPU is in ebdiff._C.

    Attributes:
        fallbacks: {why the reference has served instead of a kernel: how often}.
    """

    def __init__(self, name: str, reference: ModuleType, *, compiled: bool = True) -> None:
        self.name = name
        self.reference = reference
        self.compiled = compiled
        self.fallbacks: Counter[str] = Counter()

    def serve(self, function: str, x: Tensor, *arguments: Any) -> Any:
        """By a kernel for x's device, where one takes the arguments."""
        kernels = self.kernels(x) if x.numel() else None
        if kernels is not None:
            try:
                return getattr(kernels, function)(*arguments)
            except NotTaken as why:
                self.fallbacks[str(why)] += 1
        elif x.numel():
            self.fallbacks["no compiled part" if x.is_cpu else "no Triton"] += 1
        return getattr(self.reference, function)(*arguments)

    def kernels(self, x: Tensor) -> Any:
        """The module with the kernels for a tensor's device; None without one."""
        if x.is_cpu:
            return _module(f"{self.name}_cpu") if self._is_on_cpu() else None
        return _module(f"{self.name}_cuda") if x.is_cuda and _has_triton() else None

    def _is_on_cpu(self) -> bool:
        return not self.compiled or native.module() is not None


@cache
def _module(name: str) -> Any:
    return import_module(f".{name}", __package__)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def is_direct(*tensors: Tensor | None) -> bool:
    """May the implementation be called without torch's dispatcher, which also makes memory of lazy tensors?"""
    given = [tensor for tensor in tensors if tensor is not None]
    return is_plain(given, masks=()) and not _is_lazy(given) and not _in_forward_mode()


def _is_lazy(tensors: Sequence[Tensor]) -> bool:
    """Not asked: whether they are conjugates, which only complex ones are."""
    return True in map(Tensor.is_neg, tensors) or True in map(Tensor._is_zerotensor, tensors)


def _in_forward_mode() -> bool:
    """Are derivatives carried along (torch.autograd.forward_ad)?"""
    return forward_ad._current_level >= 0


def is_transformed() -> bool:
    """Does a transform of torch.func call, or are derivatives carried along? They go through no kernel."""
    return torch._C._functorch.peek_interpreter_stack() is not None or _in_forward_mode()
