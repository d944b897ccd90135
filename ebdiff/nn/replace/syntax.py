"""Questions to a function's syntax tree that need no following of values."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from itertools import pairwise

__all__ = [
    "NESTED",
    "leaky_names",
    "made_contiguous",
    "names_in",
    "names_written",
    "one_plus",
    "short",
    "sums_divided",
]

NESTED = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda


def one_plus(node: ast.expr) -> ast.expr | None:
    """s, if this is 1 + s or s + 1."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        for one, other in ((node.left, node.right), (node.right, node.left)):
            if isinstance(one, ast.Constant) and type(one.value) in (int, float) and one.value == 1:
                return other
    return None


def sums_divided(function: ast.FunctionDef) -> Iterator[ast.BinOp]:
    """Every (a + b) / c: a sum that nothing else can hold."""
    for node in ast.walk(function):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            total = node.left
            if isinstance(total, ast.BinOp) and isinstance(total.op, ast.Add):
                yield node


def made_contiguous(
    function: ast.FunctionDef, is_meant: Callable[[ast.expr], bool]
) -> Iterator[tuple[ast.Call, ast.expr]]:
    """Every (x.contiguous(), self.conv) of ``x = x.contiguous()``, in an if or not, and then ``x = self.conv(x)``."""
    for node in ast.walk(function):
        for field in ("body", "orelse", "finalbody"):
            body = getattr(node, field, None)
            for first, then in pairwise(body if isinstance(body, list) else []):
                if isinstance(first, ast.If) and len(first.body) == 1 and not first.orelse:
                    first = first.body[0]
                name, call = _own_call(first)
                again, use = _own_call(then)
                if call is None or use is None or name != again:
                    continue
                passes = len(use.args) == 1 and isinstance(use.args[0], ast.Name) and use.args[0].id == name
                if ast.unparse(call) == f"{name}.contiguous()" and passes and not use.keywords and is_meant(use.func):
                    yield call, use.func


def _own_call(node: ast.stmt) -> tuple[str, ast.Call | None]:
    """(name, call) of ``name = call``."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id, node.value if isinstance(node.value, ast.Call) else None
    return "", None


def leaky_names(function: ast.FunctionDef) -> set[str]:
    """Names that functions inside of this one, or outside, may read."""
    inner = [node for node in ast.walk(function) if isinstance(node, NESTED) and node is not function]
    names = {part.id for node in inner for part in ast.walk(node) if isinstance(part, ast.Name)}
    for node in ast.walk(function):
        if isinstance(node, ast.Global | ast.Nonlocal):
            names.update(node.names)
    return names


def short(node: ast.AST) -> str:
    """Its source, in less than 40 characters."""
    text = ast.unparse(node)
    return text if len(text) < 40 else text[:37] + "..."


def names_in(node: ast.AST) -> set[str]:
    """The names whose memory the value may share: not those that are only arguments of a call."""
    if isinstance(node, ast.Call):
        return names_in(node.func.value) if isinstance(node.func, ast.Attribute) else set()
    found = {node.id} if isinstance(node, ast.Name) else set()
    return found.union(*map(names_in, ast.iter_child_nodes(node)))


def names_written(function: ast.FunctionDef, may_write: Callable[[ast.Call], bool]) -> set[str]:
    """The names whose values are, or may be, changed in place anywhere in a function."""
    found: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.AugAssign):
            found |= names_in(node.target)
        elif isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found |= names_in(node)
        elif isinstance(node, ast.Call) and may_write(node):
            found = found.union(names_in(node), *map(names_in, node.args), *(names_in(k.value) for k in node.keywords))
    return found
