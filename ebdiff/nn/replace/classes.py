"""The classes that accelerated modules have, and how a module gets one and loses it."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import FunctionType
from typing import Any

from torch import nn

from .deferred import ACCELERATED

__all__ = ["fused_class", "give", "plain_class", "take_back"]

_PLAIN = "_ebdiff_plain"


def plain_class(kind: type) -> type:
    """The class that a fused one was made from, also where others have been made from that one since."""
    found: type = next((vars(base)[_PLAIN] for base in kind.__mro__ if _PLAIN in vars(base)), kind)
    return found


def give(module: nn.Module, kind: type) -> str | None:
    """Let a module run the methods of its fused class; say why not, if somebody's class hides another one."""
    own = type(module)
    if kind not in own.__mro__:
        if plain_class(own) is not own and _PLAIN not in vars(own):
            return f"{own.__name__} was made while other norms of it were fused"
        object.__setattr__(module, "__class__", kind)  # not by the module's own way of setting attributes
    vars(module)[ACCELERATED] = True
    return None


def take_back(module: nn.Module) -> None:
    """Let it run the methods of its plain class, also where something has been wrapped around the fused ones."""
    vars(module).pop(ACCELERATED, None)
    if _PLAIN in vars(type(module)):
        object.__setattr__(module, "__class__", plain_class(type(module)))


@cache
def fused_class(kind: type, methods: tuple[tuple[str, FunctionType], ...]) -> type:
    """A subclass by the name of the plain one, which libraries write into files and look up.

    Raises:
        Exception: whatever a class raises that refuses subclasses.
    """
    body = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__deepcopy__": getattr(kind, "__deepcopy__", _deepcopy),
        "__reduce_ex__": _reduce,
        _PLAIN: kind,
    }
    if issubclass(kind, nn.Sequential):
        body["__getitem__"] = _getitem
    return types.new_class(kind.__name__, (kind,), exec_body=lambda names: names.update(body | dict(methods)))


def _state(module: Any) -> Any:
    """As the plain class gives it: a class made from the fused one may refuse."""
    plain: Any = plain_class(type(module))
    return plain.__getstate__(module)


@contextmanager
def _plainly(self: Any) -> Iterator[Any]:
    """It has its plain class for a while."""
    kind, plain = type(self), plain_class(type(self))
    object.__setattr__(self, "__class__", plain)
    try:
        yield self
    finally:
        object.__setattr__(self, "__class__", kind)


def _reduces_itself(kind: Any) -> bool:
    return kind.__reduce__ is not object.__reduce__ or kind.__reduce_ex__ is not object.__reduce_ex__


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    kind = type(self)
    if _reduces_itself(plain_class(kind)):
        with _plainly(self):
            twin = copy.deepcopy(self, memo)
            same = type(twin) is type(self)
        if same and ACCELERATED in vars(self):
            give(twin, kind)
        return twin
    twin = object.__new__(kind)
    memo[id(self)] = twin
    twin.__setstate__(copy.deepcopy(_state(self), memo))
    return twin


def _reduce(self: Any, protocol: Any) -> Any:
    """Pickled as the plain class, which can be found by its name."""
    if _reduces_itself(plain_class(type(self))):
        with _plainly(self):
            return self.__reduce_ex__(protocol)
    made, state = object.__new__, _state(self)
    if isinstance(state, dict):
        state = {key: value for key, value in state.items() if key != ACCELERATED}
    return made, (plain_class(type(self)),), state


def _getitem(self: Any, index: Any) -> Any:
    """A slice of an accelerated nn.Sequential is accelerated."""
    plain: Any = plain_class(type(self))
    found = plain.__getitem__(self, index)
    if isinstance(index, slice) and ACCELERATED in vars(self):
        vars(found)[ACCELERATED] = True
    return found
