"""Classes whose methods run norm and SiLU as one operator: subclasses made from a class's own source.

No forward is written again by hand, so a new release of a library cannot make one wrong: what is rewritten is the
source that is installed, and what is not provably the pattern stays as it is.
"""

from __future__ import annotations

import ast
import copy
import types
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from inspect import getattr_static
from itertools import pairwise
from types import FunctionType, ModuleType
from typing import Any

from torch import nn

from .deferred import activated, is_silu, learn, norm_settings, normalised, run_in_order, scaled, shifted, summed
from .flow import Flow, one_plus
from .source import NotRewritable, innermost, read, remake

__all__ = ["Rewriting", "cuts", "plain_class", "rewriting_of"]

_PLAIN = "_ebdiff_plain"
_HELPERS = (activated, normalised, scaled, shifted, summed)


@dataclass(frozen=True)
class Rewriting:
    """What can be done for one module.

    Args:
        kind: the class to give it; its own where nothing can be done.
        fused: its norms that become one with SiLU, as they are called: "norm1", "0".
        left: those that do not, and why.
    """

    kind: type
    fused: tuple[str, ...]
    left: dict[str, str]


def plain_class(kind: type) -> type:
    """The class that `rewriting_of` started from."""
    found: type = vars(kind).get(_PLAIN, kind)
    return found


def rewriting_of(module: nn.Module) -> Rewriting:
    """Look at a module's own methods, as its class defines them."""
    kind = plain_class(type(module))
    if getattr(kind, "forward", None) is nn.Sequential.forward:
        return _of_sequential(module, kind)
    replaced: dict[str, FunctionType] = {}
    fused: set[str] = set()
    left: dict[str, str] = {}
    for name, method in _methods(kind):
        mentioned = _mentioned(module, method)
        if not mentioned:
            continue
        try:
            found = _Reading(module, innermost(method))
        except NotRewritable as why:
            left |= {child: f"called in {kind.__name__}.{name}, but {why}" for child in mentioned}
            continue
        left |= found.left()
        if found.edits:
            replaced[name] = _rewritten(method, frozenset(found.edits.items()))
            fused |= found.fused
    made = _subclass(kind, tuple(replaced.items())) if replaced else kind
    return Rewriting(made, tuple(sorted(fused)), {path: why for path, why in left.items() if path not in fused})


def _of_sequential(module: nn.Module, kind: type) -> Rewriting:
    children = list(module._modules.items())
    fused, left = [], {}
    for (name, child), (_, following) in pairwise([*children, ("", None)]):
        if norm_settings(child) is not None:
            if is_silu(following):
                fused.append(name)
            else:
                left[name] = f"followed by {type(following).__name__}, not SiLU" if following else "no SiLU follows"
    return Rewriting(_subclass(kind, (("forward", run_in_order),)) if fused else kind, tuple(fused), left)


def cuts(parent: nn.Module, name: str) -> dict[int, str]:
    """Where the methods of a module take its Sequential `name` apart: {n: method}, between modules n - 1 and n."""
    sequential = parent._modules[name]
    assert isinstance(sequential, nn.Sequential)
    found: dict[int, str] = {}
    for method_name, method in _methods(plain_class(type(parent))):
        if name not in _mentioned(parent, method):
            continue
        with suppress(NotRewritable):
            for node in ast.walk(read(innermost(method))):
                for place in _cut_by(node, f"self.{name}", len(sequential)):
                    found[place] = f"{plain_class(type(parent)).__name__}.{method_name}"
    return found


def _cut_by(node: ast.AST, text: str, length: int) -> Iterator[int]:
    """self.layers[i], self.layers[i:j], for layer in self.layers."""
    if isinstance(node, ast.For | ast.comprehension) and text in ast.unparse(node.iter):
        yield from range(length)
    elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == text:
        index = ast.unparse(node.slice)
        with suppress(ValueError, SyntaxError):
            if isinstance(node.slice, ast.Slice):
                yield from (int(bound) % length for bound in index.split(":") if bound)
            else:
                yield from (int(index) % length, int(index) % length + 1)


# A method, seen from an instance --------------------------------------------------------------------------------------


class _Reading:
    """Which expressions of a function are norms and activations is known from the module that it is a method of.

    Attributes:
        fused: the norms that can become one with SiLU.
        edits: {node of the function's syntax tree: the helper that takes its place}.
    """

    def __init__(self, module: nn.Module, function: FunctionType) -> None:
        self.module, self.function = module, function
        self.tree = read(function)
        self.local = set(function.__code__.co_varnames) | set(function.__code__.co_cellvars)
        self.flow = Flow(self.tree, lambda e: norm_settings(self._meant(e)) is not None, self._is_activation)
        fused = self.flow.fused()
        norms = {site for site in fused if site.is_norm}
        self.fused = {_path(site.node) for site in norms}
        self.edits: dict[ast.AST, str] = {s.node: "normalised" if s.is_norm else "summed" for s in fused}
        self.edits |= {node: _helper_for(node) for node, sites in self.flow.passed.items() if sites & norms}

    def left(self) -> dict[str, str]:
        """The norms that stay, and why."""
        return {_path(s.node): s.escaped for s in self.flow.sites.values() if s.is_norm and s.escaped}

    def _is_activation(self, called: ast.expr) -> bool:
        meant = self._meant(called)
        learn(meant)
        return is_silu(meant)

    def _meant(self, node: ast.expr) -> Any:
        """The module or function that an expression names, or None."""
        arguments = self.function.__code__.co_varnames
        if isinstance(node, ast.Name):
            if arguments and node.id == arguments[0]:
                return self.module
            return None if node.id in self.local else _outer(self.function).get(node.id)
        if isinstance(node, ast.Attribute):
            base = self._meant(node.value)
            if isinstance(base, nn.Module):
                return base._modules.get(node.attr, vars(base).get(node.attr))
            return getattr(base, node.attr, None) if isinstance(base, ModuleType) else None
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant | ast.UnaryOp):
            base = self._meant(node.value)
            children = list(base) if isinstance(base, nn.Sequential | nn.ModuleList) else []
            with suppress(ValueError, IndexError, TypeError):
                return children[ast.literal_eval(node.slice)]
        return None


def _outer(function: FunctionType) -> dict[str, Any]:
    """What a function sees outside of itself."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    filled = {}
    for name, cell in cells:
        with suppress(ValueError):  # one that is still empty
            filled[name] = cell.cell_contents
    return {**function.__globals__, **filled}


def _path(node: ast.AST) -> str:
    """self.norms[0](x) -> "norms.0"."""
    assert isinstance(node, ast.Call)
    _, _, path = ast.unparse(node.func).partition(".")
    return path.replace("[", ".").replace("]", "")


def _helper_for(node: ast.AST) -> str:
    if isinstance(node, ast.BinOp):
        return "shifted" if isinstance(node.op, ast.Add) else "scaled"
    return "activated"


def _methods(kind: type) -> Iterator[tuple[str, FunctionType]]:
    """The methods of a class that somebody wrote for it."""
    written = [base for base in kind.__mro__ if base is not nn.Module and issubclass(base, nn.Module)]
    for name in {name for base in written for name in vars(base)}:
        method = getattr_static(kind, name)  # a static method is none
        if isinstance(method, FunctionType) and not (name.startswith("__") and name.endswith("__")):
            yield name, method


def _mentioned(module: nn.Module, method: FunctionType) -> set[str]:
    """The children with norms in them that a method's code names."""
    known = {name for name, child in module.named_children() if any(norm_settings(m) for m in child.modules())}
    names = set(method.__code__.co_names)
    while hasattr(method, "__wrapped__"):
        method = method.__wrapped__
        names |= set(getattr(method, "__code__", _mentioned.__code__).co_names)
    return known & names


# Making classes -------------------------------------------------------------------------------------------------------


@cache
def _rewritten(method: FunctionType, edits: frozenset[tuple[ast.AST, str]]) -> FunctionType:
    memo: dict[int, Any] = {}
    tree = copy.deepcopy(read(innermost(method)), memo)
    tree = _Rewriter({memo[id(node)]: helper for node, helper in edits}).visit(tree)
    helpers = {f"_ebdiff_{helper.__name__}": helper for helper in _HELPERS}
    return remake(method, ast.fix_missing_locations(tree), helpers)


class _Rewriter(ast.NodeTransformer):
    def __init__(self, edits: dict[ast.AST, str]) -> None:
        self.edits = edits

    def visit(self, node: ast.AST) -> Any:
        """Operands first."""
        helper = self.edits.get(node)
        self.generic_visit(node)
        return node if helper is None else ast.copy_location(_call(helper, node), node)


def _call(helper: str, node: ast.AST) -> ast.Call:
    """helper(operands), in the order in which the original evaluates them."""
    name = ast.Name(f"_ebdiff_{helper}", ast.Load())
    if isinstance(node, ast.Call):
        return ast.Call(name, [node.func, *node.args], [])
    assert isinstance(node, ast.BinOp)
    operands = [node.left, node.right]
    if helper != "scaled":
        return ast.Call(name, operands, [])
    scales = [one_plus(operand) for operand in operands]
    pairs = zip(operands, scales, strict=True)
    keywords = [ast.keyword("x", o) if scale is None else ast.keyword("scale", scale) for o, scale in pairs]
    return ast.Call(name, [], keywords)


@cache
def _subclass(kind: type, methods: tuple[tuple[str, FunctionType], ...]) -> type:
    """The fused class. It goes by the name of the plain one, which libraries write into files and look up."""
    body = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__deepcopy__": getattr(kind, "__deepcopy__", _deepcopy),
        "__reduce_ex__": _reduce,
        _PLAIN: kind,
    }
    return types.new_class(kind.__name__, (kind,), exec_body=lambda names: names.update(body | dict(methods)))


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    twin = object.__new__(type(self))
    memo[id(self)] = twin
    twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
    return twin


def _reduce(self: Any, protocol: Any) -> Any:
    """Pickled as the plain class, which can be found by its name."""
    made: Any = object.__new__
    return made, (plain_class(type(self)),), self.__getstate__()
