"""May a call change in place a tensor that was there before it? Decided by reading what is called."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from functools import cache
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from .classes import plain_class
from .known import is_bare
from .scope import Scope
from .source import NotRewritable

__all__ = ["may_write"]

_TRUSTED = {"torch", "einops", "math", "builtins", "typing"}
_NOT_TRUSTED = {"setattr", "delattr", "exec", "eval", "next", "map", "filter", "checkpoint", "set_grad_enabled"}
_CONTAINERS = (Tensor, dict, list, tuple, set, str)


def may_write(call: ast.Call, meaning: Callable[[ast.expr], Any], seen: set[Any] | None = None) -> bool:
    """May this call change a tensor in place? Where it cannot be known, it may.

    Args:
        call: it.
        meaning: what an expression names, or None (`Scope.meaning`).
        seen: functions that have been looked at, or are being.
    """
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    called = meaning(call.func)
    if _is_in_place(name) or _is_in_place(getattr(called, "__name__", "")) or _asks_for_it(call, called):
        return True
    if called is not None:
        return _writes(called, set() if seen is None else seen)
    return not (isinstance(call.func, ast.Attribute) and _has_method(meaning(call.func.value), name))


def _has_method(held: Any, name: str) -> bool:
    """Is it a method of tensors or containers? `held` is None where it is local: it is taken for one of these."""
    return any(hasattr(kind, name) and (held is None or isinstance(held, kind)) for kind in _CONTAINERS)


def _is_in_place(name: str) -> bool:
    """add_, __iadd__"""
    return name.endswith("_") and (not name.endswith("__") or name.startswith("__")) and name != "_"


def _asks_for_it(call: ast.Call, called: Any) -> bool:
    """out=, inplace=, or inplace by its place."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if None in given or "out" in given:
        return True
    place = _place_of_inplace(called) if isinstance(called, FunctionType) else None
    if place is not None and any(isinstance(argument, ast.Starred) for argument in call.args):
        return True
    if place is not None and len(call.args) > place:
        given["inplace"] = call.args[place]
    return "inplace" in given and not _is_false(given["inplace"])


@cache
def _place_of_inplace(function: FunctionType) -> int | None:
    names = list(inspect.signature(function).parameters)
    return names.index("inplace") if "inplace" in names else None


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def _writes(called: Any, seen: set[Any]) -> bool:
    """May calling it do so?"""
    if isinstance(called, nn.Module):
        return _module_writes(called, seen)
    if _is_trusted(called):
        return called.__name__ in _NOT_TRUSTED
    owner = called.__self__ if isinstance(called, MethodType) else None
    function: Any = called.__func__ if isinstance(called, MethodType) else called
    return not isinstance(function, FunctionType) or _function_writes(function, owner, seen)


def _is_trusted(called: Any) -> bool:
    home = (getattr(called, "__module__", None) or "").partition(".")[0]
    known = home in _TRUSTED and isinstance(called, FunctionType | type)
    return known or (isinstance(called, BuiltinFunctionType) and home in ("", *_TRUSTED))  # torch.chunk has none


def _module_writes(module: nn.Module, seen: set[Any]) -> bool:
    forward: Any = inspect.getattr_static(plain_class(type(module)), "forward")
    if getattr(module, "inplace", False) or not is_bare(module) or not isinstance(forward, FunctionType):
        return True
    if forward.__module__.startswith("torch.nn."):
        return any(_module_writes(child, seen) for child in module.children())
    return _function_writes(forward, module, seen)


def _function_writes(function: FunctionType, owner: Any, seen: set[Any]) -> bool:
    if (function, owner) in seen:
        return False
    seen.add((function, owner))
    try:
        scope = Scope(function, owner)
    except NotRewritable:
        return True
    return any(
        may_write(node, scope.meaning, seen) if isinstance(node, ast.Call) else _stores(node, scope.self_name)
        for node in ast.walk(scope.tree)
    )


def _stores(node: ast.AST, self_name: str | None) -> bool:
    """x += 1, x[0] = 1, x.data = y; not self.seen = y."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == self_name:
        return False
    stored = isinstance(node, ast.Subscript | ast.Attribute) and not isinstance(node.ctx, ast.Load)
    return stored or isinstance(node, ast.AugAssign | ast.Yield | ast.YieldFrom | ast.Await)
