"""Which norms of a method go to nothing but SiLU? Followed through the syntax tree, on every path it may take.

A *site* is a call ``self.norm(x)``, or an addition that may turn out to be the time embedding's. Its value is carried
through names, scale ``x * (1 + s)`` and shift ``x + s`` to an activation. Whatever else it meets lets it escape, and an
escaped site stays as it was.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from .syntax import NESTED, leaky_names, names_in, names_written, one_plus, short

__all__ = ["Flow", "Site"]


@dataclass(eq=False)
class Site:
    """A norm or an addition, and what became of its value."""

    node: ast.Call | ast.BinOp
    is_norm: bool
    escaped: str | None = None
    reached: set[ast.AST] = field(default_factory=set)  # activations of a norm; norms of an addition
    operands: set[str] = field(default_factory=set)  # names that hold what is added, also behind it

    def escape(self, why: str) -> None:
        """It is used in a way that a fused operator does not know."""
        self.escaped = self.escaped or why


Sites: TypeAlias = frozenset[Site]
NONE: Sites = frozenset()
# What each name may hold: values that nobody has used, and values that somebody has.
Names: TypeAlias = dict[str, tuple[Sites, Sites]]

_LEAVES = ast.Return | ast.Raise
_COMPREHENSIONS = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
_READS_ALL_NAMES = {"locals", "vars", "eval", "exec", "dir"}


class Flow:
    """Follows one function.

    Args:
        function: its definition.
        is_norm, is_activation: is the called expression a group normalisation, an activation?
        may_write: may a call change a tensor in place?
    """

    def __init__(
        self,
        function: ast.FunctionDef,
        is_norm: Callable[[ast.expr], bool],
        is_activation: Callable[[ast.expr], bool],
        may_write: Callable[[ast.Call], bool],
    ) -> None:
        self.is_norm, self.is_activation, self.may_write = is_norm, is_activation, may_write
        self.waiting: list[Sites] = []  # left operands, while the right one is computed
        self.loops: list[list[Names]] = []  # of each loop around: what names hold where it is left or begins again
        self.guarded: list[Names] = []  # of each try and with around: what names may hold when an exception ends it
        self.sites: dict[ast.AST, Site] = {}
        self.passed: dict[ast.AST, set[Site]] = {}  # scale, shift and activation -> the norms that pass
        self.leaky = leaky_names(function)
        self._block(function.body, {})
        added = any(site.operands for site in self.sites.values() if site.reached)
        self._settle(names_written(function, may_write) if added else set())

    def fused(self) -> set[Site]:
        """The norms that go to activations only, and the additions that go to such norms only."""
        return {site for site in self.sites.values() if site.escaped is None and site.reached}

    def _settle(self, written: set[str]) -> None:
        for site in self.sites.values():
            if not site.reached:
                site.escape("no SiLU follows")
            if site.operands & written:
                site.escape("backward needs what is added, and it may be changed in place")
        for site in self.sites.values():
            if not site.is_norm and any(self.sites[norm].escaped for norm in site.reached):
                site.escape("goes to a norm that stays as it is")

    # Statements -------------------------------------------------------------------------------------------------------

    def _block(self, body: Iterable[ast.stmt], names: Names) -> bool:
        """Follow statements; False when none of the paths goes on behind them."""
        return all(self._statement(statement, names) for statement in body)

    def _statement(self, node: ast.stmt, names: Names) -> bool:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets: list[ast.expr] = node.targets if isinstance(node, ast.Assign) else [node.target]
            if node.value is not None:
                self._assign(targets, node.value, names)
        elif isinstance(node, ast.If):
            self._use(node.test, names)
            return self._branches([node.body, node.orelse], names)
        elif isinstance(node, ast.For | ast.While):
            self._loop(node, names)
        elif isinstance(node, ast.With):
            self._with(node, names)
        elif isinstance(node, ast.Break | ast.Continue):
            self._escape_all(names, "a loop ends first")
            self.loops[-1].append(dict(names))
            return False
        elif isinstance(node, ast.Expr | ast.Assert | _LEAVES | ast.Delete):
            for part in ast.iter_child_nodes(node):
                self._use(part, names, "returned" if isinstance(node, ast.Return) else None)
            return not isinstance(node, _LEAVES)
        elif isinstance(node, ast.AugAssign):
            self._use(node.value, names)
            self._use(node.target, names)
            self._escape_all(names, "something is changed in place before SiLU")
        elif isinstance(node, ast.Try):
            self._try(node, names)
        elif isinstance(node, NESTED):
            self._value(node, names)
        elif not isinstance(node, ast.Pass | ast.Import | ast.ImportFrom | ast.Global | ast.Nonlocal):
            self._escape_all(names, f"a statement that is not followed: {type(node).__name__}")
            for part in ast.walk(node):
                if isinstance(part, ast.Call) and self.is_norm(part.func):
                    self._site(part, True).escape(f"inside of a statement that is not followed: {type(node).__name__}")
        return True

    def _assign(self, targets: list[ast.expr], value: ast.expr, names: Names) -> None:
        if len(targets) == 1 and isinstance(targets[0], ast.Name):
            held = self._value(value, names)
            if value in self.sites:
                self.sites[value].operands.discard(targets[0].id)
            if targets[0].id in self.leaky:
                self._escape(held, "a nested function may read it")
            names[targets[0].id] = (held, NONE)
            for left in self.guarded:
                _join(left, {targets[0].id: (NONE, held)})
            return
        self._use(value, names, "unpacked or stored")
        for target in targets:
            for part in ast.walk(target):
                if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                    names.pop(part.id, None)
                elif isinstance(part, ast.Name):
                    self._use(part, names)
                elif isinstance(part, ast.Subscript | ast.Attribute):
                    self._escape_all(names, "something is changed in place before SiLU")

    def _branches(self, bodies: list[list[ast.stmt]], names: Names) -> bool:
        before, after = dict(names), []
        for body in bodies:
            own = dict(before)
            if self._block(body, own):
                after.append(own)
        names.clear()
        for own in after:
            _join(names, own)
        return bool(after)

    def _loop(self, node: ast.For | ast.While, names: Names) -> None:
        self._use(node.iter if isinstance(node, ast.For) else node.test, names)
        while True:
            before, own = dict(names), dict(names)
            if isinstance(node, ast.For):
                for part in ast.walk(node.target):
                    if isinstance(part, ast.Name):
                        own.pop(part.id, None)
            else:
                self._use(node.test, own)
            self.loops.append([own])
            self._block(node.body, own)
            for left in self.loops.pop():
                _join(names, left)
            if names == before:
                break
        self._branches([node.orelse, []], names)

    def _with(self, node: ast.With, names: Names) -> None:
        """autocast and its like hold for what runs inside, so nothing is carried in or out."""
        why = "SiLU is on the other side of a with statement"
        for item in node.items:
            self._use(item.context_expr, names)
        self._escape_all(names, why)
        self.guarded.append({})
        self._block(node.body, names)
        self._escape_all(names, why)
        left = self.guarded.pop()
        if not all(self._lets_through(item.context_expr) for item in node.items):
            _join(names, left)

    def _lets_through(self, manager: ast.expr) -> bool:
        """Exceptions: torch's managers do, contextlib.suppress does not."""
        return isinstance(manager, ast.Call) and not self.may_write(manager)

    def _try(self, node: ast.Try, names: Names) -> None:
        why = "SiLU is on the other side of a try statement"
        self._escape_all(names, why)
        self.guarded.append({})
        for body in (node.body, *(handler.body for handler in node.handlers), node.orelse, node.finalbody):
            own = dict(names)
            self._block(body, own)
            self._escape_all(own, why)
            _join(names, own)
            _join(names, self.guarded[-1])
        self.guarded.pop()

    # Expressions ------------------------------------------------------------------------------------------------------

    def _value(self, node: ast.AST, names: Names) -> Sites:
        """The sites whose value this may be; everything else in it is used."""
        if isinstance(node, ast.Name):
            fresh, used = names.get(node.id, (NONE, NONE))
            self._escape(used, "used more than once")
            names[node.id] = (NONE, fresh | used)
            return fresh
        if isinstance(node, ast.Call):
            return self._call(node, names)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
            return self._sum(node, names) if isinstance(node.op, ast.Add) else self._product(node, names)
        if isinstance(node, ast.IfExp):
            self._use(node.test, names)
            other = dict(names)
            found = self._value(node.body, names) | self._value(node.orelse, other)
            _join(names, other)
            return found
        if isinstance(node, _COMPREHENSIONS | NESTED):
            for part in ast.walk(node):
                if isinstance(part, ast.Name):
                    self._escape(names.get(part.id, (NONE, NONE))[0], "used in a nested scope")
                elif isinstance(part, ast.Call):
                    self._run(part, names)
                    if self.is_norm(part.func):
                        self._site(part, True).escape("called in a nested scope")
            return NONE
        for part in ast.iter_child_nodes(node):
            self._use(part, names)
        if isinstance(node, ast.Yield | ast.YieldFrom | ast.Await):
            self._escape_all(names, "the method is left and entered again before SiLU")
        return NONE

    def _call(self, node: ast.Call, names: Names) -> Sites:
        if len(node.args) == 1 and not node.keywords and not isinstance(node.args[0], ast.Starred):
            if self.is_norm(node.func):
                for site in self._value(node.args[0], names):
                    site.escape("goes to another norm") if site.is_norm else site.reached.add(node)
                return frozenset({self._site(node, True)})
            if self.is_activation(node.func):
                for site in self._pass(node, self._value(node.args[0], names)):
                    site.reached.add(node)
                self._run(node, names)
                return NONE
        elif self.is_norm(node.func):
            self._site(node, True).escape("called with more than one argument")
        for part in ast.iter_child_nodes(node):
            self._use(part, names, f"goes to {short(node.func)}(...), not to SiLU")
        self._run(node, names)
        if isinstance(node.func, ast.Name) and node.func.id in _READS_ALL_NAMES:
            self._escape_all(names, f"{node.func.id}() may read it")
        return NONE

    def _run(self, node: ast.Call, names: Names) -> None:
        """While this call runs, values wait that are computed later, from tensors that it must leave alone."""
        waits = any(site.escaped is None for sites in self._waiting(names) for site in sites)
        if waits and self.may_write(node):
            self._escape_all(names, f"{short(node.func)}(...) may change its input in place before SiLU")

    def _pair(self, left: ast.expr, right: ast.expr, names: Names) -> tuple[Sites, Sites]:
        first = self._value(left, names)
        self.waiting.append(first)
        second = self._value(right, names)
        self.waiting.pop()
        return first, second

    def _sum(self, node: ast.BinOp, names: Names) -> Sites:
        left, right = self._pair(node.left, node.right, names)
        norms = {site for site in left | right if site.is_norm}
        for site in (left | right) - norms:
            site.escape("a sum of three")
        if not norms:
            return frozenset({self._site(node, False)})
        if any(site.is_norm for site in left) and any(site.is_norm for site in right):
            self._escape(norms, "added to another norm")
        return self._pass(node, frozenset(norms))

    def _product(self, node: ast.BinOp, names: Names) -> Sites:
        left, right = one_plus(node.left), one_plus(node.right)
        if (left is None) == (right is None):
            for part in (node.left, node.right):
                self._use(part, names, "multiplied by something other than 1 + scale")
            return NONE
        found = self._pair(left or node.left, right or node.right, names)
        carried, factor = found if left is None else found[::-1]
        self._escape(factor, "used as a scale")
        return self._pass(node, carried)

    def _use(self, node: ast.AST, names: Names, why: str | None = None) -> None:
        self._escape(self._value(node, names), why or "used for something other than SiLU")

    # Sites ------------------------------------------------------------------------------------------------------------

    def _site(self, node: ast.Call | ast.BinOp, is_norm: bool) -> Site:
        if node not in self.sites:
            self.sites[node] = Site(node, is_norm, operands=set() if is_norm else names_in(node))
        return self.sites[node]

    def _pass(self, node: ast.AST, sites: Sites) -> Sites:
        """Norms go on; sums do not."""
        self._escape((site for site in sites if not site.is_norm), "no norm follows")
        norms = frozenset(site for site in sites if site.is_norm)
        self.passed.setdefault(node, set()).update(norms)
        return norms

    def _escape(self, sites: Iterable[Site], why: str) -> None:
        for site in sites:
            site.escape(why)

    def _waiting(self, names: Names) -> list[Sites]:
        return [*(fresh for fresh, _ in names.values()), *self.waiting]

    def _escape_all(self, names: Names, why: str) -> None:
        for sites in self._waiting(names):
            self._escape(sites, why)


def _join(names: Names, other: Names) -> None:
    for name, (fresh, used) in other.items():
        held = names.get(name, (NONE, NONE))
        names[name] = (held[0] | fresh, held[1] | used)
