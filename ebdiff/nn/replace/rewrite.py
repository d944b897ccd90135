"""Classes whose methods run norm and SiLU as one operator: subclasses made from a class's own source.

No forward is written again by hand, so a new release of a library cannot make one wrong: what is rewritten is the
source that is installed, and what is not provably the pattern stays as it is.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from inspect import getattr_static
from itertools import pairwise
from types import FunctionType
from typing import Any

from torch import nn

from .classes import fused_class, plain_class
from .deferred import activated, dense, divided, normalised, run_in_order, scaled, shifted, summed
from .flow import Flow, Site
from .known import is_silu, learn, norm_settings
from .scope import Scope
from .source import NotRewritable, codes_within, innermost, read, remake
from .syntax import made_contiguous, one_plus, sums_divided
from .writes import may_write

__all__ = ["Rewriting", "cuts", "reclass", "rewriting_of"]

_HELPERS = (activated, dense, divided, normalised, scaled, shifted, summed)
_IN_ORDER: Any = (("forward", run_in_order),)


@dataclass(frozen=True)
class Rewriting:
    """What can be done for one module.

    Args:
        kind: the class to give it; its own where nothing can be done.
        fused: {its norm that becomes one with SiLU, as it is called: "norm1", "0"; the activations it goes to}.
        left: those that do not, and why.
        modulated: those of `fused` with scale or shift in between, which every call looks at.
    """

    kind: type
    fused: dict[str, tuple[Any, ...]]
    left: dict[str, str]
    modulated: frozenset[str] = frozenset()


def reclass(module: nn.Module, kind: type) -> None:
    """Give a module another class; what is accelerated stays so."""
    accelerated = plain_class(type(module)) is not type(module)
    module.__class__ = kind
    if accelerated:
        module.__class__ = rewriting_of(module).kind


def rewriting_of(module: nn.Module) -> Rewriting:
    """Look at a module's own methods, as its class defines them."""
    kind = plain_class(type(module))
    if getattr(kind, "forward", None) is nn.Sequential.forward:
        return _of_sequential(module, kind)
    replaced: dict[str, FunctionType] = {}
    fused: dict[str, tuple[Any, ...]] = {}
    left: dict[str, str] = {}
    modulated: set[str] = set()
    known = _with_norms(module)
    for name, method in _methods(kind) if known else ():
        mentioned = known & _names_in(method)
        if not mentioned:
            continue
        try:
            found = _Reading(module, innermost(method))
        except NotRewritable as why:
            left |= {child: f"used in {kind.__name__}.{name}, but {why}" for child in mentioned}
            continue
        left |= found.left()
        if found.edits:
            replaced[name] = _rewritten(method, frozenset(found.edits.items()), found.scope.self_name)
            for path, acts in found.fused.items():
                fused[path] = (*fused.get(path, ()), *acts)
            modulated |= found.modulated
    return _made(Rewriting(kind, dict(sorted(fused.items())), left, frozenset(modulated)), tuple(replaced.items()))


def _made(found: Rewriting, methods: tuple[tuple[str, FunctionType], ...]) -> Rewriting:
    """What was found, with the class for it, where there is anything and the class lets itself be subclassed."""
    left = {path: why for path, why in found.left.items() if path not in found.fused}
    if not methods:
        return replace(found, left=left)
    try:
        return replace(found, kind=fused_class(found.kind, methods), left=left)
    except Exception as why:  # whatever its __init_subclass__ or metaclass raises
        refused = f"{found.kind.__name__} refuses a subclass: {type(why).__name__}: {why}"
        return Rewriting(found.kind, {}, left | dict.fromkeys(found.fused, refused))


def _of_sequential(module: nn.Module, kind: type) -> Rewriting:
    children = list(module._modules.items())
    fused: dict[str, tuple[Any, ...]] = {}
    left: dict[str, str] = {}
    for (name, child), (_, following) in pairwise([*children, ("", None)]):
        if norm_settings(child) is not None:
            if is_silu(following):
                fused[name] = (following,)
            else:
                left[name] = f"followed by {type(following).__name__}, not SiLU" if following else "no SiLU follows"
    if any("__new__" in vars(base) for base in kind.__mro__[:-1]):  # FSDP's counts on its place among the bases
        left |= dict.fromkeys(fused, f"{kind.__name__} makes its slices itself; accelerate before it is wrapped")
        fused = {}
    return _made(Rewriting(kind, fused, left), _IN_ORDER if fused else ())


def cuts(parent: nn.Module, name: str) -> dict[int, str]:
    """Where the methods of a module take its Sequential `name` apart: {n: method}, between modules n - 1 and n."""
    sequential = parent._modules[name]
    assert isinstance(sequential, nn.Sequential)
    found: dict[int, str] = {}
    kind = plain_class(type(parent))
    for method_name, method in _methods(kind):
        if name not in _names_in(method):
            continue
        with suppress(NotRewritable):
            for node in ast.walk(read(innermost(method))):
                for place in _cut_by(node, f"self.{name}", len(sequential)):
                    found[place] = f"{kind.__name__}.{method_name}"
    return found


def _cut_by(node: ast.AST, text: str, length: int) -> Iterator[int]:
    """self.layers[i], self.layers[i:j], for layer in self.layers."""
    if isinstance(node, ast.For | ast.comprehension) and text in map(ast.unparse, ast.walk(node.iter)):
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
        scope: what the function's expressions mean.
        fused: {the norm that can become one with SiLU: the activations it goes to}.
        modulated: those of them with scale or shift in between.
        edits: {node of the function's syntax tree: the helper that takes its place, and its first argument, if any}.

    Raises:
        NotRewritable: its source cannot be read.
    """

    def __init__(self, module: nn.Module, function: FunctionType) -> None:
        self.scope = Scope(function, module)
        if self.scope.self_name is None:
            raise NotRewritable("it has no name for the module that stays")
        self.names = {id(child): name for name, child in module.named_modules() if name}
        self.flow = Flow(self.scope.tree, self._is_norm, self._is_activation, self._may_write)
        fused = self.flow.fused()
        norms = {site for site in fused if site.is_norm}
        passed = {node: sites & norms for node, sites in self.flow.passed.items() if sites & norms}
        self.fused: dict[str, tuple[Any, ...]] = {}
        for site in norms:
            acts = (self.scope.meaning(node.func) for node in site.reached if isinstance(node, ast.Call))
            self.fused[self._path(site)] = (*self.fused.get(self._path(site), ()), *acts)
        between = set[Site]().union(*(sites for node, sites in passed.items() if isinstance(node, ast.BinOp)))
        self.modulated = {self._path(site) for site in between}
        self.edits: dict[ast.AST, str] = {s.node: "normalised" if s.is_norm else "summed" for s in fused}
        self.edits |= {node: _helper_for(node) for node in passed}
        if self.edits:
            self.edits |= dict.fromkeys(sums_divided(self.scope.tree), "divided")
            meant = made_contiguous(self.scope.tree, self._is_convolution)
            self.edits |= {call: f"dense {ast.unparse(conv)}" for call, conv in meant}

    def left(self) -> dict[str, str]:
        """The norms that stay, and why."""
        return {self._path(s): s.escaped for s in self.flow.sites.values() if s.is_norm and s.escaped}

    def _path(self, site: Site) -> str:
        """self.norms[-1](x) -> "norms.1"."""
        assert isinstance(site.node, ast.Call)
        name: str = self.names[id(self.scope.meaning(site.node.func))]
        return name

    def _is_norm(self, called: ast.expr) -> bool:
        meant = self.scope.meaning(called)
        return id(meant) in self.names and norm_settings(meant) is not None

    def _is_activation(self, called: ast.expr) -> bool:
        meant = self.scope.meaning(called)
        learn(meant)
        return is_silu(meant)

    def _is_convolution(self, called: ast.expr) -> bool:
        return isinstance(self.scope.meaning(called), nn.Conv2d)

    def _may_write(self, call: ast.Call) -> bool:
        return may_write(call, self.scope.meaning)


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


def _with_norms(module: nn.Module) -> set[str]:
    """The children with norms in them."""
    return {name for name, child in module.named_children() if any(norm_settings(m) for m in child.modules())}


def _names_in(method: Any) -> set[str]:
    """The attributes and globals that a method's code names, in nested functions and behind decorators too."""
    code = getattr(method, "__code__", None)
    names = {name for part in (code, *codes_within(code)) for name in part.co_names} if code else set()
    return names | _names_in(method.__wrapped__) if hasattr(method, "__wrapped__") else names


# Making classes -------------------------------------------------------------------------------------------------------


@cache
def _rewritten(method: FunctionType, edits: frozenset[tuple[ast.AST, str]], owner: str) -> FunctionType:
    memo: dict[int, Any] = {}
    tree = copy.deepcopy(read(innermost(method)), memo)
    tree = _Rewriter({memo[id(node)]: helper for node, helper in edits}, owner).visit(tree)
    helpers = {f"_ebdiff_{helper.__name__}": helper for helper in _HELPERS}
    return remake(method, ast.fix_missing_locations(tree), helpers)


class _Rewriter(ast.NodeTransformer):
    def __init__(self, edits: dict[ast.AST, str], owner: str) -> None:
        self.edits, self.owner = edits, owner

    def visit(self, node: ast.AST) -> Any:
        """Operands first."""
        helper = self.edits.get(node)
        self.generic_visit(node)
        return node if helper is None else ast.copy_location(_call(helper, node, self.owner), node)


def _call(helper: str, node: ast.AST, owner: str) -> ast.Call:
    """helper(operands), in the order in which the original evaluates them."""
    helper, _, given = helper.partition(" ")
    name = ast.Name(f"_ebdiff_{helper}", ast.Load())
    if isinstance(node, ast.Call):
        if helper == "dense":
            assert isinstance(node.func, ast.Attribute)
            return ast.Call(name, [ast.parse(given, mode="eval").body, node.func.value], [])
        first = [ast.Name(owner, ast.Load())] if helper == "normalised" else []
        return ast.Call(name, [*first, node.func, *node.args], [])
    assert isinstance(node, ast.BinOp)
    operands = [node.left, node.right]
    if helper != "scaled":
        return ast.Call(name, operands, [])
    scales = [one_plus(operand) for operand in operands]
    pairs = zip(operands, scales, strict=True)
    keywords = [ast.keyword("x", o) if scale is None else ast.keyword("scale", scale) for o, scale in pairs]
    return ast.Call(name, [], keywords)
