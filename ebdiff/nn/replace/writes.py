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
from .deferred import is_bare
from .scope import Scope
from .source import NotRewritable

__all__ = ["may_write"]

_TRUSTED = {"torch", "einops", "math", "builtins", "typing"}
_NOT_TRUSTED = {"setattr", "delattr", "exec", "eval", "next", "map", "filter", "checkpoint"}
_CONTAINERS = (Tensor, dict, list, tuple, set, str)


def may_write(call: ast.Call, meaning: Callable[[ast.expr], Any], seen: frozenset[Any] = frozenset()) -> bool:
    """May this call change a tensor in place? Where it cannot be known, it may.

    Args:
        call: it.
        meaning: what an expression names, or None (`Scope.meaning`).
        seen: what is being looked at already.
    """
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    called = meaning(call.func)
    if _is_in_place(name) or _is_in_place(getattr(called, "__name__", "")) or _asks_for_it(call, called):
        return True
    if called is None:  # a method of something local
        known = isinstance(call.func, ast.Attribute) and any(hasattr(kind, name) for kind in _CONTAINERS)
        return not known
    return _writes(called, seen)


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


def _writes(called: Any, seen: frozenset[Any]) -> bool:
    """May calling it do so?"""
    if isinstance(called, nn.Module):
        return _module_writes(called, seen)
    home = (getattr(called, "__module__", None) or "").partition(".")[0]
    if isinstance(called, BuiltinFunctionType | FunctionType | type) and (home in _TRUSTED or not home):
        return called.__name__ in _NOT_TRUSTED  # torch.chunk has no home
    if isinstance(called, MethodType):
        function: Any = called.__func__
        owner: Any = called.__self__
        return _function_writes(function, owner, seen)
    return not isinstance(called, FunctionType) or _function_writes(called, None, seen)


def _module_writes(module: nn.Module, seen: frozenset[Any]) -> bool:
    kind = plain_class(type(module))
    if getattr(module, "inplace", False) or not is_bare(module):
        return True
    if kind.__module__.partition(".")[0] == "torch":
        return any(_module_writes(child, seen) for child in module.children())
    forward = inspect.getattr_static(kind, "forward")
    return not isinstance(forward, FunctionType) or _function_writes(forward, module, seen)


def _function_writes(function: FunctionType, owner: nn.Module | None, seen: frozenset[Any]) -> bool:
    if (function, owner) in seen:
        return False
    try:
        scope = Scope(function, owner)
    except NotRewritable:
        return True
    seen |= {(function, owner)}
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
