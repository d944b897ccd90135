"""AdamW, its masks and the moving average in one pass: by hand, against the reference, and what it refuses."""

from __future__ import annotations

from math import sqrt
from typing import Any

import pytest
import torch
from op_cases import (
    FLOATS,
    STYLES,
    by_threads,
    cases,
    generator,
    keep_of,
    needs_native,
    only,
    same,
    same_bytes,
    strided,
    twin,
    twins,
    values,
)
from torch import Tensor

from ebdiff import EbdiffError
from ebdiff.ops.channel_mask import Axes, masked_adamw_

NUMBERS: dict[str, Any] = {
    "lr": 0.03,
    "beta1": 0.8,
    "beta2": 0.95,
    "eps": 1e-4,
    "weight_decay": 0.1,
    "step": 3,
    "ema_decay": 0.7,
}
NAN, INF = float("nan"), float("inf")


def state(tensors: list[Tensor], seed: int = 0) -> list[list[Tensor]]:
    """params, grads, exp_avg, exp_avg_sq, ema: laid out as the tensors, in memory of their own."""
    lists = [twins(tensors) for _ in range(5)]
    for k, part in enumerate(lists):
        for i, x in enumerate(part):
            fresh = torch.randn(x.shape, generator=generator(seed + 1000 * k + i))
            x.copy_(fresh.square() if k == 3 else fresh)
    return lists


def copies(lists: list[list[Tensor]]) -> list[list[Tensor]]:
    return [twins(part) for part in lists]


def all_of(lists: list[list[Tensor]]) -> list[Tensor]:
    return [x for part in lists for x in part]


@pytest.mark.parametrize("maximize", [False, True])
def test_hand_one_step(maximize: bool) -> None:
    """Loshchilov & Hutter 2019, algorithm 2, in Python's floats."""
    p, g, m, v, e = 2.0, 0.5, 0.25, 0.125, 1.5
    lists = [[torch.tensor([x, x, x], dtype=torch.float64)] for x in (p, g, m, v, e)]
    axes = Axes((torch.tensor([True, False, True]),), (0,), (0,))
    masked_adamw_(*lists, axes, **NUMBERS, maximize=maximize)  # type: ignore[arg-type]
    g = -g if maximize else g
    m = 0.8 * m + 0.2 * g
    v = 0.95 * v + 0.05 * g * g
    p = p - 0.03 * 0.1 * p - 0.03 * (m / (1 - 0.8**3)) / (sqrt(v / (1 - 0.95**3)) + 1e-4)
    e = 0.7 * e + 0.3 * p
    for (x,), expected in zip([lists[0], *lists[2:]], (p, m, v, e), strict=True):
        assert x.tolist() == pytest.approx([expected, 0, expected], rel=1e-14)
        assert x[1] == 0
    assert lists[1][0].tolist() == [0.5, 0.5, 0.5]


@needs_native
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("with_ema", "maximize"), [(True, False), (False, True)])
def test_native_is_the_reference(dtype: torch.dtype, style: str, with_ema: bool, maximize: bool) -> None:
    names, tensors, axes = cases(dtype, style)
    theirs = state(tensors)
    theirs[1][5].mul_(NAN)
    theirs[1][6].mul_(1e30)
    theirs = theirs if with_ema else [*theirs[:4], []]
    before, ours = copies(theirs), copies(theirs)
    with only("reference"):
        masked_adamw_(*theirs, axes, **NUMBERS, maximize=maximize)  # type: ignore[arg-type]
    with only("native"):
        masked_adamw_(*ours, axes, **NUMBERS, maximize=maximize)  # type: ignore[arg-type]
    for k in range(5 if with_ema else 4):
        for i, name in enumerate(names):
            a, b, message = ours[k][i], theirs[k][i], f"list {k}: {name}"
            if dtype == torch.float64 and k in (0, 4):
                # The reference calls MKL's square root, which is not always the nearest; that moves p, and e by it.
                size = before[0][i].abs() + theirs[0][i].abs() + before[k][i].abs()
                off = (a - b).abs() > 2 * torch.finfo(dtype).eps * size
                assert not off.any(), message
                assert torch.equal(a.isnan(), b.isnan()), message
            else:
                assert same(a, b), message
            b.copy_(a)
            assert same_bytes(a, b), f"between the elements of {message}"


@pytest.mark.parametrize("dtype", FLOATS)
def test_law_what_is_removed_is_exactly_zero_and_the_rest_does_not_see_the_mask(dtype: torch.dtype) -> None:
    p = values([6, 10], dtype)
    axes = Axes.of([{0: keep_of(6, "some", 1), 1: keep_of(10, "some", 2)}])
    gone = ~(axes.keep[0][:, None] & axes.keep[1])
    lists = state([p])
    for part, poison in zip(lists, (NAN, INF, -INF, NAN, -0.0), strict=True):
        part[0][gone] = poison
    whole = copies(lists)
    for step in (1, 2, 3):
        masked_adamw_(*lists, axes, **{**NUMBERS, "step": step})  # type: ignore[arg-type]
        masked_adamw_(*whole, Axes(), **{**NUMBERS, "step": step})  # type: ignore[arg-type]
        for k in (0, 2, 3, 4):
            assert not lists[k][0][gone].any()
            assert not lists[k][0][gone].signbit().any()
            assert torch.equal(lists[k][0][~gone], whole[k][0][~gone])


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    tensors = [values([500, 600], dtype), values([40, 30, 11, 11], dtype), values([7], dtype)]
    axes = Axes.of([{d: keep_of(t.shape[d], "some", d) for d in range(min(t.dim(), 2))} for t in tensors])
    lists = state(tensors)

    def stepped() -> list[Tensor]:
        ours = copies(lists)
        masked_adamw_(*ours, axes, **NUMBERS)  # type: ignore[arg-type]
        return all_of(ours)

    with only("native"):
        one, *others = by_threads(stepped)
    assert not same_bytes(one[0], lists[0][0])
    for other in others:
        assert all(same_bytes(a, b) for a, b in zip(one, other, strict=True))


@needs_native
def test_alignment_and_streaming_do_not_change_a_bit() -> None:
    """9 million elements are zeroed past the caches, 8 thousand are not; one place further all lies askew."""
    axes = Axes.of([{0: keep_of(3000, "some", 0), 1: keep_of(3001, "some", 1)}])
    few = Axes.of([{0: axes.keep[0][:3], 1: axes.keep[1]}])
    for offset in (0, 1):
        lists = state([strided((3000, 3001), (3001, 1), torch.bfloat16, offset)])
        small = [[twin(part[0][:3].clone())] for part in lists]
        with only("native"):
            masked_adamw_(*lists, axes, **NUMBERS)  # type: ignore[arg-type]
            masked_adamw_(*small, few, **NUMBERS)  # type: ignore[arg-type]
        for large, part in zip(lists, small, strict=True):
            assert torch.equal(large[0][:3], part[0])
        for k in (0, 2, 3, 4):
            assert not lists[k][0][~axes.keep[0]].any()
            assert not lists[k][0][:, ~axes.keep[1]].any()


def test_several_dtypes_in_one_call_are_each_by_themselves() -> None:
    tensors = [values([4, 6], dtype) for dtype in FLOATS for _ in range(2)]
    axes = Axes.of([{1: keep_of(6, "some", i)} if i % 3 else {} for i in range(len(tensors))])
    together = state(tensors)
    alone = copies(together)
    masked_adamw_(*together, axes, **NUMBERS)  # type: ignore[arg-type]
    for i in range(len(tensors)):
        mine = Axes.of([{1: keep_of(6, "some", i)}]) if i % 3 else Axes()
        masked_adamw_(*([part[i]] for part in alone), mine, **NUMBERS)  # type: ignore[arg-type]
    assert all(same_bytes(a, b) for a, b in zip(all_of(together), all_of(alone), strict=True))


@pytest.mark.parametrize("which", range(5))
def test_a_list_in_another_layout_gives_the_same_numbers(which: int) -> None:
    lists = state([values([5, 4])])
    other = copies(lists)
    other[which] = [other[which][0].t().contiguous().t()]
    axes = Axes.of([{0: keep_of(5, "some", 0), 1: keep_of(4, "some", 2)}])
    masked_adamw_(*lists, axes, **NUMBERS)  # type: ignore[arg-type]
    masked_adamw_(*other, axes, **NUMBERS)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(all_of(lists), all_of(other), strict=True))


def test_thousands_of_tensors() -> None:
    lists = state([values([1 + i % 3, 2]) for i in range(5000)])
    one_by_one = copies([part[:30] for part in lists])
    axes = Axes.of([{1: torch.tensor([i % 2 == 0, True])} for i in range(5000)])
    masked_adamw_(*lists, axes, **NUMBERS)  # type: ignore[arg-type]
    for i in range(30):
        mine = Axes((axes.keep[i],), (0,), (1,))
        masked_adamw_(*([part[i]] for part in one_by_one), mine, **NUMBERS)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for k in range(5) for a, b in zip(one_by_one[k], lists[k], strict=False))


# What is refused, before anything has changed


def shared(a: int, b: int, dtypes: tuple[torch.dtype, ...] = (torch.float32,), dims: int = 2) -> list[list[Tensor]]:
    """Lists a and b hold the same memory in the last place."""
    shape = [4, *[1] * (dims - 2), 6]
    lists = state([values(shape, dtype) for dtype in dtypes])
    lists[b][-1] = lists[a][-1].view(lists[b][-1].shape)
    return lists


BOTH = (torch.float32, torch.float64)


@pytest.mark.parametrize(("a", "b"), [(0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (2, 3), (2, 4), (3, 4)])
@pytest.mark.parametrize(("dtypes", "dims"), [(BOTH[:1], 2), (BOTH, 2), (BOTH[:1], 9), (BOTH, 9)])
def test_shared_memory_is_refused(a: int, b: int, dtypes: tuple[torch.dtype, ...], dims: int) -> None:
    lists = shared(a, b, dtypes, dims)
    before = copies(lists)
    with pytest.raises(EbdiffError, match="memory of their own"):
        masked_adamw_(*lists, Axes(), **NUMBERS)  # type: ignore[arg-type]
    assert all(same_bytes(x, y) for x, y in zip(all_of(lists), all_of(before), strict=True))


def test_shared_memory_is_refused_across_places_and_dtypes_too() -> None:
    memory = torch.zeros(64)
    pairs = [
        [memory[:8], memory[7:15]],
        [memory[:8], memory.view(torch.bfloat16)[14:20]],
        [memory[:16].view(4, 4), memory[15:20]],
    ]
    for pair in pairs:
        lists = state(pair)
        lists[0] = pair
        with pytest.raises(EbdiffError, match="memory of their own"):
            masked_adamw_(*lists, Axes(), **NUMBERS)  # type: ignore[arg-type]
        assert not memory.any()
    gradients = [values([3])] * 2
    lists = state([values([3]), values([3])])
    masked_adamw_(lists[0], gradients, *lists[2:], Axes(), **NUMBERS)  # type: ignore[arg-type]


WRONG: dict[str, Any] = {
    "step 0": lambda lists: (lists, {"step": 0}),
    "one gradient too few": lambda lists: ([lists[0], lists[1][:1], *lists[2:]], {}),
    "one average too many": lambda lists: ([*lists[:4], lists[4] * 2], {}),
    "a gradient of another dtype": lambda lists: ([lists[0], [lists[1][0], lists[1][1].double()], *lists[2:]], {}),
    "a moment of another shape": lambda lists: ([*lists[:2], [lists[2][0][:1], lists[2][1]], *lists[3:]], {}),
    "integers": lambda lists: ([[x.long() for x in part] for part in lists], {}),
    "an expanded parameter": lambda lists: ([[torch.ones(1, 6).expand(4, 6), lists[0][1]], *lists[1:]], {}),
    "an expanded moment": lambda lists: ([*lists[:3], [lists[3][0], torch.ones(1).expand(3)], lists[4]], {}),
    "an expanded average": lambda lists: ([*lists[:4], [lists[4][0], torch.ones(1).expand(3)]], {}),
    "a gradient on meta": lambda lists: ([lists[0], [lists[1][0], lists[1][1].to("meta")], *lists[2:]], {}),
    "beta1 of 1": lambda lists: (lists, {"beta1": 1.0}),
    "beta2 of 2": lambda lists: (lists, {"beta2": 2.0, "step": 5000}),
    "a mask of no parameter": lambda lists: (lists, {"axes": Axes((torch.ones(6).bool(),), (2,), (1,))}),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused_and_nothing_changes(name: str) -> None:
    lists = state([values([4, 6]), values([3])])
    before = copies(lists)
    wrong, numbers = WRONG[name](lists)
    axes = numbers.pop("axes", Axes())
    with pytest.raises((EbdiffError, ArithmeticError)):
        masked_adamw_(*wrong, axes, **{**NUMBERS, **numbers})
    assert all(same_bytes(x, y) for x, y in zip(all_of(lists), all_of(before), strict=True))
