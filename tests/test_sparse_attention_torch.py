"""sparse_attention within torch: opcheck, torch.compile, autocast, torch.func, derivatives; and what it refuses."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import Case, pattern_of
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from ebdiff import EbdiffError
from ebdiff.ops import BlockMask, sparse_attention

operator = importlib.import_module("ebdiff.ops.sparse_attention_ops")
CASE = Case((40, 33), (12, 5), heads=(4, 2))


def operands(dtype: torch.dtype = torch.float32, laid: str = "tokens") -> tuple[Tensor, Tensor, Tensor, BlockMask]:
    q, k, v, _, mask, _ = CASE._replace(laid=laid).tensors(dtype)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), mask


@pytest.mark.parametrize("laid", ["heads", "tokens", "fused"])
def test_the_operators_pass_opcheck(laid: str) -> None:
    ops = torch.ops.ebdiff
    q, k, v, mask = operands(laid=laid)
    rest = (*pattern_of(mask), 0.3)
    torch.library.opcheck(ops.sparse_attention.default, (q, k, v, *rest))
    q, k, v = (tensor.detach() for tensor in (q, k, v))
    torch.library.opcheck(ops.sparse_attention_forward.default, (q, k, v, *rest))
    o, log_sum = ops.sparse_attention_forward(q, k, v, *rest)
    for needs in ([True] * 3, [False, True, False]):
        torch.library.opcheck(ops.sparse_attention_backward.default, (o, q, k, v, o, log_sum, *rest, needs))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_it_compiles_without_graph_breaks(backend: str) -> None:
    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_attention(q * 2, k, v, mask).transpose(1, 2).flatten(2).square()

    torch._dynamo.reset()
    mask = operands()[3]
    call = torch.compile(step, fullgraph=True, backend=backend, dynamic=True)
    for samples in (2, 3):
        q, k, v, _, _, _ = CASE._replace(samples=samples).tensors(torch.float32)
        inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
        found, expected = call(*inputs), step(*inputs)
        torch.testing.assert_close(found, expected)
        for a, b in zip(*(torch.autograd.grad(y.sum(), inputs) for y in (found, expected)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_autocast_is_that_of_torchs_attention(dtype: torch.dtype) -> None:
    q, k, v, _, mask, _ = Case((40, 40)).tensors(dtype)
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, torchs = sparse_attention(*inputs, mask), F.scaled_dot_product_attention(*inputs)
    assert ours.dtype == torchs.dtype
    assert all(g.dtype == dtype for g in torch.autograd.grad(ours.sum(), inputs))


def test_transforms_of_torch_func_go_to_the_specification_and_are_counted() -> None:
    q, k, v, mask = operands(torch.float64)
    q, k, v = (tensor.detach() for tensor in (q, k, v))
    total = lambda q: sparse_attention(q, k, v, mask).square().sum()  # noqa: E731
    given = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(total(given), given)
    before = operator.fallbacks["torch.func"]
    torch.testing.assert_close(torch.func.grad(total)(q), expected)
    _, slope = torch.func.jvp(total, (q,), (torch.ones_like(q),))
    torch.testing.assert_close(slope, expected.sum())
    with forward_ad.dual_level():
        y = total(forward_ad.make_dual(q, torch.ones_like(q)))
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, slope)
    assert operator.fallbacks["torch.func"] == before + 3
    each = torch.func.vmap(lambda q: sparse_attention(q[None], k[:1], v[:1], mask)[0])(q)
    torch.testing.assert_close(each[:1], sparse_attention(q[:1], k[:1], v[:1], mask))


def test_second_derivatives() -> None:
    q, k, v, mask = operands(torch.float64)
    call = lambda *inputs: sparse_attention(*inputs, mask)  # noqa: E731
    first = torch.autograd.grad(call(q, k, v).sin().sum(), (q, k, v))
    again = torch.autograd.grad(call(q, k, v).sin().sum(), (q, k, v), create_graph=True)
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b)
    small = Case((18, 17), 3, heads=(1, 1), samples=1).tensors(torch.float64)
    given = tuple(tensor.requires_grad_() for tensor in small[:3])
    assert torch.autograd.gradgradcheck(lambda *t: sparse_attention(*t, small.mask), given)


def test_many_gradients_at_once() -> None:
    q, k, v, mask = (t[:1, :2].detach() if isinstance(t, Tensor) else t for t in operands(torch.float64))
    mask = mask.heads(torch.tensor([True, True, False, False]))
    call = lambda v: sparse_attention(q, k, v, mask)[:, :, 20:22]  # noqa: E731
    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(jacobian(call, v, vectorize=True), jacobian(call, v))


def test_one_tensor_for_all_three() -> None:
    x = torch.randn(1, 2, 40, 8, dtype=torch.float64, requires_grad=True)
    mask = BlockMask.local(2, 40, 40, 16, 0)
    assert torch.autograd.gradcheck(lambda x: sparse_attention(x, x, x, mask), (x,))


def test_traces_hold_what_was_computed() -> None:
    q, k, v, mask = (t.detach() if isinstance(t, Tensor) else t for t in operands())
    traced = torch.jit.trace(lambda q: sparse_attention(q, k, v, mask), (q,), check_trace=False)
    torch.testing.assert_close(traced(q + 1), sparse_attention(q + 1, k, v, mask))


# Refusals -------------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "three dimensions": ("q", lambda a: a.update(q=torch.randn(4, 40, 12))),
    "whole numbers": ("q", lambda a: a.update(q=torch.ones(2, 4, 40, 12, dtype=torch.int64))),
    "wider than 256": ("q", lambda a: a.update(q=torch.randn(2, 4, 40, 257))),
    "keys of another width": ("k", lambda a: a.update(k=torch.randn(2, 2, 33, 11))),
    "keys of other samples": ("k", lambda a: a.update(k=torch.randn(3, 2, 33, 12))),
    "heads that do not divide": ("k", lambda a: a.update(k=torch.randn(2, 3, 33, 12))),
    "as many values as keys": ("v", lambda a: a.update(v=torch.randn(2, 2, 32, 5))),
    "values of another dtype": ("v", lambda a: a.update(v=torch.randn(2, 2, 33, 5).double())),
    "keys elsewhere": ("k", lambda a: a.update(k=torch.empty(2, 2, 33, 12, device="meta"))),
    "a mask of other heads": ("block mask", lambda a: a.update(block_mask=BlockMask.full(2, 40, 33, 16))),
    "a mask of more tokens": ("block mask", lambda a: a.update(block_mask=BlockMask.full(4, 49, 33, 16))),
    "a mask of fewer keys": ("block mask", lambda a: a.update(block_mask=BlockMask.full(4, 40, 32, 16))),
    "a mask of other samples": (
        "block mask",
        lambda a: a.update(block_mask=BlockMask(torch.ones(3, 4, 3, 3, dtype=torch.bool), 16, 40, 33)),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_name(name: str) -> None:
    what, spoil = REFUSED[name]
    q, k, v, mask = operands()
    arguments: dict[str, Any] = {"q": q, "k": k, "v": v, "block_mask": mask}
    spoil(arguments)
    with pytest.raises(EbdiffError, match=f"sparse_attention: {what}"):
        sparse_attention(**arguments)


def test_gradients_of_other_tensors_are_refused() -> None:
    q, k, v, mask = (t.detach() if isinstance(t, Tensor) else t for t in operands())
    rest = (*pattern_of(mask), 0.3)
    o, log_sum = torch.ops.ebdiff.sparse_attention_forward(q, k, v, *rest)
    for what, wrong in [
        ("do", (o[:1], q, k, v, o, log_sum)),
        ("o", (o, q, k, v, o.double(), log_sum)),
        ("log_sum", (o, q, k, v, o, log_sum[:1])),
    ]:
        with pytest.raises(EbdiffError, match=f": {what}:"):
            torch.ops.ebdiff.sparse_attention_backward(*wrong, *rest, [True] * 3)


def test_masks_that_nobody_made_are_refused() -> None:
    q, k, v, mask = (t.detach() if isinstance(t, Tensor) else t for t in operands())
    pattern = pattern_of(mask)
    for name, wrong in {
        "row_start": pattern.row_start[:-1],
        "column_start": pattern.column_start.long(),
        "row_at": pattern.row_at.repeat_interleave(2)[::2],
    }.items():
        with pytest.raises(EbdiffError, match=name):
            torch.ops.ebdiff.sparse_attention(q, k, v, *pattern._replace(**{name: wrong}), 0.3)
