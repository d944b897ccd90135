"""A method's syntax tree, and a method made from a changed tree, with the same globals, closure and decorators."""

from __future__ import annotations
import __future__

import ast
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache, lru_cache
from linecache import getlines
from types import CellType, CodeType, FunctionType
from typing import Any

__all__ = ["NotRewritable", "closure_of", "codes_within", "innermost", "read", "remake"]


class NotRewritable(Exception):
    """Why a method stays as it is."""


def innermost(method: FunctionType) -> FunctionType:
    """The function behind decorators that use functools.wraps.

    Raises:
        NotRewritable: a decorator that hides it.
    """
    while hasattr(method, "__wrapped__"):
        _cell_of(method, method.__wrapped__)
        method = method.__wrapped__
    return method


def read(function: FunctionType) -> ast.FunctionDef:
    """The definition of a function, without decorators. Not to be changed: the next reader gets the same tree.

    Raises:
        NotRewritable: there is no source, or it is not what runs.
    """
    return _read(function.__code__)


@cache
def _read(code: CodeType) -> ast.FunctionDef:
    try:
        definitions, codes = _file(code.co_filename)
    except (OSError, SyntaxError, ValueError) as error:
        raise NotRewritable("its source cannot be read") from error
    place = (code.co_name, code.co_firstlineno)
    if place not in definitions:
        raise NotRewritable("its source cannot be read")
    if codes.get(place) != code:
        raise NotRewritable("its source is not what runs")
    found = definitions[place]
    if any(_is_mangled(node) for node in ast.walk(found)):
        raise NotRewritable("it uses names with two leading underscores")
    found.decorator_list = []
    return found


@lru_cache(maxsize=8)
def _file(name: str) -> tuple[dict[tuple[str, int], ast.FunctionDef], dict[tuple[str, int], CodeType]]:
    """The functions of a file by name and first line: their definitions, and what they compile to.

    The whole file is compiled: what a name means in one function may depend on what the file imports.
    """
    tree = ast.parse("".join(getlines(name)))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    first = {node: min([node.lineno, *(part.lineno for part in node.decorator_list)]) for node in nodes}
    codes = {
        (code.co_name, code.co_firstlineno): code
        for code in codes_within(compile(tree, name, "exec", dont_inherit=True))
    }
    return {(node.name, first[node]): node for node in nodes}, codes


def codes_within(code: CodeType) -> Iterator[CodeType]:
    """Those of the functions, classes and comprehensions in it, at any depth."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from codes_within(constant)


def remake(method: FunctionType, tree: ast.FunctionDef, helpers: Mapping[str, Any]) -> FunctionType:
    """`method` with its innermost function compiled from `tree`, in which the names of `helpers` mean these values."""
    function = innermost(method)
    known = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    known |= {name: CellType(value) for name, value in helpers.items()}
    code = _compiled(tree, function.__code__, tuple(helpers))
    made = _like(function, code, tuple(known[name] for name in code.co_freevars))
    return _redecorated(method, function, made)


def _redecorated(method: FunctionType, old: FunctionType, new: FunctionType) -> FunctionType:
    """The decorators again, around the new function: the same wrappers, closed over other cells."""
    if method is old:
        return new
    inner: Any = getattr(method, "__wrapped__")  # noqa: B009
    place, made = _cell_of(method, inner), _redecorated(inner, old, new)
    cells = tuple(CellType(made) if i == place else cell for i, cell in enumerate(method.__closure__ or ()))
    wrapper = _like(method, method.__code__, cells)
    vars(wrapper)["__wrapped__"] = made
    return wrapper


def _cell_of(wrapper: Any, inner: Any) -> int:
    """Which cell of a wrapper's closure holds the function that it wraps."""
    held = closure_of(wrapper) if isinstance(wrapper, FunctionType) else {}
    names = [name for name, value in held.items() if value is inner]
    if len(names) != 1 or not isinstance(inner, FunctionType):
        raise NotRewritable("its decorator hides it")
    place: int = wrapper.__code__.co_freevars.index(names[0])
    return place


def closure_of(function: FunctionType) -> dict[str, Any]:
    """The variables of the functions around it that have a value by now."""
    filled = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # an empty one
            filled[name] = cell.cell_contents
    return filled


def _like(function: FunctionType, code: CodeType, cells: tuple[CellType, ...]) -> FunctionType:
    made = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__annotations__ = dict(function.__annotations__)
    made.__doc__, made.__module__, made.__qualname__ = function.__doc__, function.__module__, function.__qualname__
    vars(made).update(vars(function))
    return made


def _compiled(tree: ast.FunctionDef, code: CodeType, helpers: tuple[str, ...]) -> CodeType:
    """The code object of a definition, inside of a function whose variables are its free ones."""
    names = [*code.co_freevars, *helpers]
    arguments = ast.arguments(
        posonlyargs=[], args=[ast.arg(name) for name in names], kwonlyargs=[], kw_defaults=[], defaults=[]
    )
    outer = ast.FunctionDef(name="closure", args=arguments, body=[tree], decorator_list=[], lineno=1, col_offset=0)
    vars(outer)["type_params"] = []  # since Python 3.12
    module = ast.fix_missing_locations(ast.Module(body=[outer], type_ignores=[]))
    flags = code.co_flags & __future__.annotations.compiler_flag
    compiled = compile(module, code.co_filename, "exec", flags=flags, dont_inherit=True)
    return _inside(_inside(compiled, "closure"), tree.name)


def _inside(code: CodeType, name: str) -> CodeType:
    return next(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name)


def _is_mangled(node: ast.AST) -> bool:
    names = [getattr(node, field, None) for field in ("id", "attr", "arg", "name")]
    return any(isinstance(name, str) and name.startswith("__") and not name.endswith("__") for name in names)
