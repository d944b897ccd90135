"""Blocks that do what another one did: in the same state and at the same sizes, one of them is tried for all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Block", "Blocks", "map_output", "state_of_block"]

_LEAST_OPS = 8  # a shorter one is run sooner than compared
_UNTOLD = {*vars(nn.Module()), "forward"}  # what torch keeps for itself, and what runs it once


@dataclass(frozen=True, slots=True)
class Block:
    """One call of a module: the ops from `start` up to `end`, and what it returned."""

    module: nn.Module
    start: int
    end: int
    output: Any


class Blocks:
    """The modules of a dense forward pass that ran once, with enough ops, and returned plain tensors."""

    def __init__(self) -> None:
        self._running: list[tuple[nn.Module, int]] = []
        self._calls: Counter[int] = Counter()
        self._found: list[Block] = []

    def enter(self, module: nn.Module, at: int) -> None:
        """A module begins to run, after this many ops."""
        self._running.append((module, at))
        self._calls[id(module)] += 1

    def leave(self, module: nn.Module, output: Any, at: int) -> None:
        """A module has run."""
        while self._running:
            entered, start = self._running.pop()
            if entered is module:
                own = any("forward" in vars(inner) for inner in module.modules())  # of the user's
                if at - start >= _LEAST_OPS and self._running and _is_plain(output) and not own:
                    self._found.append(Block(module, start, at, output))
                return

    def once(self) -> list[Block]:
        """All that were called once."""
        return [block for block in self._found if self._calls[id(block.module)] == 1]


def _is_plain(output: Any) -> bool:
    if isinstance(output, Tensor):
        return 0 not in output.stride()
    if isinstance(output, dict):
        return type(output) is dict and all(map(_is_plain, output.values()))
    return output is None or (type(output) in (tuple, list) and all(map(_is_plain, output)))


def map_output(change: Callable[[Tensor], Tensor], output: Any) -> Any:
    """What a block returns, with every tensor changed."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, dict):
        return {key: map_output(change, value) for key, value in output.items()}
    return None if output is None else type(output)(map_output(change, item) for item in output)


def state_of_block(module: nn.Module) -> tuple[Any, ...]:
    """All by which a module and those below it may differ from others of their classes, values of tensors left out."""
    return tuple(
        (
            type(inner),
            tuple(inner._modules),
            tuple((key, None if t is None else tuple(t.shape)) for key, t in inner._parameters.items()),
            tuple((key, None if t is None else tuple(t.shape)) for key, t in inner._buffers.items()),
            tuple((key, _told(value, 3)) for key, value in vars(inner).items() if key not in _UNTOLD),
            inner.training,
        )
        for inner in module.modules()
    )


def _told(value: Any, depth: int) -> Any:
    """A value as one that can be compared; of what cannot, its identity."""
    if value is None or isinstance(value, int | float | str | torch.dtype | torch.device | type | FunctionType):
        return value
    if isinstance(value, Tensor):
        return type(value), tuple(value.shape)
    if isinstance(value, nn.Module):
        return type(value)  # its own state is told where it is registered
    if isinstance(value, MethodType):
        return value.__func__
    if depth and isinstance(value, tuple | list):
        return type(value), tuple(_told(item, depth - 1) for item in value)
    if depth and isinstance(value, dict):
        return type(value), tuple((str(key), _told(item, depth - 1)) for key, item in value.items())
    if depth and hasattr(value, "__dict__") and not isinstance(value, partial):
        return type(value), tuple((key, _told(item, depth - 1)) for key, item in vars(value).items())
    return id(value)
