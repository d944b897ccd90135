"""SiLU and float32 group norms as many repositories write them themselves, recognised by their source."""

from __future__ import annotations

import ast
from types import FunctionType
from typing import Any

import torch
from torch import nn

from .source import NotRewritable, read

__all__ = ["is_silu_written_out", "is_widened_norm"]


def is_silu_written_out(act: Any) -> bool:
    """Is it a function, or a module whose forward is one, that returns x * sigmoid(x) and does nothing else?"""
    function = getattr(type(act), "forward", None) if isinstance(act, nn.Module) else act
    if "sigmoid" not in getattr(getattr(function, "__code__", None), "co_names", ()):
        return False
    found = _returned(function, 2 if isinstance(act, nn.Module) else 1)
    if found is None:
        return False
    x, value, names = found
    if not isinstance(value, ast.BinOp) or not isinstance(value.op, ast.Mult):
        return False
    factors = [ast.unparse(value.left), ast.unparse(value.right)]
    return x in factors and any(factor == f"{x}.sigmoid()" or _is_sigmoid_of(x, factor, names) for factor in factors)


def is_widened_norm(kind: type) -> bool:
    """Is it an nn.GroupNorm that computes in float32 and returns x's dtype, and does nothing else?"""
    bases = [base for base in kind.__mro__ if "forward" in vars(base)]
    if bases[1:2] != [nn.GroupNorm]:
        return False
    found = _returned(vars(bases[0])["forward"], 2)
    if found is None:
        return False
    x, value, _ = found
    back = (f".type({x}.dtype)", f".to({x}.dtype)", f".type_as({x})", f".to(dtype={x}.dtype)")
    return ast.unparse(value) in {f"super().forward({x}.float()){cast}" for cast in back}


def _returned(function: Any, arguments: int) -> tuple[str, ast.expr, dict[str, Any]] | None:
    """The last argument's name, what the function returns, if that is all it does, and the names it can see."""
    if not isinstance(function, FunctionType) or function.__code__.co_argcount != arguments:
        return None
    try:
        body = read(function).body
    except NotRewritable:
        return None
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    if len(body) != 1 or not isinstance(body[0], ast.Return) or body[0].value is None:
        return None
    return function.__code__.co_varnames[arguments - 1], body[0].value, function.__globals__


def _is_sigmoid_of(x: str, text: str, names: dict[str, Any]) -> bool:
    """torch.sigmoid(x), by whatever name torch has been imported."""
    called, _, argument = text.partition("(")
    base, _, attribute = called.rpartition(".")
    known = (torch.sigmoid, nn.functional.sigmoid)
    if argument != f"{x})":
        return False
    if base in ("nn.functional", "torch.nn.functional"):
        return attribute == "sigmoid"
    return (getattr(names.get(base), attribute, None) if base else names.get(called)) in known
