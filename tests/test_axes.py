"""The algebra of axes: atoms, products and concatenations, united, cut and split."""

from __future__ import annotations

import pytest

from ebdiff.pruning.axes import Atom, Cat, Prod, cut, freeze, leaves, places, size, split, unify


def test_an_atom_cut_once_is_cut_everywhere() -> None:
    whole = Atom(10)
    both = Prod((Atom(3, "batch"), whole))
    left, right = cut(whole, 4) or pytest.fail("an atom can be cut anywhere")
    unify(left, Atom(4, "fixed"))
    assert [(p.atom.reason, p.offset, p.outer, p.period, p.inner) for p in places(both) if p.atom.length in (4, 6)] == [
        ("fixed", 0, 3, 10, 1),
        (None, 4, 3, 10, 1),
    ]
    assert size(right) == 6


def test_heads_times_head_dim_splits_a_linear_output() -> None:
    output = Atom(12)
    heads, dim = split(output, 4) or pytest.fail("12 = 3 x 4")
    assert [(p.offset, p.outer, p.period, p.inner) for p in places(output)] == [(0, 1, 0, 4), (0, 3, 4, 1)]
    assert (size(heads), size(dim)) == (3, 4)


def test_a_product_divided_two_ways_has_a_common_refinement() -> None:
    a, b = Prod((Atom(4), Atom(6))), Prod((Atom(8), Atom(3)))
    unify(a, b)
    assert [atom.length for atom in leaves(a)] == [4, 2, 3]
    assert list(leaves(a)) == list(leaves(b))


def test_divisions_that_do_not_fit_are_frozen() -> None:
    a, b = Prod((Atom(2), Atom(3))), Prod((Atom(3), Atom(2)))
    unify(a, b)
    assert all(atom.reason for axis in (a, b) for atom in leaves(axis))


def test_equal_segments_viewed_as_a_stack_are_tied() -> None:
    q, k = Atom(5), Atom(5)
    stack, each = split(Cat((q, k)), 5) or pytest.fail("10 = 2 x 5")
    assert next(iter(leaves(stack))).reason
    assert list(leaves(q)) == list(leaves(k)) == list(leaves(each))


def test_the_first_reason_stays_through_unions() -> None:
    a, b = Atom(4), Atom(4)
    unify(a, b)
    freeze(a, "first")
    freeze(b, "second")
    assert next(iter(leaves(b))).reason == "first"


def test_a_segment_of_no_length_is_none() -> None:
    """Padding at one side is a concatenation with nothing at the other; it must unite with one without."""
    tokens = Atom(4)
    padded = Cat((Atom(1), tokens, Atom(0)))
    unify(padded, Cat((Atom(1), tokens)))
    assert list(leaves(padded)) == [tokens]
    assert size(padded) == 5
