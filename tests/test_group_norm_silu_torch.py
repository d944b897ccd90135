"""group_norm_silu within torch: opcheck, torch.compile, autocast, torch.func, derivatives; and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from norm_cases import Case
from op_cases import same
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from ebdiff import EbdiffError
from ebdiff.ops.group_norm import group_norm_silu


def operands(dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    case = Case((2, 9, 3, 4), 3, dtype=dtype)
    tensors = [case.x, *case.small.values()]
    return *(tensor.requires_grad_() for tensor in tensors), case_keep(9), [0, 2, 2, 9], 1e-5, True


def case_keep(channels: int) -> Tensor:
    return torch.arange(channels) != 3


def test_the_operators_pass_opcheck() -> None:
    ops = torch.ops.ebdiff
    torch.library.opcheck(ops.group_norm_silu.default, operands())
    x, *rest = (a.detach() if isinstance(a, Tensor) else a for a in operands())
    torch.library.opcheck(ops.group_norm_silu_forward.default, (x, *rest))
    _, mean, rstd = ops.group_norm_silu_forward(x, *rest)
    for needs in ([True] * 6, [True, False, True, False, False, True]):
        torch.library.opcheck(ops.group_norm_silu_backward.default, (x, x, mean, rstd, *rest, needs))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_it_compiles_without_graph_breaks(backend: str) -> None:
    case = Case((2, 12, 6, 5), 4, keep=[2])
    expected = case.results(case.ours)
    torch._dynamo.reset()
    found = case.results(torch.compile(case.ours, fullgraph=True, backend=backend))
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))


def test_autocast_is_that_of_torchs_group_norm() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = Case((2, 12, 6, 5), 4, dtype=dtype, only=("weight", "bias"), silu=False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = case.ours(case.x, case.small)
            torchs = F.group_norm(case.x, 4, case.small["weight"], case.small["bias"])
        assert ours.dtype == torchs.dtype


def test_transforms_of_torch_func() -> None:
    x, weight, bias = (tensor.detach() for tensor in operands(torch.float64)[:3])
    call = lambda x: group_norm_silu(x, weight, bias, [0, 2, 2, 9])  # noqa: E731
    total = lambda x: call(x).square().sum()  # noqa: E731
    given = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(total(given), given)
    torch.testing.assert_close(torch.func.grad(total)(x), expected)
    torch.testing.assert_close(torch.func.vjp(total, x)[1](torch.tensor(1.0, dtype=x.dtype))[0], expected)
    _, slope = torch.func.jvp(total, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(slope, expected.sum())
    torch.testing.assert_close(torch.func.vmap(call)(x[:, None])[:, 0], call(x))


def test_what_eager_calls_may_not_pass_by() -> None:
    """Without the dispatcher in between: derivatives in forward mode, lazily negated memory."""
    x, weight, bias = (tensor.detach() for tensor in operands(torch.float64)[:3])
    call = lambda x: group_norm_silu(x, weight, bias, [0, 2, 2, 9])  # noqa: E731
    slope = torch.func.jvp(call, (x,), (torch.ones_like(x).cumsum(0),))[1]
    with forward_ad.dual_level():
        y = call(forward_ad.make_dual(x, torch.ones_like(x).cumsum(0)))
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, slope)
    torch.testing.assert_close(call(torch._neg_view(x)), call(-x))


def test_traces_hold_what_was_computed() -> None:
    x, weight, bias = (tensor.detach() for tensor in operands()[:3])
    call = lambda x: group_norm_silu(x, weight, bias, [0, 2, 2, 9])  # noqa: E731
    torch.testing.assert_close(torch.jit.trace(call, (x,))(x + 1), call(x + 1))


def test_zeros_without_memory() -> None:
    x = operands()[0].detach().requires_grad_()
    group_norm_silu(x, None, None, [0, 9]).backward(torch._efficientzerotensor(x.shape))
    assert not x.grad.any()  # type: ignore[union-attr]


def test_first_derivatives_are_the_same_whether_a_second_may_follow() -> None:
    """Even where the arguments depend on each other: no path is counted twice."""
    x, weight = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64, requires_grad=True)
    t = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    once = group_norm_silu(x, weight, None, 2, scale=t, shift=t.sin())
    total = group_norm_silu(once, weight, None, 2, scale=once.mean(2), time_bias=t).sin().sum()
    plain = torch.autograd.grad(total, (weight, t), retain_graph=True)
    again = torch.autograd.grad(total, (weight, t), create_graph=True)
    torch.testing.assert_close(plain, again)


def test_many_gradients_at_once() -> None:
    x = torch.randn(1, 4, 2, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian
    call = lambda x: group_norm_silu(x, None, None, 2)  # noqa: E731
    torch.testing.assert_close(jacobian(call, x, vectorize=True), jacobian(call, x))


def test_gradients_are_those_of_the_function() -> None:
    x, *rest = operands(torch.float64)
    assert torch.autograd.gradcheck(lambda *t: torch.ops.ebdiff.group_norm_silu(*t, *rest[5:]), (x, *rest[:5]))


# Refusals -------------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "one dimension": ("x", lambda a: a.update(x=torch.randn(9))),
    "six dimensions": ("x", lambda a: a.update(x=torch.randn(1, 9, 1, 1, 1, 1))),
    "whole numbers": ("x", lambda a: a.update(x=torch.ones(2, 9, dtype=torch.int64))),
    "sparse": ("x", lambda a: a.update(x=torch.ones(2, 9).to_sparse())),
    "a number that does not divide": ("groups", lambda a: a.update(groups=4)),
    "no group": ("groups", lambda a: a.update(groups=0)),
    "not from 0": ("groups", lambda a: a.update(groups=[1, 9])),
    "not to C": ("groups", lambda a: a.update(groups=[0, 8])),
    "falling": ("groups", lambda a: a.update(groups=[0, 5, 4, 9])),
    "negative eps": ("eps", lambda a: a.update(eps=-1.0)),
    "eps is no number": ("eps", lambda a: a.update(eps=float("nan"))),
    "another length": ("weight", lambda a: a.update(weight=torch.ones(8))),
    "whole-number bias": ("bias", lambda a: a.update(bias=torch.ones(9, dtype=torch.int64))),
    "a scale without samples": ("scale", lambda a: a.update(scale=torch.ones(9))),
    "a shift of other samples": ("shift", lambda a: a.update(shift=torch.ones(3, 9))),
    "a time embedding with positions": ("time_bias", lambda a: a.update(time_bias=torch.ones(2, 9, 1, 1))),
    "a mask of numbers": ("keep", lambda a: a.update(keep=torch.ones(9))),
    "a mask of another length": ("keep", lambda a: a.update(keep=torch.ones(8, dtype=torch.bool))),
    "another device": ("bias", lambda a: a.update(bias=torch.ones(9, device="meta"))),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_name(name: str) -> None:
    what, spoil = REFUSED[name]
    arguments: dict[str, Any] = {"x": torch.randn(2, 9, 4), "weight": torch.ones(9), "bias": torch.ones(9), "groups": 3}
    spoil(arguments)
    with pytest.raises(EbdiffError, match=what):
        group_norm_silu(**arguments)


def test_gradients_of_another_tensor_are_refused() -> None:
    case = Case((2, 9, 4), 3)
    norm = (None,) * 6 + ([0, 3, 6, 9], 1e-5, True)
    _, mean, rstd = torch.ops.ebdiff.group_norm_silu_forward(case.x, *norm)
    for what, wrong in [
        ("dy", (case.dy[:1], mean, rstd)),
        ("mean", (case.dy, mean[:1], rstd)),
        ("rstd", (case.dy, mean, rstd.double())),
    ]:
        with pytest.raises(EbdiffError, match=what):
            torch.ops.ebdiff.group_norm_silu_backward(wrong[0], case.x, *wrong[1:], *norm, [True] + [False] * 5)
