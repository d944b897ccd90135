"""sparse_attention: the specification and what the CPU makes of it, against each other, torch's attention and laws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import EVERY, NAMES, Case, Tensors, errs_no_more, everything, pattern_of, torchs, truth_of
from torch import Tensor
from torch.nn import functional as F

from ebdiff.ops import BlockMask, sparse_attention, sparse_attention_cpu
from ebdiff.ops import sparse_attention_reference as reference

CASES = {
    "whole blocks": Case((64, 64), 32),
    "shorter last blocks": Case((40, 75), 40),
    "one token": Case((1, 1), 8, density=1.0),
    "one query, many keys": Case((1, 200), 16, density=1.0),
    "a mask for each sample": Case((70, 33), 16, per_sample=True),
    "keys for several heads": Case((40, 40), 16, heads=(6, 2), per_sample=True),
    "other values": Case((40, 50), (24, 72)),
    "narrow values": Case((40, 50), (80, 8)),
    "head_dim 72": Case((64, 64), 72, block=32),
    "head_dim 80": Case((64, 64), 80, block=32),
    "head_dim 88": Case((70, 64), 88, block=32),
    "head_dim 256": Case((64, 64), 256, block=32, samples=1),
    "odd head_dim": Case((33, 47), 13),
    "blocks of 128": Case((300, 200), 64, block=128),
    "everything kept": Case((70, 90), 48, block=32, density=1.0),
    "nothing kept": Case((40, 40), 16, density=0.0),
    "few blocks": Case((160, 160), 16, density=0.1),
    "laid out by tokens": Case((40, 75), 40, laid="tokens"),
    "thirds of wider tensors": Case((40, 75), 40, laid="fused"),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
MODULES = {"specification": reference, "cpu": sparse_attention_cpu}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_cpu_is_the_specification(name: str, dtype: torch.dtype) -> None:
    case = CASES[name].tensors(dtype)
    truth, found = truth_of(case), everything(case, sparse_attention_cpu)
    errs_no_more({n: found[n] for n in NAMES}, torchs(case), truth)
    finite = truth["log_sum"].isfinite()
    assert torch.equal(finite, found["log_sum"].isfinite())
    torch.testing.assert_close(found["log_sum"][finite].double(), truth["log_sum"][finite], rtol=1e-5, atol=1e-5)
    for mine, given in ((found["dq"], case.q), (found["dk"], case.k), (found["dv"], case.v)):
        assert mine.stride() == torch.empty_like(given).stride()
    assert found["o"].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("name", CASES)
def test_the_specification_is_torchs_attention_with_a_dense_mask(name: str) -> None:
    case = CASES[name].tensors(torch.float64)
    found = everything(case, reference)
    for what, true in torchs(case).items():
        torch.testing.assert_close(found[what], true, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("module", MODULES)
def test_gradients_are_those_of_the_function(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case((20, 34), (5, 3), heads=(4, 2), per_sample=True).tensors(torch.float64)
    q, k, v = (tensor.requires_grad_() for tensor in case[:3])
    if module == "cpu":
        assert torch.autograd.gradcheck(lambda *t: sparse_attention(*t, case.mask, case.scale), (q, k, v))
    else:
        pattern = pattern_of(case.mask)
        assert torch.autograd.gradcheck(lambda *t: reference.sparse_attention(*t, pattern, case.scale), (q, k, v))


def test_scale_0_gives_the_mean_of_the_kept_values() -> None:
    kept = torch.tensor([[[[1, 0, 1], [0, 0, 0]]]], dtype=torch.bool)
    v = torch.arange(40.0).view(1, 1, 40, 1)
    o = sparse_attention(torch.randn(1, 1, 20, 4), torch.randn(1, 1, 40, 4), v, BlockMask(kept, 16, 20, 40), 0.0)
    torch.testing.assert_close(o[0, 0, :16, 0], torch.full((16,), (sum(range(16)) + sum(range(32, 40))) / 24))
    assert not o[0, 0, 16:].any()


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_queries_without_keys_and_keys_without_queries_get_zeros(module: Any) -> None:
    case = Case((40, 50), 24).tensors(torch.float32)
    found, dense = everything(case, module), case.mask.dense()
    alone, unasked = ~dense.any(-1).expand(2, -1, -1), ~dense.any(-2).expand(2, -1, -1)
    assert alone.any()
    assert unasked.any()
    assert not found["o"][alone].any()
    assert not found["dq"][alone].any()
    assert not found["dk"][unasked].any()
    assert not found["dv"][unasked].any()
    assert (found["log_sum"][alone] == -torch.inf).all()


def spoiled(case: Tensors) -> Tensors:
    """With NaN in tokens that have no partner."""
    dense = case.mask.dense()
    alone, unasked = ~dense.any(-1)[..., None], ~dense.any(-2)[..., None]
    q, k, v, do = case[:4]
    nan = torch.nan
    given = (torch.where(alone, nan, q), torch.where(unasked, nan, k), torch.where(unasked, nan, v))
    return Tensors(*given, torch.where(alone, nan, do), *case[4:])


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_what_tokens_without_partners_hold_changes_no_bit(module: Any) -> None:
    case = Case((40, 50), 24).tensors(torch.float32)
    clean, dirty = everything(case, module), everything(spoiled(case), module)
    assert all(torch.equal(clean[name], dirty[name]) for name in clean)


def test_keys_that_only_others_attend_to_are_not_read() -> None:
    kept = torch.tensor([[[[1, 0], [0, 1]]]], dtype=torch.bool)
    q, k, v = torch.randn(3, 1, 1, 32, 8).unbind()
    v[:, :, 16:] = torch.nan
    o = sparse_attention(q, k, v, BlockMask(kept, 16, 32, 32))
    assert o[:, :, :16].isfinite().all()
    assert o[:, :, 16:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [30.0, 300.0])
def test_huge_scores(dtype: torch.dtype, size: float) -> None:
    case = Case((40, 75), 40, size=size).tensors(dtype)
    found = everything(case, sparse_attention_cpu)
    scores = case.scale * (case.q.double() @ case.k.double().mT).abs().max()
    errs_no_more({n: found[n] for n in NAMES}, torchs(case), truth_of(case), scores=float(scores))


def test_heads_that_share_keys_add_up_their_gradients() -> None:
    case = Case((40, 40), 16, heads=(6, 2)).tensors(torch.float64)
    repeated = case._replace(k=case.k.repeat_interleave(3, 1), v=case.v.repeat_interleave(3, 1))
    found, whole = everything(case, sparse_attention_cpu), everything(repeated, sparse_attention_cpu)
    torch.testing.assert_close(found["o"], whole["o"])
    for name in ("dk", "dv"):
        torch.testing.assert_close(found[name], whole[name].unflatten(1, (2, 3)).sum(2))


def test_a_sample_is_what_it_is_alone() -> None:
    case = Case((40, 50), 24, samples=3, per_sample=True).tensors(torch.float32)
    together = everything(case, sparse_attention_cpu)
    for i in range(3):
        mask = BlockMask(case.mask.kept[i : i + 1], 16, 40, 50)
        alone = everything(Tensors(*(t[i : i + 1] for t in case[:4]), mask, case.scale), sparse_attention_cpu)
        for name, found in alone.items():
            torch.testing.assert_close(found, together[name][i : i + 1])


def test_heads_that_go_leave_the_others_as_they_were() -> None:
    case = Case((40, 50), 24, heads=(4, 4)).tensors(torch.float32)
    keep = torch.tensor([True, False, True, True])
    some = Tensors(*(t[:, keep] for t in case[:4]), case.mask.heads(keep), case.scale)
    whole, found = everything(case, sparse_attention_cpu), everything(some, sparse_attention_cpu)
    for name in found:
        torch.testing.assert_close(found[name], whole[name][:, keep])


def test_without_samples_without_error() -> None:
    case = Case((40, 50), 24, samples=0).tensors(torch.float32)
    q, k, v = (tensor.requires_grad_() for tensor in case[:3])
    o = sparse_attention(q, k, v, case.mask)
    o.sum().backward()
    assert o.shape == (0, 2, 40, 24)
    assert q.grad is not None
    assert q.grad.shape == q.shape


def test_any_number_of_threads_gives_the_same() -> None:
    """On Intel's CPUs but for the last bits: MKL, in which torch's attention multiplies, sums by threads there."""
    case = Case((200, 200), 40, heads=(4, 2), block=32).tensors(torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(everything(case, sparse_attention_cpu))
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, results[0][name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("held", [1, 1 << 14, 1 << 30])
def test_rows_are_the_same_however_many_go_together(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case((200, 150), 24, heads=(4, 2)).tensors(torch.float32)
    truth = truth_of(case)
    monkeypatch.setattr(sparse_attention_cpu, "_HELD", held)
    found = everything(case, sparse_attention_cpu)
    for name in NAMES:
        torch.testing.assert_close(found[name].double(), truth[name], rtol=1e-5, atol=1e-5)


def test_only_gradients_that_are_needed_are_made() -> None:
    case = Case((40, 50), 24).tensors(torch.float32)
    pattern = pattern_of(case.mask)
    for module in MODULES.values():
        whole = everything(case, module)
        for only in range(3):
            needs = [place == only for place in range(3)]
            given = (case.do, *case[:3], whole["o"], whole["log_sum"], pattern, case.scale)
            found = module.backward(*given, needs)  # type: ignore[attr-defined]
            assert [gradient is not None for gradient in found] == needs
            assert torch.equal(found[only], whole[NAMES[1 + only]])
    assert len(EVERY) == 3


def test_autograd_keeps_no_scores() -> None:
    q, k, v = (torch.randn(1, 2, 256, 8, requires_grad=True) for _ in range(3))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        sparse_attention(q, k, v, BlockMask.local(2, 256, 256, 16, 20))
    assert sum(t.numel() for t in kept if t.is_floating_point()) == 4 * q.numel() + 2 * 256


def test_all_blocks_are_torchs_attention() -> None:
    q, k, v = (torch.randn(2, 3, 100, 40, requires_grad=True) for _ in range(3))
    o, expected = sparse_attention(q, k, v, BlockMask.full(3, 100, 100, 32)), F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(o, expected)
    found, true = (torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (o, expected))
    for a, b in zip(found, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
