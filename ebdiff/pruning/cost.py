"""How many positions and multiply-accumulates are left: polynomials in the kept sizes of spaces."""

from __future__ import annotations

from .axes import Atom, Axis, Prod, resolve
from .plan import Terms

__all__ = ["Polynomial", "cost_of", "kept_size", "terms_of"]

Polynomial = dict[tuple[str, ...], float]


def terms_of(polynomial: Polynomial) -> Terms:
    """As the plan keeps it."""
    return tuple((value, key) for key, value in sorted(polynomial.items()))


def cost_of(costs: list[list[Axis]], names: dict[Atom, str], batch: int) -> Terms:
    """One multiply-accumulate per position of each product of axes, divided by the batch size."""
    total: Polynomial = {}
    for axes in costs:
        term: Polynomial = {(): 1 / batch}
        for axis in axes:
            term = _times(term, kept_size(resolve(axis), names))
        for key, value in term.items():
            total[key] = total.get(key, 0.0) + value
    return terms_of(total)


def kept_size(axis: Axis, names: dict[Atom, str]) -> Polynomial:
    """How many positions of an axis are kept, as a polynomial in the kept sizes of the spaces."""
    if isinstance(axis, Atom):
        return {(names[axis],): 1.0} if axis in names else {(): float(axis.length)}
    if isinstance(axis, Prod):
        result: Polynomial = {(): 1.0}
        for factor in axis.factors:
            result = _times(result, kept_size(factor, names))
        return result
    result = {}
    for segment in axis.segments:
        for key, value in kept_size(segment, names).items():
            result[key] = result.get(key, 0.0) + value
    return result


def _times(a: Polynomial, b: Polynomial) -> Polynomial:
    result: Polynomial = {}
    for left, x in a.items():
        for right, y in b.items():
            key = tuple(sorted((*left, *right)))
            result[key] = result.get(key, 0.0) + x * y
    return result
