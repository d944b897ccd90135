"""The algebra of tensor axes: what an axis is made of, and what must shrink together.

An axis is an atom, a product (heads x head_dim) or a concatenation (skip | upsampled) of smaller axes. Atoms that must
keep the same indices are united; an atom that turns out to be composite is defined, once and for all its users, as the
composite. Whatever cannot be expressed is frozen, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

__all__ = [
    "UNIT",
    "Atom",
    "Axis",
    "Cat",
    "Place",
    "Prod",
    "cut",
    "doubt",
    "freeze",
    "fuse",
    "leaves",
    "places",
    "resolve",
    "size",
    "split",
    "unify",
]


class Atom:
    """An indivisible axis, united with others or defined as a composite as the trace goes on."""

    __slots__ = ("doubt", "kind", "length", "meaning", "reason")

    def __init__(self, length: int, reason: str | None = None, kind: str | None = None) -> None:
        self.length = length
        self.meaning: Axis | None = None
        self.doubt: str | None = None  # why it may not shrink, unless a trial shows that it does
        self.reason = reason
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Prod:
    """Factors from outermost to innermost: position = outer * size(inner) + inner."""

    factors: tuple[Axis, ...]


@dataclass(frozen=True, slots=True)
class Cat:
    """Segments one after another."""

    segments: tuple[Axis, ...]


Axis = Atom | Prod | Cat
UNIT = Prod(())


def size(axis: Axis) -> int:
    """The number of positions on an axis."""
    if isinstance(axis, Atom):
        return axis.length
    if isinstance(axis, Prod):
        return prod(map(size, axis.factors))
    return sum(map(size, axis.segments))


def resolve(axis: Axis) -> Axis:
    """The axis in terms of undefined atoms: nested products and concatenations flattened, trivial parts dropped."""
    if isinstance(axis, Atom):
        if axis.meaning is None:
            return UNIT if axis.length == 1 else axis
        axis.meaning = resolve(axis.meaning)
        return axis.meaning
    if isinstance(axis, Prod):
        return fuse([factor for part in map(resolve, axis.factors) for factor in _factors(part)])
    segments = [
        s
        for part in map(resolve, axis.segments)
        for s in (part.segments if isinstance(part, Cat) else (part,))
        if size(s)
    ]
    return segments[0] if len(segments) == 1 else Cat(tuple(segments))


def _factors(axis: Axis) -> tuple[Axis, ...]:
    return axis.factors if isinstance(axis, Prod) else (axis,)


def fuse(parts: list[Axis]) -> Axis:
    """The product of axes, outermost first."""
    factors = [factor for part in parts for factor in _factors(part)]
    return factors[0] if len(factors) == 1 else Prod(tuple(factors))


def leaves(axis: Axis) -> Iterator[Atom]:
    """The undefined atoms an axis is made of."""
    axis = resolve(axis)
    if isinstance(axis, Atom):
        yield axis
    else:
        for part in axis.factors if isinstance(axis, Prod) else axis.segments:
            yield from leaves(part)


def freeze(axis: Axis, reason: str) -> None:
    """No part of this axis may shrink. The first reason given stays."""
    for atom in leaves(axis):
        atom.reason = atom.reason or reason


def doubt(axis: Axis, reason: str) -> None:
    """This axis may shrink only where a trial confirms it (see confirm.py). The first reason given stays."""
    for atom in leaves(axis):
        atom.doubt = atom.doubt or reason


def _define(atom: Atom, meaning: Axis) -> None:
    atom.meaning = meaning
    for leaf in leaves(meaning):
        leaf.reason = leaf.reason or atom.reason
        leaf.doubt = leaf.doubt or atom.doubt


def cut(axis: Axis, at: int) -> tuple[Axis, Axis] | None:
    """The axis as two segments, the first with `at` positions; None where a product stands in the way."""
    axis = resolve(axis)
    if at in (0, size(axis)):
        return (Cat(()), axis) if at == 0 else (axis, Cat(()))
    if isinstance(axis, Atom):
        left, right = Atom(at, kind=axis.kind), Atom(axis.length - at, kind=axis.kind)
        _define(axis, Cat((left, right)))
        return left, right
    if isinstance(axis, Prod):
        first, rest = axis.factors[0], fuse(list(axis.factors[1:]))
        halves = cut(first, at // size(rest)) if at % size(rest) == 0 else None
        return halves and (fuse([halves[0], rest]), fuse([halves[1], rest]))
    before: list[Axis] = []
    for i, segment in enumerate(axis.segments):
        if at <= size(segment):
            halves = cut(segment, at)
            return halves and (Cat((*before, halves[0])), Cat((halves[1], *axis.segments[i + 1 :])))
        before.append(segment)
        at -= size(segment)
    raise AssertionError("a cut beyond the end of an axis")


def split(axis: Axis, inner: int) -> tuple[Axis, Axis] | None:
    """The axis as a product whose inner factor has `inner` positions; None where that cannot be said."""
    axis = resolve(axis)
    if inner == size(axis):
        return UNIT, axis
    if inner == 1:
        return axis, UNIT
    if size(axis) % inner:
        return None
    if isinstance(axis, Atom):
        outer_atom, inner_atom = Atom(axis.length // inner), Atom(inner)
        _define(axis, Prod((outer_atom, inner_atom)))
        return outer_atom, inner_atom
    if isinstance(axis, Prod):
        rest, last = fuse(list(axis.factors[:-1])), axis.factors[-1]
        if inner % size(last) == 0:
            parts = split(rest, inner // size(last))
            return parts and (parts[0], fuse([parts[1], last]))
        parts = split(last, inner) if size(last) % inner == 0 else None
        return parts and (fuse([rest, parts[0]]), parts[1])
    pairs = [split(segment, inner) for segment in axis.segments]
    whole = [pair for pair in pairs if pair is not None]
    if len(whole) < len(pairs):
        return None
    for _, other in whole[1:]:
        unify(whole[0][1], other)
    if all(size(outer) == 1 for outer, _ in whole):
        return Atom(len(whole), "several equal parts stacked by a view"), whole[0][1]
    return Cat(tuple(outer for outer, _ in whole)), whole[0][1]


def unify(a: Axis, b: Axis) -> None:
    """Make two axes of equal size keep the same indices from now on; freeze both where that cannot be expressed."""
    a, b = resolve(a), resolve(b)
    if a is b or size(a) == 1:
        return
    assert size(a) == size(b), f"axes of {size(a)} and {size(b)} positions cannot be the same"
    if isinstance(b, Atom) and not isinstance(a, Atom):
        a, b = b, a
    if isinstance(a, Atom):
        if isinstance(b, Atom):
            b.kind = b.kind or a.kind
        _define(a, b)
    elif isinstance(a, Cat) or isinstance(b, Cat):
        _unify_segments(*((a, b) if isinstance(a, Cat) else (b, a)))
    else:
        _unify_factors(a, b)


def _unify_segments(a: Axis, b: Axis) -> None:
    assert isinstance(a, Cat)
    halves = cut(b, size(a.segments[0]))
    if halves is None and isinstance(b, Prod):
        return _unify_factors(b, a)
    if halves is None:
        return _freeze_both(a, b)
    unify(a.segments[0], halves[0])
    unify(Cat(a.segments[1:]), halves[1])


def _unify_factors(a: Prod, b: Axis) -> None:
    parts = split(b, size(a.factors[-1]))
    if parts is not None:
        unify(a.factors[-1], parts[1])
        return unify(fuse(list(a.factors[:-1])), parts[0])
    parts = split(a, size(b.factors[-1])) if isinstance(b, Prod) else None
    if parts is None or not isinstance(b, Prod):
        return _freeze_both(a, b)
    unify(b.factors[-1], parts[1])
    unify(fuse(list(b.factors[:-1])), parts[0])


def _freeze_both(a: Axis, b: Axis) -> None:
    for axis in (a, b):
        freeze(axis, "two ways of dividing this axis that do not fit each other")


@dataclass(frozen=True, slots=True)
class Place:
    """Where an atom lies on an axis: index c at offset + o * period + c * inner + i, for o < outer and i < inner."""

    atom: Atom
    offset: int
    outer: int
    period: int
    inner: int
    within: tuple[Atom, ...]  # the other atoms of the same product


def places(axis: Axis) -> Iterator[Place]:
    """Every atom of an axis with the positions it covers."""
    yield from _places(resolve(axis), 0, 1, (), ())


def _places(
    axis: Axis, offset: int, inner: int, loops: tuple[tuple[int, int], ...], within: tuple[Atom, ...]
) -> Iterator[Place]:
    if isinstance(axis, Atom):
        *enumerated, (outer, period) = loops or ((1, 0),)
        offsets = [offset]
        for count, stride in enumerated:
            offsets = [base + i * stride for base in offsets for i in range(count)]
        for base in offsets:
            yield Place(axis, base, outer, period, inner, within)
    elif isinstance(axis, Cat):
        for segment in axis.segments:
            yield from _places(segment, offset, inner, loops, within)
            offset += size(segment) * inner
    else:
        for i, factor in enumerate(axis.factors):
            stride = inner * prod(map(size, axis.factors[i + 1 :]))
            before = prod(map(size, axis.factors[:i]))
            around = loops if before == 1 else (*loops, (before, stride * size(factor)))
            beside = tuple(atom for other in axis.factors if other is not factor for atom in leaves(other))
            yield from _places(factor, offset, stride, around, (*within, *beside))
