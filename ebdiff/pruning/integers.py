"""The integers that a module keeps: as attributes, in tuples and lists, and on plain objects that it holds."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["integers", "read", "write"]

_OWN = frozenset(vars(nn.Module()))
_OPAQUE = (Tensor, nn.Module, type, FunctionType, MethodType, ModuleType, torch.dtype, torch.device, dict)


def integers(module: nn.Module) -> Iterator[tuple[str, int]]:
    """(path, value) of every integer that a module keeps: "heads", "sizes[1]", "processor.heads".

    Children, parameters, dictionaries (such as a diffusers config) and what torch keeps for itself are left out.
    """
    for key, value in vars(module).items():
        if key not in _OWN:
            yield from _integers(key, value, 2)


def _integers(path: str, value: Any, depth: int) -> Iterator[tuple[str, int]]:
    if isinstance(value, int) and not isinstance(value, bool):
        yield path, value
    elif depth and isinstance(value, tuple | list):
        for i, item in enumerate(value[:64]):
            yield from _integers(f"{path}[{i}]", item, depth - 1)
    elif depth and hasattr(value, "__dict__") and not isinstance(value, _OPAQUE):
        for key, item in vars(value).items():
            yield from _integers(f"{path}.{key}", item, depth - 1)


def _steps(path: str) -> list[str | int]:
    return [int(step) if step.isdigit() else step for step in re.findall(r"\w+", path)]


def read(module: nn.Module, path: str) -> int | None:
    """The integer at a path; None where there is none."""
    value: Any = module
    for step in _steps(path):
        try:
            value = value[step] if isinstance(step, int) else getattr(value, step)
        except (AttributeError, IndexError, TypeError):
            return None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def write(module: nn.Module, path: str, value: int) -> None:
    """Set the integer at a path. Objects and lists on the way are replaced by copies: others may hold them too."""
    first, *rest = _steps(path)
    setattr(module, str(first), _changed(getattr(module, str(first)), rest, value))


def _changed(holder: Any, steps: list[str | int], value: int) -> Any:
    if not steps:
        return value
    step, *rest = steps
    if isinstance(step, int):
        items = [_changed(item, rest, value) if i == step else item for i, item in enumerate(holder)]
        return type(holder)(*items) if hasattr(holder, "_fields") else type(holder)(items)
    copied = copy.copy(holder)
    object.__setattr__(copied, step, _changed(getattr(holder, step), rest, value))
    return copied
