"""Laws of the operators on channel masks, and what must not matter: threads, instruction sets, alignment, memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_cases import (
    FLOATS,
    STYLES,
    by_threads,
    cases,
    keep_of,
    needs_native,
    only,
    same_bytes,
    strided,
    twin,
    twins,
    values,
)
from torch import Tensor

from ebdiff.ops import native
from ebdiff.ops.channel_mask import Axes, apply_mask_, channel_sums, compact, mask_distance, scatter_back

ROOT = Path(__file__).parent.parent
NAN, INF = float("nan"), float("inf")


def bits(*flags: int) -> Tensor:
    return torch.tensor(flags, dtype=torch.bool)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bool])
def test_law_masking_is_cutting_and_growing_back(dtype: torch.dtype, style: str) -> None:
    names, tensors, axes = cases(dtype, style)
    small = compact(tensors, axes)
    grown = scatter_back(small, axes, tensors)
    again = compact(grown, axes)
    apply_mask_(tensors, axes)
    once = twins(tensors)
    apply_mask_(tensors, axes)
    for i, name in enumerate(names):
        assert same_bytes(tensors[i], once[i]), f"masking twice: {name}"
        assert torch.equal(grown[i], tensors[i]), f"masked or cut and grown back: {name}"
        assert torch.equal(again[i], small[i]), f"cut, grown and cut: {name}"
        assert grown[i].stride() == torch.zeros_like(tensors[i]).stride(), f"layout: {name}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.bool, torch.complex128])
def test_law_arenas(dtype: torch.dtype) -> None:
    _, tensors, axes = cases(dtype, "some")
    small = compact(tensors, axes)
    arena = torch.empty(0, dtype=torch.uint8).set_(small[0].untyped_storage())
    touched = torch.zeros(len(arena), dtype=torch.bool)
    assert arena.data_ptr() % 64 == 0
    for part in small:
        start = part.storage_offset() * part.itemsize
        assert start % 64 == 0
        assert not touched[start : start + part.nbytes].any(), "disjoint"
        assert part.numel() == 0 or part.untyped_storage().data_ptr() == arena.data_ptr()
        touched[start : start + part.nbytes] = True
    assert not arena[~touched].any(), "gaps are zero"


def test_law_what_is_removed_stays_and_what_surrounds_it_too() -> None:
    names, tensors, axes = cases(torch.float32, "some")
    into = [twin(tensor).fill_(7) for tensor in tensors]
    before = twins(into)
    scatter_back(compact(tensors, axes), axes, tensors, into=into)
    kept = [torch.ones(tensor.shape, dtype=torch.bool) for tensor in tensors]
    apply_mask_(kept, axes)
    for i, name in enumerate(names):
        assert torch.equal(into[i], torch.where(kept[i], tensors[i], 7)), name
        into[i].copy_(before[i])
        assert same_bytes(into[i], before[i]), f"between its elements: {name}"


@pytest.mark.parametrize("server", ["reference", pytest.param("native", marks=needs_native)])
def test_law_nothing_depends_on_what_memory_held(server: str) -> None:
    tensors = [tensor for tensor in cases(torch.float32, "some")[1] if tensor.numel()]
    places = [(i, d) for i, tensor in enumerate(tensors) for d in range(tensor.dim())]
    owner, dims = [i for i, _ in places], [d for _, d in places]
    masks = [{d: keep_of(t.shape[d], "some", d) for d in range(min(t.dim(), 2))} for t in tensors]
    packed = values([9, 11], torch.uint8)

    def everything() -> list[Tensor]:
        small = compact(tensors, Axes.of(masks))
        into = scatter_back(small, Axes.of(masks), tensors)
        sums = channel_sums(tensors, [], owner, dims, "square")
        return [twin(small[0]), *into, sums, mask_distance(packed)]

    with only(server):
        clean = everything()
        before = torch.utils.deterministic.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[assignment]
        try:
            assert torch.empty(3).isnan().all()
            poisoned = everything()
        finally:
            torch.use_deterministic_algorithms(False)
            torch.utils.deterministic.fill_uninitialized_memory = before  # type: ignore[assignment]
    assert all(same_bytes(a, b) for a, b in zip(clean, poisoned, strict=True))


# Threads, instruction sets, alignment, sizes


@needs_native
def test_threads_do_not_change_a_bit() -> None:
    tensors = [values([900, 700]), values([70, 90, 10, 10]), values([3, 5]), values([400, 512]).half()]
    tensors += [strided((64, 100, 9, 9), (8100, 1, 900, 100), torch.float32)]
    masks = [{d: keep_of(t.shape[d], "some", d) for d in (0, 1)} for t in tensors]
    axes = Axes.of(masks)
    packed = values([1000, 100], torch.uint8)

    def everything() -> list[Tensor]:
        masked = twins(tensors)
        apply_mask_(masked, axes)
        small = compact(tensors, axes)
        sums = channel_sums(tensors, [], axes.owner, axes.dims, "square")
        return [*masked, *map(twin, small), *scatter_back(small, axes, tensors), sums, mask_distance(packed)]

    with only("native"):
        one, *others = by_threads(everything)
    for other in others:
        assert all(same_bytes(a, b) for a, b in zip(one, other, strict=True))


@needs_native
def test_much_is_written_past_the_caches() -> None:
    x = values([2100, 2049], torch.uint8, seed=1)[:, 1:]  # rows start at odd addresses
    axes = Axes.of([{0: keep_of(2100, "some", 0), 1: keep_of(2048, "some", 1)}])
    with only("reference"):
        apply_mask_([expected := twin(x)], axes)
    with only("native"):
        apply_mask_([x], axes)
    assert same_bytes(x, expected)


@needs_native
def test_instruction_sets_and_alignment_do_not_change_a_bit() -> None:
    found = {}
    for isa in ("base", "avx2", "avx512"):  # the widest that the machine has, up to this one
        command = [sys.executable, str(ROOT / "tests" / "op_digest.py")]
        environment = {**os.environ, "EBDIFF_ISA": isa, "PYTHONPATH": str(ROOT)}
        run = subprocess.run(command, check=True, text=True, capture_output=True, env=environment)
        used, *digests = run.stdout.split()
        found[used] = digests
    assert {"base", native.module().isa()} <= found.keys()  # type: ignore[union-attr]
    assert len({digest for digests in found.values() for digest in digests}) == 1, found


def test_thousands_of_tensors() -> None:
    count = 5000
    tensors = [torch.full((2, 1 + i % 3), float(i)) for i in range(count)]
    axes = Axes.of([{0: bits(1, 0), 1: bits(*[1] * (i % 3), 0)} for i in range(count)])
    small = compact(tensors, axes)
    assert [part.shape for part in small] == [(1, i % 3) for i in range(count)]
    assert all((part == i).all() for i, part in enumerate(small))
    apply_mask_(tensors, axes)
    assert [float(tensor.sum()) for tensor in tensors] == [float(i * (i % 3)) for i in range(count)]
    grown = scatter_back(small, axes, tensors)
    assert all(torch.equal(a, b) for a, b in zip(grown, tensors, strict=True))
    sums = channel_sums(tensors, [], range(count), [0] * count, "absolute")
    assert sums.tolist() == [float(x) for i in range(count) for x in (i * (i % 3), 0)]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.complex64])
def test_what_is_not_finite_becomes_an_exact_zero(dtype: torch.dtype) -> None:
    x = torch.tensor([NAN, INF, -INF, -0.0], dtype=dtype).repeat(40, 20)
    axes = Axes.of([{0: keep_of(40, "one", 3), 1: keep_of(80, "one", 5)}])
    apply_mask_([x], axes)
    whole = torch.view_as_real(x) if dtype.is_complex else x
    zero = torch.ones(40, 80, dtype=torch.bool)
    zero[3, 5] = False
    assert not whole[zero].any()
    assert not whole[zero].signbit().any()
