"""What each ATen op does to axes. An op without a rule here freezes the axes it touches, by name.

A rule is ``rule(tracer, func, args, kwargs, out)`` and labels the outputs; `@rule` files it under its ops' names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .axes import UNIT, Atom, Axis, freeze, size, unify

if TYPE_CHECKING:
    from .trace import Tracer

__all__ = ["meet", "rule", "rule_for", "tensors_in", "unknown"]

Rule = Callable[["Tracer", Any, tuple[Any, ...], dict[str, Any], Any], None]
_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """File a rule under the names of ATen ops, overloads left out ("add", "native_group_norm")."""

    def file(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return file


def rule_for(func: Any) -> Rule:
    """The rule of an op: its own, else the pointwise one where ATen tags it so, else freezing."""
    name = func._schema.name.removeprefix("aten::")
    found = _RULES.get(name) or _RULES.get(name.removesuffix("_"))
    return found or (_pointwise if torch.Tag.pointwise in func.tags else unknown)


def tensors_in(args: Any) -> list[Tensor]:
    """Every tensor among nested arguments or outputs."""
    if isinstance(args, Tensor):
        return [args]
    if isinstance(args, dict):
        args = list(args.values())
    return [t for arg in args for t in tensors_in(arg)] if isinstance(args, list | tuple) else []


def unknown(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Freeze all that an op touches, naming it."""
    if not tensors_in([out]):
        return  # asks for a device or a size
    reason = f"{func._schema.name.removeprefix('aten::')} in {tr.where()} has no rule"
    for tensor in tensors_in([args, kwargs]):
        for axis in tr.axes(tensor):
            freeze(axis, reason)
    for tensor in tensors_in([out]):
        if not tr.is_labelled(tensor):  # in-place ops return what they were given
            tr.label(tensor, tr.fixed(tensor, reason))


# Elementwise ----------------------------------------------------------------------------------------------------------


def _pointwise(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Broadcast, aligned at the last dimension; axes that meet are one."""
    tensors = tensors_in([args, kwargs])
    inputs = [tr.axes(tensor) for tensor in tensors]
    for tensor in tensors_in([out]):
        tr.label(tensor, [meet(inputs, tensor.dim() - i, n) for i, n in enumerate(tensor.shape)])
    if func._schema.name.startswith("aten::add") and len({tensor.shape for tensor in tensors}) == 1 < len(tensors):
        tr.statistics.added(inputs[0])


rule("_prelu_kernel")(_pointwise)


def meet(inputs: list[list[Axis]], from_end: int, length: int) -> Axis:
    """Unite the axes that lie `from_end` dimensions from the end and are not broadcast."""
    found = [axes[-from_end] for axes in inputs if len(axes) >= from_end and size(axes[-from_end]) == length]
    for other in found[1:]:
        unify(found[0], other)
    return found[0] if found else UNIT


@rule(
    "clone",
    "detach",
    "alias",
    "_to_copy",
    "contiguous",
    "lift_fresh",
    "dropout",
    "native_dropout",
    "bernoulli",
    "_conj",
)
@rule(
    "zeros_like", "ones_like", "empty_like", "rand_like", "randn_like", "full_like", "fill", "zero", "normal", "uniform"
)
def _same(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    for tensor in tensors_in([out]):
        tr.label(tensor, list(tr.axes(args[0])))


@rule("copy")
def _copy(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    _pointwise(tr, func, args[:2], {}, out)


@rule("arange", "zeros", "ones", "full", "empty", "empty_strided", "rand", "randn", "linspace", "scalar_tensor", "eye")
@rule("new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided", "_local_scalar_dense", "sym_size")
def _made_here(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    reason = f"matched with a fixed table ({func._schema.name.removeprefix('aten::')}) made in {tr.where()}"
    for tensor in tensors_in([out]):
        tr.label(tensor, tr.fixed(tensor, reason))


# Reductions, tables, normalisation ------------------------------------------------------------------------------------


@rule(
    "mean",
    "sum",
    "max",
    "min",
    "amax",
    "amin",
    "var",
    "std",
    "norm",
    "linalg_vector_norm",
    "prod",
    "any",
    "all",
    "logsumexp",
    "var_mean",
)
def _reduce(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Reduced axes are frozen: the result depends on how many positions there are."""
    axes = tr.axes(args[0])
    reason = f"reduced by {func._schema.name.removeprefix('aten::')} in {tr.where()}"
    names = [argument.name for argument in func._schema.arguments]
    dims = kwargs.get("dim", args[names.index("dim")] if "dim" in names and len(args) > names.index("dim") else None)
    dims = range(len(axes)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = {dim % len(axes) for dim in dims} if axes else set()
    for dim in gone:
        tr.statistics.over(axes[dim], reason)
    for tensor in tensors_in([out]):
        whole = tensor.dim() == len(axes)
        tr.label(tensor, [UNIT if i in gone else axis for i, axis in enumerate(axes) if whole or i not in gone])


@rule("_softmax", "_log_softmax", "cumsum", "sort", "_safe_softmax")
def _along(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    axes = tr.axes(args[0])
    if axes:
        freeze(
            axes[kwargs["dim"] if "dim" in kwargs else args[1]],
            f"{func._schema.name.removeprefix('aten::')} along it in {tr.where()}",
        )
    for tensor in tensors_in([out]):
        tr.label(tensor, list(axes))


@rule("embedding")
def _embedding(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    rows, columns = tr.axes(args[0])
    freeze(rows, "rows of an embedding")
    tr.label(out, [*tr.axes(args[1]), columns])


# Spatial --------------------------------------------------------------------------------------------------------------


def _spatial(last: int) -> Rule:
    """An op that changes only the last dimensions."""

    def apply(tr: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        reason = f"positions after {func._schema.name.removeprefix('aten::')} in {tr.where()}"
        for axis in tr.axes(args[0])[-last:]:
            freeze(axis, reason)
        for tensor in tensors_in([out]):
            kept = tr.axes(args[0])[: tensor.dim() - last]
            tr.label(tensor, [*kept, *(Atom(n, reason) for n in tensor.shape[-last:])])

    return apply


for _last, _suffix in ((1, "1d"), (2, "2d"), (3, "3d")):
    for _op in (
        "avg_pool",
        "max_pool",
        "adaptive_avg_pool",
        "_adaptive_avg_pool",
        "upsample_nearest",
        "_upsample_nearest_exact",
    ):
        rule(_op + _suffix)(_spatial(_last))
    for _op in (
        "reflection_pad",
        "replication_pad",
        "upsample_linear",
        "upsample_bilinear",
        "upsample_trilinear",
        "upsample_bicubic",
    ):
        rule(_op + _suffix)(_spatial(_last))
rule("max_pool2d_with_indices")(_spatial(2))
