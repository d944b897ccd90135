"""The Triton kernels of sparse_attention, interpreted on the CPU: against the specification in float64."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from attention_cases import NAMES, Case, Tensors, error, errs_no_more, everything, pattern_of, torchs, truth_of
from torch import Tensor

pytest.importorskip("triton", minversion="3.6")

from triton_offline import interpreting

from ebdiff.ops import BlockMask, sparse_attention, sparse_attention_cuda
from ebdiff.ops import sparse_attention_reference as reference

operator = importlib.import_module("ebdiff.ops.sparse_attention_ops")


class Kernels(NamedTuple):
    """The launcher's module and the plan's, of kernels that are interpreted."""

    attention: Any
    plan: Any


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Kernels]:
    with interpreting("block_sparse_attention"):
        names = "block_sparse_attention", "block_sparse_attention_plan"
        yield Kernels(*(importlib.import_module(f"ebdiff.kernels.{name}") for name in names))


@pytest.fixture(autouse=True)
def kernels(interpreted: Kernels, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    monkeypatch.setattr(sparse_attention_cuda, "_triton", lambda: interpreted.attention)
    monkeypatch.setattr(operator.FAMILY, "kernels", lambda x: sparse_attention_cuda)
    return interpreted


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that nobody has written to holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


ONE: dict[str, Any] = {"samples": 1, "heads": (1, 1)}
CASES = {
    "shorter last blocks": Case((40, 75), 40, **ONE),
    "a mask for each sample, keys for several heads": Case((20, 33), 16, heads=(4, 2), per_sample=True),
    "other values": Case((33, 33), (24, 72), **ONE),
    "narrow values": Case((20, 33), (80, 8), **ONE),
    "head_dim 72": Case((64, 64), 72, block=32, **ONE),
    "head_dim 88": Case((70, 33), 88, block=32, **ONE),
    "head_dim 256": Case((40, 64), 256, block=32, **ONE),
    "odd head_dim": Case((33, 47), 13, **ONE),
    "blocks of 64": Case((130, 70), 24, block=64, **ONE),
    "blocks of 128 in several tiles": Case((130, 200), 16, block=128, **ONE),
    "one token": Case((1, 1), 8, density=1.0, **ONE),
    "everything kept": Case((40, 33), 48, density=1.0, **ONE),
    "nothing kept": Case((20, 20), 16, density=0.0, **ONE),
    "laid out by tokens, a mask for all samples": Case((20, 33), 40, laid="tokens", heads=(1, 1)),
    "thirds of wider tensors": Case((20, 33), 24, laid="fused", samples=1),
}
NARROW = Case((40, 33), 24, samples=1)


def check(case: Tensors) -> None:
    """No worse than the specification.

    But that the interpreter cuts bfloat16 off where a GPU rounds to nearest: twice the error, in o and what o enters.
    """
    truth, found, others = truth_of(case), everything(case, sparse_attention_cuda), everything(case, reference)
    assert all(found[name].stride() == others[name].stride() for name in NAMES)
    if case.q.dtype == torch.bfloat16:
        for name in NAMES:
            assert error(found[name], truth[name])[1] <= 2.5 * error(others[name], truth[name])[1], name
    else:
        errs_no_more({n: found[n] for n in NAMES}, {n: others[n] for n in NAMES}, truth)
    torch.testing.assert_close(found["log_sum"].double(), truth["log_sum"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_they_are_the_specification(name: str) -> None:
    check(CASES[name].tensors(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["shorter last blocks", "head_dim 72", "thirds of wider tensors"])
def test_in_16_bits(name: str, dtype: torch.dtype) -> None:
    check(CASES[name].tensors(dtype))


@pytest.mark.parametrize("size", [30.0, 300.0])
def test_huge_scores(size: float) -> None:
    """The gradients have as many digits as the scores have behind the point."""
    case = NARROW._replace(size=size).tensors(torch.float32)
    truth, found = truth_of(case), everything(case, sparse_attention_cuda)
    errs_no_more({"o": found["o"]}, {"o": torchs(case)["o"]}, truth)
    digits = 4 * torch.finfo(torch.float32).eps * float(truth["log_sum"].max())
    for name, terms in {"dq": 4 * size**2, "dk": 4 * size**2, "dv": 4.0}.items():
        assert float((found[name] - truth[name]).abs().max()) <= digits * terms, name


def test_tiles_of_any_size_give_the_same(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 and 32 tokens, where a block holds 64."""
    case = Case((70, 100), 24, block=64, **ONE).tensors(torch.float32)
    whole = everything(case, sparse_attention_cuda)
    plan = kernels.plan.plan_of(24, 64, 4)
    small, flat = kernels.plan.Tile(16, 32, 4, 2), kernels.plan.Tile(32, 16, 4, 2)
    monkeypatch.setattr(kernels.attention, "plan_of", lambda *a: plan._replace(forward=small, dq=flat, dkdv=small))
    for name, tensor in everything(case, sparse_attention_cuda).items():
        torch.testing.assert_close(tensor, whole[name])


def test_tokens_without_partners() -> None:
    """Get zeros, and what they hold changes no bit."""
    case = NARROW.tensors(torch.float32)
    dense = case.mask.dense()
    alone, unasked = (~dense.any(dim)[..., None] for dim in (-1, -2))
    clean = everything(case, sparse_attention_cuda)
    for name, places in {"o": alone, "dq": alone, "dk": unasked, "dv": unasked}.items():
        assert places.any()
        assert not clean[name][places.expand_as(clean[name])].any(), name
    q, do = (torch.where(alone, torch.nan, t) for t in (case.q, case.do))
    k, v = (torch.where(unasked, torch.nan, t) for t in (case.k, case.v))
    dirty = everything(Tensors(q, k, v, do, *case[4:]), sparse_attention_cuda)
    assert all(torch.equal(clean[name], dirty[name]) for name in clean)


def test_keys_that_only_others_attend_to_are_not_read() -> None:
    mask = BlockMask(torch.eye(2, dtype=torch.bool)[None, None], 16, 32, 32)
    q, k, v = torch.randn(3, 1, 1, 32, 8).unbind()
    v[:, :, 16:] = torch.nan
    o = sparse_attention_cuda.forward(q, k, v, pattern_of(mask), 1.0)[0]
    assert o[:, :, :16].isfinite().all()
    assert o[:, :, 16:].isnan().all()


def test_nothing_is_written_beside_the_results(kernels: Kernels) -> None:
    """To the channels and tokens around them in wider memory."""
    case = Case((20, 33), 24, samples=1).tensors(torch.float32)
    q, k, v, do, mask, scale = case
    truth, pattern = truth_of(case), pattern_of(mask)
    wide = {n: torch.full((1, 2, t.shape[2] + 40, 40), torch.nan) for n, t in zip(NAMES, (q, q, k, v), strict=True)}
    inner = {name: tensor[:, :, 20:-20, 8:32] for name, tensor in wide.items()}
    log_sum = torch.empty(1, 2, 20)
    kernels.attention.forward(q, k, v, inner["o"], log_sum, pattern, scale)
    gradients = tuple(inner[name] for name in NAMES[1:])
    kernels.attention.backward(do, q, k, v, inner["o"], log_sum, gradients, pattern, scale)
    for name, tensor in wide.items():
        torch.testing.assert_close(inner[name].double(), truth[name], rtol=1e-5, atol=1e-5)
        assert int(tensor.isfinite().sum()) == inner[name].numel(), name


@pytest.mark.parametrize("view", ["channels apart", "without strides"])
def test_any_strides(view: str) -> None:
    """As .sum() hands back a gradient, and as nobody lays out attention."""
    case = NARROW.tensors(torch.float32)
    if view == "without strides":
        case = case._replace(do=torch.tensor(0.5).expand_as(case.do))
    else:
        apart = (t.transpose(2, 3).contiguous().transpose(2, 3) for t in case[:4])
        case = Tensors(*apart, *case[4:])
    dense = Tensors(*(t.contiguous() for t in case[:4]), *case[4:])
    found, expected = everything(case, sparse_attention_cuda), everything(dense, sparse_attention_cuda)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert found["dq"].stride() == torch.empty_like(case.q).stride()


def test_only_gradients_that_are_needed_are_made() -> None:
    case = Case((20, 33), 16, samples=1).tensors(torch.float32)
    whole, pattern = everything(case, sparse_attention_cuda), pattern_of(case.mask)
    for only in range(3):
        needs = [place == only for place in range(3)]
        given = (case.do, *case[:3], whole["o"], whole["log_sum"], pattern, case.scale)
        found = sparse_attention_cuda.backward(*given, needs)
        assert [gradient is not None for gradient in found] == needs
        assert torch.equal(found[only], whole[NAMES[1 + only]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operator_reaches_them_and_falls_back_for_float64_alone(dtype: torch.dtype) -> None:
    def run(dtype: torch.dtype) -> Tensor:
        q, k, v = (torch.randn(1, 2, 20, 8, dtype=dtype, requires_grad=True) for _ in range(3))
        o = sparse_attention(q, k, v, BlockMask.local(2, 20, 20, 16, 0))
        o.sum().backward()
        return o

    before = operator.fallbacks.copy()
    run(dtype)
    assert operator.fallbacks == before
    run(torch.float64)
    assert operator.fallbacks - before == {"float64 on a GPU": 2}


def test_too_little_shared_memory_leaves_it_to_the_specification(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any) -> None:
        raise kernels.attention.OutOfResources(1 << 18, 1 << 17, "shared memory")

    monkeypatch.setattr(kernels.attention, "forward", fails)
    case, before = NARROW.tensors(torch.float32), operator.fallbacks.copy()
    o = sparse_attention(*case[:3], case.mask)
    assert operator.fallbacks - before == {"too little shared memory": 1}
    torch.testing.assert_close(o.double(), truth_of(case)["o"], rtol=1e-5, atol=1e-5)


def test_tokens_that_32_bits_cannot_reach_are_copied() -> None:
    far, near = ((1 << 31) // 128, True), ((1 << 31) // 128 - 8, False)
    for stride, copied in (far, near):
        x = torch.empty_strided((1, 1, 2, 8), (2 * stride, 2 * stride, stride, 1), device="meta")
        (found,) = sparse_attention_cuda._readable(x)
        assert (found is not x) == copied
        assert found.is_contiguous() == copied
