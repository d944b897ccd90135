"""What an expression in a function names, as far as that is known before the function runs."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Mapping
from contextlib import suppress
from inspect import getattr_static
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

from .classes import plain_class
from .source import closure_of, read

__all__ = ["Scope"]


class Scope:
    """Names and attributes, as one function sees them.

    Args:
        function: one whose source can be read.
        owner: the module whose method it is; None for a function that is no method.

    Attributes:
        tree: its definition.
        self_name: what it calls the owner; None where that name may come to mean something else.

    Raises:
        NotRewritable: its source cannot be read.
    """

    def __init__(self, function: FunctionType, owner: nn.Module | None) -> None:
        code = function.__code__
        self.tree, self.owner = read(function), owner
        self._local = {*code.co_varnames, *code.co_cellvars}
        self._outer: tuple[Mapping[str, Any], ...] = (closure_of(function), function.__globals__, vars(builtins))
        first = code.co_varnames[0] if owner is not None and code.co_argcount else None
        self.self_name = None if any(_assigns(node, first) for node in ast.walk(self.tree)) else first

    def meaning(self, node: ast.expr) -> Any:
        """The module, method or function that an expression names; None where that is not known."""
        if isinstance(node, ast.Name):
            return self._named(node.id)
        if isinstance(node, ast.Attribute):
            return _attribute(self.meaning(node.value), node.attr)
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant | ast.UnaryOp):
            base = self.meaning(node.value)
            children = list(base) if isinstance(base, nn.Sequential | nn.ModuleList) else []
            with suppress(ValueError, IndexError, TypeError):
                return children[ast.literal_eval(node.slice)]
        return None

    def _named(self, name: str) -> Any:
        if name == self.self_name:
            return self.owner
        if name in self._local:
            return None
        return next((names[name] for names in self._outer if name in names), None)


def _attribute(base: Any, name: str) -> Any:
    if isinstance(base, nn.Module):
        found = base._modules.get(name, vars(base).get(name))
        method = getattr_static(plain_class(type(base)), name, None) if found is None else None
        return MethodType(method, base) if isinstance(method, FunctionType) else found
    return getattr(base, name, None) if isinstance(base, ModuleType) else None


def _assigns(node: ast.AST, name: str | None) -> bool:
    return isinstance(node, ast.Name) and node.id == name and not isinstance(node.ctx, ast.Load)
